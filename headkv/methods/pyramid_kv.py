"""PyramidKV: early layers keep more than late ones."""

from __future__ import annotations

from dataclasses import dataclass

from headkv import _checks
from headkv.allocators import PyramidAllocator
from headkv.methods.base import Keep, Prefill, check_budget, plan_by_scores
from headkv.scorers import Scorer, SnapKVScorer


@dataclass(frozen=True)
class PyramidKV:
    """PyramidKV, arXiv 2406.02069: budgets fall linearly over the layers; heads of a layer are alike.

    Attributes:
        budget: entries a KV head on average (int), or the share of the prompt (float in (0, 1]); the window
            is included.
        beta: at least 1; the last layer gets about `1 / beta` of the average.
        scorer: which entries are the best.
    """

    budget: int | float
    beta: float = 20
    scorer: Scorer = SnapKVScorer()

    def __post_init__(self) -> None:
        check_budget(self.budget)
        _checks.has("scorer", self.scorer, "window", "observed_queries", "score")
        PyramidAllocator(self.beta)

    @property
    def observed_queries(self) -> int | None:
        """What the scorer needs."""
        return self.scorer.observed_queries

    def plan(self, prefill: Prefill) -> Keep:
        """Keep the best entries, as many as this layer's step of the pyramid."""
        return plan_by_scores(prefill, self.scorer, PyramidAllocator(self.beta), self.budget)
