"""Ada-KV: heads whose attention is spread keep more, heads whose attention is narrow keep less."""

from __future__ import annotations

from dataclasses import dataclass

from headkv import _checks
from headkv.allocators import AdaptiveAllocator, PyramidAllocator, UniformAllocator
from headkv.methods.base import Keep, Prefill, check_budget, plan_by_scores
from headkv.scorers import Scorer, SnapKVScorer


@dataclass(frozen=True)
class AdaKV:
    """Ada-KV, arXiv 2407.11550: a layer's slots go to the highest scores of any head, above a safeguard.

    Attributes:
        budget: entries a KV head on average (int), or the share of the prompt (float in (0, 1]); the window
            is included.
        scorer: scores that are comparable across the heads of a layer, as attention weights are.
        safeguard: share of an equal budget that every head keeps, in [0, 1]; 1 is `SnapKV`.
        pyramid: layers get `PyramidKV`'s budgets (Ada-Pyramid) in place of equal ones (Ada-SnapKV).
        beta: the pyramid's steepness, at least 1.
    """

    budget: int | float
    scorer: Scorer = SnapKVScorer()
    safeguard: float = 0.2
    pyramid: bool = False
    beta: float = 20

    def __post_init__(self) -> None:
        check_budget(self.budget)
        _checks.has("scorer", self.scorer, "window", "observed_queries", "score")
        self.allocator()
        PyramidAllocator(self.beta)

    @property
    def observed_queries(self) -> int | None:
        """What the scorer needs."""
        return self.scorer.observed_queries

    def allocator(self) -> AdaptiveAllocator:
        """What splits the budget."""
        base = PyramidAllocator(self.beta) if self.pyramid else UniformAllocator()
        return AdaptiveAllocator(self.safeguard, base)

    def plan(self, prefill: Prefill) -> Keep:
        """Keep the best entries, as many a head as the layer's scores say."""
        return plan_by_scores(prefill, self.scorer, self.allocator(), self.budget)
