"""Make a head profile by one call: what `headkv profile` does."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headkv._version import find_version
from headkv.heads.profile import HeadProfile
from headkv.heads.profilers import PROFILERS, WAYS, check_options, measure, profile_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "PROFILERS",
    "WAYS",
    "load",
    "load_on",
    "load_tokenizer",
    "measure",
    "profile_options",
    "run_profile",
]

SMOLLM2 = ("smollm2", "smollm2-tuned")


def run_profile(
    kind: str,
    model: str = "smollm2",
    out: str | os.PathLike[str] | None = None,
    *,
    way: str | None = None,
    device: str = "cpu",
    progress: bool = True,
    **options: Any,
) -> HeadProfile:
    """A head profile of a model, measured and saved.

    An ablation notes what it has done in a file beside `out`, with ".partial" added to its name. If it is killed,
    the same call goes on from there.

    Args:
        kind: one of `headkv.heads.KINDS`.
        model: "smollm2", "smollm2-tuned", or the name or folder of any Hugging Face decoder.
        out: where to save the profile; None: nowhere.
        way: one of `WAYS[kind]`; None: the first.
        device: where the model runs, as torch names it, e.g. "cuda".
        progress: show a progress bar on the standard error stream.
        **options: of the profiler, see `profile_options`.

    Returns:
        The profile; its `parameters` say all options, and the versions and the device that measured it.

    Raises:
        ValueError: `kind` or `way` is unknown, there is no such model or device, or an option is out of range.
        TypeError: the profiler has no such option.
        RuntimeError: the model answers too badly to be measured.
    """
    check_options(kind, options, way)
    loaded, tokenizer = load_on(device, model)
    journal = None
    if kind == "ablation" and out is not None:
        journal = Path(out).with_name(Path(out).name + ".partial")
    profile = measure(kind, loaded, tokenizer, way=way, progress=progress, journal=journal, **options)
    profile = dataclasses.replace(profile, parameters={**profile.parameters, "versions": _versions(device)})
    if out is not None:
        profile.save(out)
    if journal is not None:
        journal.unlink(missing_ok=True)
    return profile


def _versions(device: str) -> dict[str, str]:
    import transformers

    chip = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device
    return {
        "headkv": find_version(Path(__file__).resolve().parents[1]),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": chip,
    }


def load_on(device: str, model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model as `load` does, and put it on a device.

    Raises:
        ValueError: there is no such model or device.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without it; a device that is not there
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one that torch has here, got {device!r}: {reason}") from error
    loaded, tokenizer = load(model)
    loaded.to(device)  # type: ignore[arg-type]
    return loaded, tokenizer


def load(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2 ("smollm2", "smollm2-tuned") or any Hugging Face decoder by its name or folder, with its tokenizer.

    Raises:
        ValueError: there is none.
    """
    if model in SMOLLM2:
        from headkv.models.smollm2 import load_smollm2

        return load_smollm2(tuned=model == "smollm2-tuned")
    from transformers import AutoModelForCausalLM

    with _named(model):
        loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    return loaded, load_tokenizer(model)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer that `load` gives, without the weights.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    if model in SMOLLM2:
        from headkv.models.smollm2 import fetch_smollm2

        return AutoTokenizer.from_pretrained(fetch_smollm2(), local_files_only=True)
    with _named(model):
        return AutoTokenizer.from_pretrained(model)


@contextmanager
def _named(model: str) -> Iterator[None]:
    """Say which model it is that is not there."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        allowed = (
            "'smollm2', 'smollm2-tuned', or the name or folder of a transformers decoder with its tokenizer"
        )
        raise ValueError(f"model must be {allowed}, got {model!r}: {reason}") from error
