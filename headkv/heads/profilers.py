"""Which profiler measures which kind of head profile."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from headkv import _checks
from headkv.heads.gates import profile_gates
from headkv.heads.induction import profile_repeats
from headkv.heads.profile import HeadProfile
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
    ours = ("reasoning", "progress")  # the kind says the one, the caller the other
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ours}


def check_options(kind: str, options: Iterable[str]) -> None:
    """Names of options that the profiler of `kind` has.

    Raises:
        ValueError: an unknown kind.
        TypeError: the profiler has no such option.
    """
    _checks.one_of("kind", kind, tuple(PROFILERS))
    known = profile_options(kind)
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"options of kind {kind!r} must be of {', '.join(known)}, got {', '.join(unknown)}")


def measure(
    kind: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    progress: bool = False,
    **options: Any,
) -> HeadProfile:
    """The profile of `kind` of a loaded model; see the profilers for their options.

    Raises:
        ValueError: an unknown kind, or an option out of range.
        TypeError: the profiler has no such option.
        RuntimeError: the model answers too badly to be measured ("retrieval" and "retrieval-reasoning").
    """
    check_options(kind, options)
    if PROFILERS[kind] is profile_retrieval:
        options["reasoning"] = kind == "retrieval-reasoning"
    made = PROFILERS[kind](model, tokenizer, progress=progress, **options)
    return next(profile for profile in (made if isinstance(made, tuple) else (made,)) if profile.kind == kind)
