"""Which profiler measures which kind of head profile."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headkv import _checks
from headkv.heads.ablation import profile_ablation
from headkv.heads.cached_gates import profile_cached_gates
from headkv.heads.gates import profile_gates
from headkv.heads.induction import profile_repeats
from headkv.heads.profile import HeadProfile
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
    _checks.one_of("kind", kind, tuple(PROFILERS))
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
    ours = ("reasoning", "progress", "journal")  # the kind says the first, the caller the others
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ours}


def check_options(kind: str, options: Iterable[str], way: str | None = None) -> None:
    """Names of options that the profiler of `kind` has.

    Raises:
        ValueError: an unknown kind, or way.
        TypeError: the profiler has no such option.
    """
    known = profile_options(kind, way)
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"options of kind {kind!r} must be of {', '.join(known)}, got {', '.join(unknown)}")


def measure(
    kind: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    way: str | None = None,
    progress: bool = False,
    journal: Path | None = None,
    **options: Any,
) -> HeadProfile:
    """The profile of `kind` of a loaded model; see the profilers for their options.

    Args:
        kind: one of `PROFILERS`.
        model, tokenizer: a decoder and its tokenizer.
        way: one of the kind's `WAYS`; default: the first.
        progress: show a progress bar.
        journal: of kind "ablation": a file that notes what is done, so that a killed run can go on.
        **options: of the profiler.

    Raises:
        ValueError: an unknown kind or way, or an option out of range.
        TypeError: the profiler has no such option.
        RuntimeError: the model answers too badly to be measured.
    """
    check_options(kind, options, way)
    run = profiler(kind, way)
    if run is profile_retrieval:
        options["reasoning"] = kind == "retrieval-reasoning"
    if run is profile_ablation:
        options["journal"] = journal
    made = run(model, tokenizer, progress=progress, **options)
    return next(profile for profile in (made if isinstance(made, tuple) else (made,)) if profile.kind == kind)
