"""The worst that an entry was ever needed for, not the mean (DefensiveKV)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from headkv import _checks
from headkv.prefill import Prefill
from headkv.scorers.attention import attention_weights
from headkv.scorers.output import output_norms


@dataclass(frozen=True)
class DefensiveScorer:
    """The greatest weight that any observing query gives, times the value's norm: DefensiveKV, arXiv 2510.13334.

    The observation window's weights are pooled so that a query's total stays, reduced by their maximum over window and
    group, and never lie below their mean over the prompt. Norms are those behind the output projection, as shares of
    all heads at a position. The entries that hold the first `mass` of a head's mean attention come before all others,
    at most as many as a head's even share of the budget.

    Published code measures the window's own mass among entries that are not the window's; here it is the window's.

    Attributes:
        window: last queries that observe; their entries are always kept and do not compete.
        kernel_size: odd; neighbours whose weights are averaged.
        mass: in [0, 1]; 0 puts none first.
        most: entries of a head that may come first; set by the method from its budget.
    """

    window: int = 32
    kernel_size: int = 5
    mass: float = 0.9
    most: int = 0

    def __post_init__(self) -> None:
        _checks.whole("window", self.window, 1)
        _checks.whole("kernel_size", self.kernel_size, 1)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, else pooling shifts, got {self.kernel_size}")
        _checks.between("mass", self.mass, 0, 1)
        _checks.whole("most", self.most)

    def for_budget(self, budget: int) -> DefensiveScorer:
        """The same for `budget` entries a KV head, the window not counted."""
        return replace(self, most=budget)

    @property
    def observed_queries(self) -> int:
        """The observation window's queries."""
        return self.window

    def score(self, prefill: Prefill) -> Tensor:
        """Scores `[H, n - window]` float32.

        Raises:
            ValueError: fewer queries than the window, or a model whose output projection is not known.
        """
        heads, n, dim = prefill.keys.shape
        w = min(self.window, n)
        if prefill.queries.shape[1] < w:
            got = prefill.queries.shape[1]
            raise ValueError(f"queries must hold the last {w} tokens for {type(self).__name__}, got {got}")
        norms = output_norms(prefill, type(self).__name__)[:, : n - w]
        if w == n:
            return norms
        queries = prefill.queries[:, -w:].reshape(heads, -1, w, dim)
        shares = norms / norms.sum(0).clamp(min=torch.finfo(norms.dtype).tiny)
        worst, mean = torch.empty_like(norms), torch.empty_like(norms)
        for h in range(heads):
            rule = prefill.rule.of_heads([h], heads)
            weights = attention_weights(queries[h : h + 1], prefill.keys[h : h + 1], n - w, rule)[0]
            before = weights[..., : n - w]  # [G, w, n - w]
            worst[h], mean[h] = self.pool(before).amax((0, 1)), before.mean((0, 1))
        scores = torch.maximum(worst, worst.mean(1, keepdim=True)) * shares
        return torch.where(self._first(mean), scores.max(), scores)

    def pool(self, weights: Tensor) -> Tensor:
        """Average neighbours of weights `[..., m]`; the sum of every row stays."""
        pooled = functional.avg_pool1d(
            weights.flatten(0, -2), self.kernel_size, stride=1, padding=self.kernel_size // 2
        ).view_as(weights)
        tiny = torch.finfo(weights.dtype).tiny
        return pooled * (weights.sum(-1, keepdim=True) / pooled.sum(-1, keepdim=True).clamp(min=tiny))

    def _first(self, mean: Tensor) -> Tensor:
        """The entries that hold the first `mass` of each head's attention, the window's mass counted: `[H, m]` bool."""
        ranked = mean.sort(dim=1, descending=True, stable=True)
        # What a head looks at in the window is mass that it holds already.
        covered = ranked.values.cumsum(1) + (1 - mean.sum(1, keepdim=True))
        rank = torch.arange(mean.shape[1], device=mean.device)
        first = (covered < self.mass) & (rank < self.most)
        return torch.zeros_like(first).scatter(1, ranked.indices, first)
