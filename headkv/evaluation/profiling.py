"""Make a head profile by one call: what `headkv profile` does."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headkv.heads.ablation import profile_ablation
from headkv.heads.cached_gates import profile_cached_gates
from headkv.heads.gates import profile_gates
from headkv.heads.induction import profile_repeats
from headkv.heads.profile import KINDS, HeadProfile
from headkv.heads.reconstruction import profile_reconstruction
from headkv.heads.retrieval import profile_retrieval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROFILERS: dict[str, Callable[..., Any]] = {
    "echo": profile_repeats,
    "induction": profile_repeats,
    "retrieval": profile_retrieval,
    "retrieval-reasoning": profile_retrieval,
    "gate": profile_cached_gates,
    "ablation": profile_ablation,
    "reconstruction": profile_reconstruction,
}
# Kinds that can be measured in more ways than one; the first is what `PROFILERS` has.
WAYS: dict[str, dict[str, Callable[..., Any]]] = {
    "gate": {"cached": profile_cached_gates, "published": profile_gates},
}


def profiler(kind: str, way: str | None = None) -> Callable[..., Any]:
    """The function that measures `kind`, in one of its `WAYS`.

    Raises:
        ValueError: `kind` is unknown, or has no such way.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if way is None:
        return PROFILERS[kind]
    if way not in (ways := WAYS.get(kind, {})):
        allowed = f"one of {', '.join(ways)}" if ways else "left out"
        raise ValueError(f"way must be {allowed} for kind {kind!r}, got {way!r}")
    return ways[way]


def profile_options(kind: str, way: str | None = None) -> dict[str, Any]:
    """The options that the profiler of `kind` has, by name, with their defaults.

    >>> profile_options("echo")
    {'num_tokens': 512, 'repeats': 4, 'seeds': (0, 1, 2)}
    """
    parameters = inspect.signature(profiler(kind, way)).parameters.values()
    ours = ("reasoning", "progress", "journal")  # the kind says the first, `run_profile` the others
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ours}


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
    """Measure a head profile of a model.

    An ablation notes what it has done in a file beside `out`, with ".partial" added to its name. If it is killed,
    the same call goes on from there.

    Args:
        kind: one of `headkv.heads.KINDS`.
        model: "smollm2", or the name or folder of any Hugging Face decoder.
        out: where to save the profile; None: nowhere.
        way: one of `WAYS[kind]`; None: the first.
        device: where the model runs, as torch names it, e.g. "cuda".
        progress: show a progress bar on the standard error stream.
        **options: of the profiler, see `profile_options`.

    Returns:
        The profile; its `parameters` say all options.

    Raises:
        ValueError: `kind` or `way` is unknown, there is no such model or device, or an option is out of range.
        TypeError: the profiler has no such option.
        RuntimeError: the model answers too badly to be measured.
    """
    known = profile_options(kind, way)
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"options of kind {kind!r} must be of {', '.join(known)}, got {', '.join(unknown)}")
    loaded, tokenizer = load_on(device, model)
    journal = None
    if kind == "ablation" and out is not None:
        journal = Path(out).with_name(Path(out).name + ".partial")
        options["journal"] = journal
    profile = measure(kind, loaded, tokenizer, way=way, progress=progress, **options)
    if out is not None:
        profile.save(out)
    if journal is not None:
        journal.unlink(missing_ok=True)
    return profile


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
    """Load SmolLM2 ("smollm2") or any Hugging Face decoder by its name or folder, with its tokenizer.

    Raises:
        ValueError: there is none.
    """
    if model == "smollm2":
        from headkv.models.smollm2 import load_smollm2

        return load_smollm2()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        return AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        allowed = "'smollm2', or the name or folder of a transformers decoder with its tokenizer"
        raise ValueError(f"model must be {allowed}, got {model!r}: {reason}") from error


def measure(
    kind: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    way: str | None = None,
    **options: Any,
) -> HeadProfile:
    """Run the profiler of `kind` on a loaded model; see the profilers for their options."""
    run = profiler(kind, way)
    if kind in ("echo", "induction"):
        pair = run(model, tokenizer, **options)
        return pair[("echo", "induction").index(kind)]
    if kind.startswith("retrieval"):
        options["reasoning"] = kind == "retrieval-reasoning"
    profile: HeadProfile = run(model, tokenizer, **options)
    return profile
