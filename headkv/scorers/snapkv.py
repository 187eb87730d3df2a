"""What the last queries of the prompt looked at (SnapKV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from headkv import _checks
from headkv.logits import Rule
from headkv.prefill import Prefill
from headkv.scorers.attention import REDUCTIONS, attention_weights, reduce_group

BLOCK = 1 << 24  # weights held at a time: 64 MiB


@dataclass(frozen=True)
class SnapKVScorer:
    """Attention that the observation window pays to each earlier entry, pooled: SnapKV, arXiv 2404.14469.

    Mean over the window's queries, then reduced over the group, then pooled along the positions, all in
    float32. The softmax runs over all keys, the window's too, and is not normalised again without them: a
    head that looks mostly at the window, or at its sink, has little left, so that Ada-KV gives it little.
    With max pooling the order matters; published programs differ in it.

    Attributes:
        window: last queries that observe; their entries are always kept and do not compete.
        kernel_size: odd; neighbours that share their highest (or average) score, so that words stay whole.
        pooling: "max" (Ada-KV, HeadKV) or "avg" (SnapKV's first release).
        reduce: query heads of a group to one: "mean", "max" or "sum".
    """

    window: int = 32
    kernel_size: int = 7
    pooling: str = "max"
    reduce: str = "mean"
    by_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.whole("window", self.window, 1)
        _checks.whole("kernel_size", self.kernel_size, 1)
        if self.kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size must be odd, else pooling shifts and lengthens, got {self.kernel_size}"
            )
        _checks.one_of("pooling", self.pooling, ("max", "avg"))
        _checks.one_of("reduce", self.reduce, REDUCTIONS)

    @property
    def observed_queries(self) -> int:
        """The observation window's queries."""
        return self.window

    def score(self, prefill: Prefill) -> Tensor:
        """Scores `[H, n - window]` float32.

        Raises:
            ValueError: fewer queries than the window.
        """
        heads, n, dim = prefill.keys.shape
        w = min(self.window, n)
        if prefill.queries.shape[1] < w:
            raise ValueError(
                f"queries must hold the last {w} tokens for {self}, got {prefill.queries.shape[1]}"
            )
        if w == n:
            return torch.zeros(heads, 0, device=prefill.keys.device)
        queries = prefill.queries[:, -w:].reshape(heads, -1, w, dim)
        step = max(1, BLOCK // (queries.shape[1] * w * n))  # heads at a time
        some = [range(heads)[h : h + step] for h in range(0, heads, step)]
        parts = [
            self._observe(
                queries[h.start : h.stop], prefill.keys[h.start : h.stop], prefill.rule.of_heads(h, heads)
            )
            for h in some
        ]
        return self.pool(torch.cat(parts))

    def _observe(self, queries: Tensor, keys: Tensor, rule: Rule) -> Tensor:
        """`[H, G, w, D]`, `[H, n, D]` to `[H, n - w]`: mean over the window, reduced over the group."""
        w, n = queries.shape[2], keys.shape[1]
        weights = attention_weights(queries, keys, n - w, rule)
        return reduce_group(weights[..., : n - w].mean(2), self.reduce)

    def pool(self, scores: Tensor) -> Tensor:
        """Pool scores `[H, m]` along the positions; the length stays."""
        if scores.shape[-1] == 0:
            return scores
        pool = functional.max_pool1d if self.pooling == "max" else functional.avg_pool1d
        return pool(scores[None], self.kernel_size, stride=1, padding=self.kernel_size // 2)[0]
