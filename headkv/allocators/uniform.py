"""Every row gets the same (SnapKV and most others)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class UniformAllocator:
    """`budget` entries a KV head, the same in every layer: what SnapKV does (arXiv 2404.14469).

    >>> UniformAllocator().allocate(torch.zeros(2, 6), 3, layer_idx=0, num_layers=1).tolist()
    [3, 3]
    """

    needs_scores: ClassVar[bool] = False

    def allocate(self, scores: Tensor, budget: int, *, layer_idx: int, num_layers: int) -> Tensor:
        """Budgets `[H]` of one layer for scores `[H, m]`: see `Allocator.allocate`."""
        heads, m = scores.shape
        return torch.full((heads,), min(budget, m), dtype=torch.int64, device="cpu")
