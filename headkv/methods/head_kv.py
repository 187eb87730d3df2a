"""HeadKV: heads that retrieve keep more, by a profile measured once; which entries, the prompt says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from headkv import _checks
from headkv.allocators import ProfileAllocator
from headkv.methods.base import Keep, Prefill, check_budget, plan_by_scores
from headkv.scorers import Scorer, SnapKVScorer

if TYPE_CHECKING:
    from headkv.heads import HeadProfile


@dataclass(frozen=True, eq=False)
class HeadKV:
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

    def __post_init__(self) -> None:
        check_budget(self.budget)
        _checks.has("profile", self.profile, "scores", "kv_scores")
        _checks.has("scorer", self.scorer, "window", "observed_queries", "score")
        _checks.one_of("reduce", self.reduce, ("sum", "max", "mean"))
        ProfileAllocator(self.profile.scores, self.beta, self.temperature)

    @property
    def observed_queries(self) -> int | None:
        """What the scorer needs."""
        return self.scorer.observed_queries

    @property
    def profiles(self) -> tuple[HeadProfile, ...]:
        """The profiles, to be checked against a model."""
        return (self.profile,)

    def allocator(self, num_kv_heads: int) -> ProfileAllocator:
        """What splits the budget of a model with so many KV heads: one for all its layers."""
        if num_kv_heads not in self._allocators:
            scores = self.profile.kv_scores(num_kv_heads, self.reduce)
            self._allocators[num_kv_heads] = ProfileAllocator(scores, self.beta, self.temperature)
        return self._allocators[num_kv_heads]

    @cached_property
    def _allocators(self) -> dict[int, ProfileAllocator]:
        return {}

    def plan(self, prefill: Prefill) -> Keep:
        """Keep the best entries, as many a head as the profile says."""
        return plan_by_scores(prefill, self.scorer, self.allocator(prefill.num_kv_heads), self.budget)
