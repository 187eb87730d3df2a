"""CriticalKV: half by what was looked at, half by what it would change in the layer's output."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from headkv import _checks
from headkv.allocators import AdaptiveAllocator, UniformAllocator
from headkv.methods.base import Keep
from headkv.methods.scored import Scored, ScoredMethod
from headkv.methods.selection import plan_by_scores
from headkv.prefill import Prefill
from headkv.scorers import Scorer, SnapKVScorer
from headkv.scorers.output import output_norms


@dataclass(frozen=True)
class CriticalKV(Scored):
    """CriticalKV and CriticalAdaKV, arXiv 2502.03805: a second look at which entries fill a head's budget.

    The first `first_share` of a head's budget goes to its highest scores. The rest goes to the highest
    `(score + epsilon) * norm`, with the norm of the value behind the output projection. How much each head gets, the
    scores alone say.

    Attributes:
        budget: entries a KV head on average (int), or the share of the prompt (float in (0, 1]); the window is
            included.
        scorer: of attention; without value norms of its own.
        adaptive: True is CriticalAdaKV: budgets by `AdaKV`. False: equal ones.
        safeguard: of `AdaKV`.
        first_share: in [0, 1]; 1 leaves norms out.
        epsilon: at least 0.
    """

    budget: int | float
    scorer: Scorer = SnapKVScorer()
    adaptive: bool = False
    safeguard: float = 0.2
    first_share: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        _checks.flag("adaptive", self.adaptive)
        _checks.between("first_share", self.first_share, 0, 1)
        _checks.between("epsilon", self.epsilon, 0)
        AdaptiveAllocator(self.safeguard)
        super().__post_init__()

    @cached_property
    def composed(self) -> ScoredMethod:
        """The scorer and the budgets, without the second look."""
        allocator = AdaptiveAllocator(self.safeguard) if self.adaptive else UniformAllocator()
        return ScoredMethod(self.budget, self.scorer, allocator)

    def plan(self, prefill: Prefill) -> Keep:
        """Keep the best entries by scores, then the best by scores and norms."""

        def look_again(scores: Tensor, budgets: Tensor) -> Tensor:
            norms = output_norms(prefill, type(self).__name__)[:, : scores.shape[1]]
            return self.second_look(scores, norms, budgets)

        return plan_by_scores(prefill, self.scorer, self.composed.allocator, self.budget, look_again)

    def second_look(self, scores: Tensor, norms: Tensor, budgets: Tensor) -> Tensor:
        """Scores `[H, m]` whose best `budgets[h]` are what the method keeps.

        By hand, two slots: the first goes to .5; of the others .3001, .6004 and .1002 the second is the highest.

        >>> scores, norms = torch.tensor([[0.5, 0.3, 0.15, 0.05]]), torch.tensor([[1.0, 1.0, 4.0, 2.0]])
        >>> CriticalKV(2).second_look(scores, norms, torch.tensor([2])).argsort(descending=True)[0, :2].tolist()
        [0, 2]
        """
        again = (scores.float() + self.epsilon) * norms
        rank = scores.float().sort(dim=1, descending=True, stable=True).indices.argsort(1)
        fixed = (budgets * self.first_share).long().clamp(min=1).to(scores.device)
        return torch.where(rank < fixed[:, None], again.max() + 1, again)
