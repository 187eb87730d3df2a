"""Early layers get more than late ones (PyramidKV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headkv import _checks
from headkv.allocators.rounding import largest_remainder


@dataclass(frozen=True)
class PyramidAllocator:
    """Budgets that fall linearly from the first layer to the last: PyramidKV, arXiv 2406.02069.

    The last layer gets `low = budget // beta`, the first `high = 2 * budget - low`. If `high` exceeds the m
    entries that compete it becomes m, and `low = 2 * budget - m`. Heads of a layer are alike. A pure
    function of m and the
    layer: published code computed it once, for the first prompt, and reused it for all later ones.

    Attributes:
        beta: at least 1; 1 is uniform, larger is steeper.

    By hand, 3 layers, 4 entries a head on average, beta 4: low = 1, high = 7, so 7, 4, 1.

    >>> pyramid = PyramidAllocator(beta=4)
    >>> [pyramid.allocate(torch.zeros(2, 9), 4, layer_idx=i, num_layers=3).tolist() for i in range(3)]
    [[7, 7], [4, 4], [1, 1]]
    """

    beta: float = 20
    needs_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _checks.between("beta", self.beta, 1)

    def allocate(self, scores: Tensor, budget: int, *, layer_idx: int, num_layers: int) -> Tensor:
        """Budgets `[H]` of one layer for scores `[H, m]`: see `Allocator.allocate`."""
        heads, m = scores.shape
        layers = self.layers(budget, m, num_layers)
        return torch.full((heads,), int(layers[layer_idx]), dtype=torch.int64, device="cpu")

    def layers(self, budget: int, m: int, num_layers: int) -> Tensor:
        """Entries a head in each layer, `[num_layers]` int64, with the sum `num_layers * min(budget, m)`."""
        average = min(budget, m)
        low = average // self.beta
        high = 2 * average - low
        if high > m:
            low, high = 2 * average - m, m
        step = torch.linspace(high, low, num_layers, dtype=torch.float64, device="cpu")
        if num_layers == 1:
            step = torch.tensor([average], dtype=torch.float64, device="cpu")
        return largest_remainder(step, num_layers * average, torch.full_like(step, m, dtype=torch.int64))
