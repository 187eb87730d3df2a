"""PyramidKV: early layers keep more than late ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from headkv.allocators import PyramidAllocator
from headkv.methods.scored import Scored, ScoredMethod
from headkv.scorers import Scorer, SnapKVScorer


@dataclass(frozen=True)
class PyramidKV(Scored):
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

    @cached_property
    def composed(self) -> ScoredMethod:
        """The scorer and this layer's step of the pyramid."""
        return ScoredMethod(self.budget, self.scorer, PyramidAllocator(self.beta))
