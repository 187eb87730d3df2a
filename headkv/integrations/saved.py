"""Which model a saved cache belongs to, and what stands for its method, which no file holds."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headkv._config import CacheShape, layer_kinds, model_name
from headkv.integrations.support import CacheOptions, decoder_of, supported_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headkv.methods.base import Keep
    from headkv.prefill import Prefill

# Of every weight this many values are looked at.
_SAMPLES = 16


class NoMethod:
    """In place of a method: what is stored is kept, and another prompt is refused."""

    observed_queries = 0

    def plan(self, prefill: Prefill) -> Keep:
        """No plan.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "this cache was loaded from a file, which holds no method for another prompt: "
            "call RaggedCache.load(path, model, method), or begin anew with RaggedCache.for_model"
        )


def check_one_process(options: CacheOptions, done: str) -> None:
    """A cache that has all heads of its model.

    Raises:
        ValueError: it has those of one rank.
    """
    if options.ranks is not None:
        raise ValueError(
            f"a cache can not be {done} where {options.ranks.size} ranks share the model's heads: a file holds all of "
            "them; use one process, or `cache.snapshot()` on every rank"
        )


def identity(model: PreTrainedModel) -> dict[str, Any]:
    """What must be equal in a model that goes on with a cache of `model`, in plain JSON values."""
    config = supported_config(model)
    shape = CacheShape.of(model)
    said = {
        "name": model_name(model),
        "type": config.model_type,
        "layers": shape.num_layers,
        "kinds of layers": layer_kinds(config),
        "KV heads": shape.num_kv_heads,
        "head dim": shape.head_dim,
        "windows": shape.windows,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "rotary embedding": getattr(config, "rope_parameters", None),
        "weights": _fingerprint(model),
    }
    plain: dict[str, Any] = json.loads(json.dumps(said, default=str))
    return plain


def check_identity(about: dict[str, Any], model: PreTrainedModel) -> None:
    """What a file says of its model fits this one.

    Raises:
        ValueError: it does not; the message says in what.
    """
    saved, own = about.get("model", {}), identity(model)
    whose = f" (saved from {saved['name']})" if saved.get("name") else ""
    for name, ours in own.items():
        theirs = saved.get(name)
        if name == "name" or theirs == ours or (name == "weights" and None in (theirs, ours)):
            continue
        if name == "weights":
            raise ValueError(f"the model must be the one that read the text, but has other weights{whose}")
        raise ValueError(f"the model must be the one that read the text{whose}: {name} {theirs}, got {ours}")


def devices_of(model: PreTrainedModel) -> list[torch.device]:
    """Where each layer of the decoder computes."""
    devices = [model.device] * len(layer_kinds(supported_config(model)))
    for module in decoder_of(model).modules():
        index = getattr(module, "layer_idx", None)
        weight = next(module.parameters(), None)
        if isinstance(index, int) and 0 <= index < len(devices) and weight is not None:
            # accelerate keeps offloaded weights nowhere between two calls, and says where they will be
            placed = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            devices[index] = weight.device if placed is None else torch.device(placed)
    return devices


def _fingerprint(model: PreTrainedModel) -> str | None:
    """A checksum of a few values of every weight of the decoder; None where some are offloaded."""
    sha = hashlib.sha256()
    for weight in decoder_of(model).parameters():
        if weight.is_meta:
            return None
        sha.update(_some(weight.detach()).cpu().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _some(weight: Tensor) -> Tensor:
    """Values from all over a weight."""
    return weight.reshape(-1)[:: max(1, weight.numel() // _SAMPLES)].contiguous()
