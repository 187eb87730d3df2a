"""KVzip: entries that the model needs to repeat the text stay, whichever head of whichever layer has them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from headkv import _checks
from headkv._brief import brief
from headkv.allocators import AdaptiveAllocator, Allocator, ProfileAllocator, UniformAllocator
from headkv.methods.scored import Scored, ScoredMethod
from headkv.scorers import PromptScorer
from headkv.scorers.kvzip import KVzipScorer

if TYPE_CHECKING:
    from headkv.heads import HeadProfile


@dataclass(frozen=True, eq=False)
class KVzip(Scored):
    """KVzip, arXiv 2505.23416: the highest scores of all layers and heads, where a score says what repeating needs.

    The text is read again once the prompt is in the cache, so that nothing has to be known of the questions to come.
    Published code keeps what lies strictly above a threshold: with ties fewer than it says, or nothing. Here the total
    is exact, and of equal scores the earlier position wins.

    With a `profile` the safeguard's part of the budget is split by its scores: what repeating the text does not tell of
    a head, having measured it does. Not in the paper.

    Attributes:
        budget: entries a KV head on average (int), or the share of the prompt (float in (0, 1]); window and sinks are
            included.
        scorer: reads the text again.
        safeguard: share of the budget that does not follow the scores, in [0, 1]; published: 0. 0.6 goes well with a
            profile.
        scope: "model", as published: all rows of all layers compete; or "layer".
        profile: splits that share, any kind whose scores are at least 0; None: every head gets the same of it.
        beta: of the profile's split, at least 1: a share of 1 / beta of it follows the scores.
    """

    budget: int | float
    scorer: PromptScorer = KVzipScorer()
    safeguard: float = 0.0
    scope: str = "model"
    profile: HeadProfile | None = None
    beta: float = 1.1

    __repr__ = brief

    def __post_init__(self) -> None:
        if self.profile is not None:
            _checks.has("profile", self.profile, "scores", "kv_scores")
            if self.safeguard == 0:
                raise ValueError("safeguard must be above 0 with a profile, which splits that share, got 0")
        super().__post_init__()

    @property
    def profiles(self) -> tuple[HeadProfile, ...]:
        """The profile, to be checked against a model."""
        return () if self.profile is None else (self.profile,)

    @cached_property
    def composed(self) -> ScoredMethod:
        """The scorer, and as many entries a head as its scores say."""
        base: Allocator = UniformAllocator()
        if self.profile is not None:
            base = ProfileAllocator(self.profile.scores, self.beta, reduce="max")
        return ScoredMethod(self.budget, self.scorer, AdaptiveAllocator(self.safeguard, base), self.scope)
