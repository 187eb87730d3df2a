"""SnapKV: what the observation window looked at, equally much for every head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from headkv.allocators import UniformAllocator
from headkv.methods.scored import Scored, ScoredMethod
from headkv.scorers import Scorer, SnapKVScorer


@dataclass(frozen=True)
class SnapKV(Scored):
    """SnapKV, arXiv 2404.14469: every KV head keeps the same number of entries, its best.

    Attributes:
        budget: entries a KV head (int), or the share of the prompt (float in (0, 1]); the window is included.
        scorer: which entries are the best.
    """

    budget: int | float
    scorer: Scorer = SnapKVScorer()

    @cached_property
    def composed(self) -> ScoredMethod:
        """The scorer and equal budgets."""
        return ScoredMethod(self.budget, self.scorer, UniformAllocator())
