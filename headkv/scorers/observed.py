"""How much attention each entry got from the whole prompt (H2O)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headkv import _checks
from headkv.logits import Rule
from headkv.prefill import ALL, Prefill
from headkv.scorers.attention import REDUCTIONS, attention_weights, reduce_group

BLOCK = 1 << 24  # weights held at a time: 64 MiB


@dataclass(frozen=True)
class ObservedAttentionScorer:
    """Attention accumulated over all queries of the prompt: the heavy hitters of H2O, arXiv 2306.14048.

    One KV head and one block of queries at a time, so that no n x n matrix is ever held.

    Attributes:
        window: last entries that are always kept and do not compete; H2O keeps half of its budget so.
        average: divide by how many queries could see the entry, so that early entries have no head start.
        reduce: query heads of a group to one: "mean", "max" or "sum".
    """

    window: int = 32
    average: bool = False
    reduce: str = "mean"
    by_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.whole("window", self.window)
        _checks.one_of("reduce", self.reduce, REDUCTIONS)

    @property
    def observed_queries(self) -> None:
        """All queries."""
        return ALL

    def score(self, prefill: Prefill) -> Tensor:
        """Scores `[H, n - window]` float32.

        Raises:
            ValueError: not the queries of the whole prompt.
        """
        heads, n, dim = prefill.keys.shape
        if prefill.queries.shape[1] != n:
            raise ValueError(f"queries must hold all {n} tokens for {self}, got {prefill.queries.shape[1]}")
        queries = prefill.queries.reshape(heads, -1, n, dim)
        rules = [prefill.rule.of_heads([h], heads) for h in range(heads)]
        scores = torch.stack(
            [self._accumulate(*row) for row in zip(queries, prefill.keys, rules, strict=True)]
        )
        if self.average:
            reach = n if prefill.sliding_window is None else prefill.sliding_window
            scores = scores / torch.arange(n, 0, -1, device=scores.device).clamp(max=reach)
        return scores[:, : max(0, n - self.window)]

    def _accumulate(self, queries: Tensor, keys: Tensor, rule: Rule) -> Tensor:
        """`[G, n, D]`, `[n, D]` to `[n]`."""
        group, n, _ = queries.shape
        total = torch.zeros(group, n, device=keys.device)
        step = max(1, BLOCK // (group * n))  # queries at a time
        for first in range(0, n, step):
            last = min(first + step, n)
            weights = attention_weights(queries[None, :, first:last], keys[None, :last], first, rule)
            total[:, :last] += weights[0].sum(1)
        return reduce_group(total[None], self.reduce)[0]
