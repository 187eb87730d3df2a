"""HeadKV: heads that retrieve keep more, by a profile measured once; which entries, the prompt says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from headkv import _checks
from headkv._brief import brief
from headkv.allocators import ProfileAllocator
from headkv.methods.scored import Scored, ScoredMethod
from headkv.scorers import Scorer, SnapKVScorer

if TYPE_CHECKING:
    from headkv.heads import HeadProfile


@dataclass(frozen=True, eq=False)
class HeadKV(Scored):
    """HeadKV (a profile of kind "retrieval") and HeadKV-R2 ("retrieval-reasoning"), arXiv 2410.19258.

    One pool over all layers and heads is split by the profile's scores; within a head the scorer's best are
    kept.

    Attributes:
        budget: entries a KV head on average (int), or the share of the prompt (float in (0, 1]); the window
            is included.
        profile: scores of at least 0, not all 0.
        beta: at least 1; a share of 1 / beta of the budget is pooled. Smaller is more unequal, infinity is
            `SnapKV`.
        scorer: which entries are the best.
        temperature: the power that scores are raised to.
        reduce: query heads of a group to one, for profiles of query heads: "sum", "max" or "mean".
    """

    budget: int | float
    profile: HeadProfile
    beta: float = 1.5
    scorer: Scorer = SnapKVScorer()
    temperature: float = 1.0
    reduce: str = "sum"

    __repr__ = brief

    def __post_init__(self) -> None:
        _checks.has("profile", self.profile, "scores", "kv_scores")
        super().__post_init__()

    @property
    def profiles(self) -> tuple[HeadProfile, ...]:
        """The profiles, to be checked against a model."""
        return (self.profile,)

    def allocator(self) -> ProfileAllocator:
        """What splits the budget: one for all layers."""
        return ProfileAllocator(self.profile.scores, self.beta, self.temperature, self.reduce)

    @cached_property
    def composed(self) -> ScoredMethod:
        """The scorer, and as many entries a head as the profile says."""
        return ScoredMethod(self.budget, self.scorer, self.allocator())
