"""Heads that were found to matter get more, before any prompt is seen (HeadKV)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from headkv import _checks
from headkv._brief import brief
from headkv.allocators.rounding import largest_remainder, water_fill


@dataclass(frozen=True, eq=False)
class ProfileAllocator:
    """HeadKV, arXiv 2410.19258, section 3.2: heads give to one pool over all layers and draw by their score.

    With `pooled = floor(budget / beta)`, every head keeps `budget - pooled` and the pool of `pooled * L *
    H` is split by `score ** temperature`. What a head would get beyond the m entries that compete goes back
    to the others by their scores (water-filling): published code let a slice cut it off, and stored less
    than it said.

    Attributes:
        scores: `[L, H]`, or of query heads `[L, HQ]`; finite, at least 0, not all 0.
        beta: at least 1. 1 pools everything, infinity nothing (uniform).
        temperature: above 1 sharpens the scores, below 1 flattens them.
        reduce: query heads of a group to one: "sum", "max" or "mean".

    By hand, 4 heads with scores .7 .1 .2 0, 8 entries a head, beta 2: pooled 4, so the pool is 16 and every
    head keeps 4: 15.2, 5.6, 7.2, 4, rounded 15, 6, 7, 4. If only 10 entries compete, 5.2 go back, by scores
    1 to 2: 10, 7.33, 10.67, 4, and 0.67 more: 10, 8, 10, 4.

    >>> allocator = ProfileAllocator(torch.tensor([[.7, .1, .2, 0.]]), beta=2)
    >>> allocator.allocate(torch.zeros(4, 100), 8, layer_idx=0, num_layers=1).tolist()
    [15, 6, 7, 4]
    >>> allocator.allocate(torch.zeros(4, 10), 8, layer_idx=0, num_layers=1).tolist()
    [10, 8, 10, 4]
    """

    scores: Tensor
    beta: float = 1.5
    temperature: float = 1.0
    reduce: str = "sum"
    needs_scores: ClassVar[bool] = False

    __repr__ = brief

    def __post_init__(self) -> None:
        _checks.between("beta", self.beta, 1)
        _checks.between("temperature", self.temperature, 0)
        _checks.one_of("reduce", self.reduce, ("sum", "max", "mean"))
        if not isinstance(self.scores, Tensor) or self.scores.ndim != 2 or 0 in self.scores.shape:
            raise ValueError(f"scores must be a tensor [L, H], got {self.scores!r}")
        low, high = float(self.scores.min()), float(self.scores.max())
        if not 0 <= low <= high < math.inf:
            raise ValueError(f"scores of a head profile must be finite and at least 0, got {low} to {high}")
        if high == 0:
            raise ValueError("scores of a head profile must not all be 0: nothing to split a budget by")

    def allocate(self, scores: Tensor, budget: int, *, layer_idx: int, num_layers: int) -> Tensor:
        """Budgets `[H]` of one layer for scores `[H, m]`: see `Allocator.allocate`.

        Raises:
            ValueError: a profile of another number of layers or heads.
        """
        heads, m = scores.shape
        layers = self.scores.shape[0]
        if num_layers == 1 < layers and heads % layers == 0:  # the rows of all layers, to share one budget
            return self.budgets(budget, m, heads // layers).flatten()
        if self.scores.shape[0] != num_layers or self.scores.shape[1] % heads:
            raise ValueError(
                f"scores of the head profile must have shape [{num_layers}, {heads}] for this model, "
                f"got {list(self.scores.shape)}"
            )
        return self.budgets(budget, m, heads)[layer_idx]

    def budgets(self, budget: int, m: int, num_kv_heads: int | None = None) -> Tensor:
        """Entries of every head where m compete, `[L, H]` int64, with the sum `L * H * min(budget, m)`.

        Args:
            budget: entries a KV head on average.
            m: entries of each head that compete.
            num_kv_heads: H; default: one a score.
        """
        key = (budget, m, num_kv_heads or self.scores.shape[1])
        known = self._known.get(key)
        if known is None:  # the next layer of the same prompt will ask for the same
            known = self._split(*key)
            self._known.clear()
            self._known[key] = known
        return known.clone()

    @cached_property
    def _known(self) -> dict[tuple[int, int, int], Tensor]:
        return {}

    def _split(self, budget: int, m: int, heads: int) -> Tensor:
        average = min(budget, m)
        pooled = math.floor(average / self.beta)
        grouped = self.scores.detach().double().cpu().unflatten(1, (heads, -1))  # [L, H, G]
        scores = grouped.amax(-1) if self.reduce == "max" else getattr(grouped, self.reduce)(-1)
        weights = scores.flatten()
        weights = (weights / weights.max()) ** self.temperature  # the largest stays 1: no underflow of all
        total = weights.numel()
        targets = weights / weights.sum() * (pooled * total) + (average - pooled)
        caps = torch.full((total,), m, device="cpu")
        filled = water_fill(targets, weights, caps)
        return largest_remainder(filled, total * average, caps).view(scores.shape)
