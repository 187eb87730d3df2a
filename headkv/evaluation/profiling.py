"""Make a head profile by one call: what `headkv profile` does."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from headkv.heads.gates import profile_gates
from headkv.heads.induction import profile_repeats
from headkv.heads.profile import KINDS, HeadProfile
from headkv.heads.retrieval import profile_retrieval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROFILERS: dict[str, Callable[..., Any]] = {
    "echo": profile_repeats,
    "induction": profile_repeats,
    "retrieval": profile_retrieval,
    "retrieval-reasoning": profile_retrieval,
    "gate": profile_gates,
}


def profile_options(kind: str) -> dict[str, Any]:
    """The options that the profiler of `kind` has, by name, with their defaults.

    >>> profile_options("echo")
    {'num_tokens': 512, 'repeats': 4, 'seeds': (0, 1, 2)}
    """
    parameters = inspect.signature(PROFILERS[kind]).parameters.values()
    ours = ("reasoning", "progress")  # the kind says the one, `run_profile` the other
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ours}


def run_profile(
    kind: str,
    model: str = "smollm2",
    out: str | os.PathLike[str] | None = None,
    *,
    device: str = "cpu",
    progress: bool = True,
    **options: Any,
) -> HeadProfile:
    """Measure a head profile of a model.

    Args:
        kind: one of `headkv.heads.KINDS`.
        model: "smollm2", or the name or folder of any Hugging Face decoder.
        out: where to save the profile; None: nowhere.
        device: where the model runs, as torch names it, e.g. "cuda".
        progress: show a progress bar on the standard error stream.
        **options: of the profiler, see `profile_options`.

    Returns:
        The profile; its `parameters` say all options.

    Raises:
        ValueError: `kind` is unknown, there is no such model or device, or an option is out of range.
        TypeError: the profiler has no such option.
        RuntimeError: the model answers too badly to be measured ("retrieval" and "retrieval-reasoning").
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    known = profile_options(kind)
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"options of kind {kind!r} must be of {', '.join(known)}, got {', '.join(unknown)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without it; a device that is not there
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one that torch has here, got {device!r}: {reason}") from error
    loaded, tokenizer = load(model)
    loaded.to(device)  # type: ignore[arg-type]
    profile = measure(kind, loaded, tokenizer, progress=progress, **options)
    if out is not None:
        profile.save(out)
    return profile


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
    kind: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> HeadProfile:
    """Run the profiler of `kind` on a loaded model; see the profilers for their options."""
    if kind in ("echo", "induction"):
        return profile_repeats(model, tokenizer, **options)[("echo", "induction").index(kind)]
    if kind == "gate":
        return profile_gates(model, tokenizer, **options)
    return profile_retrieval(model, tokenizer, reasoning=kind == "retrieval-reasoning", **options)
