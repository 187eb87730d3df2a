"""DefensiveKV: an entry that was ever needed much stays, whatever it was needed for on average."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from headkv.allocators import AdaptiveAllocator
from headkv.methods.scored import Scored, ScoredMethod
from headkv.scorers.defensive import DefensiveScorer


@dataclass(frozen=True)
class DefensiveKV(Scored):
    """DefensiveKV and, with scope "model", Layer-DefensiveKV, arXiv 2510.13334.

    Attributes:
        budget: entries a KV head on average (int), or the share of the prompt (float in (0, 1]); the window is
            included.
        scorer: worst cases over the observation window.
        safeguard: share of an equal budget that every head keeps, in [0, 1]; published: 0.
        scope: "layer": a layer's heads share its budget; "model": all heads of all layers share one.
    """

    budget: int | float
    scorer: DefensiveScorer = DefensiveScorer()
    safeguard: float = 0.0
    scope: str = "layer"

    @cached_property
    def composed(self) -> ScoredMethod:
        """The scorer, and as many entries a head as its scores say."""
        return ScoredMethod(self.budget, self.scorer, AdaptiveAllocator(self.safeguard), self.scope)
