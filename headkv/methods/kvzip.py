"""KVzip: entries that the model needs to repeat the text stay, whichever head of whichever layer has them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from headkv.allocators import AdaptiveAllocator
from headkv.methods.scored import Scored, ScoredMethod
from headkv.scorers.kvzip import KVzipScorer


@dataclass(frozen=True)
class KVzip(Scored):
    """KVzip, arXiv 2505.23416: the highest scores of all layers and heads, where a score says what repeating needs.

    The text is read again once the prompt is in the cache, so that nothing has to be known of the questions to come.
    Published code keeps what lies strictly above a threshold: with ties fewer than it says, or nothing. Here the total
    is exact, and of equal scores the earlier position wins.

    Attributes:
        budget: entries a KV head on average (int), or the share of the prompt (float in (0, 1]); window and sinks are
            included.
        scorer: reads the text again.
        safeguard: share of an equal budget that every head keeps, in [0, 1]; published: 0.
        scope: "model", as published: all rows of all layers compete; or "layer".
    """

    budget: int | float
    scorer: KVzipScorer = KVzipScorer()
    safeguard: float = 0.0
    scope: str = "model"

    @cached_property
    def composed(self) -> ScoredMethod:
        """The scorer, and as many entries a head as its scores say."""
        return ScoredMethod(self.budget, self.scorer, AdaptiveAllocator(self.safeguard), self.scope)
