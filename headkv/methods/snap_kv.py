"""SnapKV: what the observation window looked at, equally much for every head."""

from __future__ import annotations

from dataclasses import dataclass

from headkv import _checks
from headkv.allocators import UniformAllocator
from headkv.methods.base import Keep, Prefill, check_budget, plan_by_scores
from headkv.scorers import Scorer, SnapKVScorer


@dataclass(frozen=True)
class SnapKV:
    """SnapKV, arXiv 2404.14469: every KV head keeps the same number of entries, its best.

    Attributes:
        budget: entries a KV head (int), or the share of the prompt (float in (0, 1]); the window is included.
        scorer: which entries are the best.
    """

    budget: int | float
    scorer: Scorer = SnapKVScorer()

    def __post_init__(self) -> None:
        check_budget(self.budget)
        _checks.has("scorer", self.scorer, "window", "observed_queries", "score")

    @property
    def observed_queries(self) -> int | None:
        """What the scorer needs."""
        return self.scorer.observed_queries

    def plan(self, prefill: Prefill) -> Keep:
        """Keep `budget` entries of each KV head."""
        return plan_by_scores(prefill, self.scorer, UniformAllocator(), self.budget)
