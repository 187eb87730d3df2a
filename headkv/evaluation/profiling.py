"""Make a head profile by one call: what `headkv profile` does."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from headkv.heads.profile import KINDS, HeadProfile

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run_profile(
    kind: str,
    model: str = "smollm2",
    out: str | os.PathLike[str] | None = None,
    *,
    progress: bool = True,
    **options: Any,
) -> HeadProfile:
    """Measure a head profile of a model.

    Args:
        kind: one of `headkv.heads.KINDS`.
        model: "smollm2", or the name or folder of any Hugging Face decoder.
        out: where to save the profile; None: nowhere.
        progress: show a progress bar on the standard error stream.
        **options: of the profiler, e.g. `num_tokens=256` for "echo" and "induction".

    Returns:
        The profile.

    Raises:
        ValueError: `kind` is unknown, or an option is out of range.
        TypeError: the profiler has no such option.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    loaded, tokenizer = load(model)
    profile = measure(kind, loaded, tokenizer, progress=progress, **options)
    if out is not None:
        profile.save(out)
    return profile


def load(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2 ("smollm2") or any Hugging Face decoder by its name or folder, with its tokenizer."""
    if model == "smollm2":
        from headkv.models.smollm2 import load_smollm2

        return load_smollm2()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)


def measure(
    kind: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> HeadProfile:
    """Run the profiler of `kind` on a loaded model; see the profilers for their options."""
    if kind in ("echo", "induction"):
        from headkv.heads.induction import profile_repeats

        return profile_repeats(model, tokenizer, **options)[("echo", "induction").index(kind)]
    if kind == "gate":
        from headkv.heads.gates import profile_gates

        return profile_gates(model, tokenizer, **options)
    from headkv.heads.retrieval import profile_retrieval

    return profile_retrieval(model, tokenizer, reasoning=kind == "retrieval-reasoning", **options)
