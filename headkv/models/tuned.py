"""SmolLM2 tuned to find needles: low-rank weights that come with headkv, added to the plain model's.

Every linear layer's weight W [out, in] becomes W + B A, with A [rank, in] and B [out, rank] (LoRA, Hu et al. 2021,
https://arxiv.org/abs/2106.09685). A and B are stored as int8, with one scale for each rank.
`headkv/models/data/README.md` says what the weights were learned from; `tools/tune.py` makes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TUNED_ID = "headkv/SmolLM2-135M-Instruct-needles"
TUNED_FILE = "smollm2-needles.safetensors"

_FORMAT = "headkv low-rank weights, version 1"
_PARTS = ("A", "A_scale", "B", "B_scale")


def tuned_weights() -> Path:
    """Return the file of low-rank weights that comes with headkv."""
    return Path(str(resources.files("headkv.models") / "data" / TUNED_FILE))


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linear layers inside the decoder's layers, by name: not the embedding, not the output."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in f".{name}"
    }


def add_low_rank(model: PreTrainedModel, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Add low-rank weights to the weights of `model`, in place.

    Args:
        model: the model that they were learned for.
        path: a file that `save_low_rank` wrote. None: the one that comes with headkv, of SmolLM2-135M-Instruct.

    Returns:
        What the file says about itself: the rank, the base model, seeds, steps, versions.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not whole, is something else, or belongs to another model; nothing is added then.
    """
    source = Path(path) if path is not None else tuned_weights()
    tensors, about = read_low_rank(source)
    base = model.config._name_or_path
    if about["base"] != base:
        raise ValueError(f"{source.name} holds weights for {about['base']}, got the model {base}")
    layers = linear_layers(model)
    expected = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    found = {name: (up.shape[0], down.shape[1]) for name, (down, up) in tensors.items()}
    if found != expected:
        wrong = next(name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name))
        raise ValueError(
            f"{source.name} must hold the linear layers of the model, each [out, in]: "
            f"{wrong} is {found.get(wrong)} in the file and {expected.get(wrong)} in the model"
        )
    with torch.no_grad():
        for name, layer in layers.items():
            down, up = (factor.to(layer.weight.device) for factor in tensors[name])
            layer.weight.copy_(layer.weight.float() + up @ down)
    return about


def save_low_rank(
    path: str | os.PathLike[str], factors: Mapping[str, tuple[Tensor, Tensor]], about: Mapping[str, Any]
) -> None:
    """Write low-rank weights as int8 with scales.

    Args:
        path: the file to write.
        factors: for each linear layer, by its name, A [rank, in] and B [out, rank].
        about: goes into the file's header; must name the `base` model.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, (down, up) in factors.items():
        tensors[f"{name}.A"], tensors[f"{name}.A_scale"] = _quantized(down, dim=1)
        tensors[f"{name}.B"], tensors[f"{name}.B_scale"] = _quantized(up, dim=0)
    save_file(tensors, path, metadata={"format": _FORMAT, "about": json.dumps(dict(about))})


def read_low_rank(
    path: str | os.PathLike[str],
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Any]]:
    """Read what `save_low_rank` wrote.

    Returns:
        For each linear layer A [rank, in] and B [out, rank], float32; and what the file says about itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not whole, or is something else.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of low-rank weights at {path}")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(
            f"{path.name} is not a whole safetensors file ({error}); install headkv again or make it anew"
        ) from error
    if header.get("format") != _FORMAT:
        raise ValueError(f"{path.name} must be a file of {_FORMAT}, got {header.get('format')!r}")
    factors = {}
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        if missing := [part for part in _PARTS if f"{name}.{part}" not in tensors]:
            raise ValueError(
                f"{path.name} must hold {', '.join(_PARTS)} of every layer; {name} has no {missing[0]}"
            )
        down, down_scale, up, up_scale = (tensors[f"{name}.{part}"] for part in _PARTS)
        factors[name] = (down * down_scale[:, None], up * up_scale)
    return factors, json.loads(header["about"])


def _quantized(factor: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return `factor` as int8 and the scale [rank] of each rank, from its greatest absolute value along `dim`."""
    factor = factor.detach().to("cpu", torch.float32)
    scale = (factor.abs().amax(dim) / 127).clamp(min=1e-12)
    return (factor / scale.unsqueeze(dim)).round().to(torch.int8).contiguous(), scale
