"""What an allocator is: how many entries each row of a layer may keep."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Allocator(Protocol):
    """Splits a budget among the KV heads of a layer, or of all layers.

    One whose budgets follow from shapes alone may say so by `needs_scores = False`: then `explain` knows them before
    any prompt.
    """

    def allocate(self, scores: Tensor, budget: int, *, layer_idx: int, num_layers: int) -> Tensor:
        """Budgets of one layer.

        Args:
            scores: `[H, m]` float32, finite, of the entries that compete (those before the observation
                window).
            budget: entries a KV head on average, the window not counted; more than m counts as m.
            layer_idx: this layer, from 0.
            num_layers: layers of the model.

        Returns:
            `[H]` int64, each in `[0, m]`, best on the CPU: what is elsewhere is fetched. The sum is exactly
            `H * min(budget, m)`, over this layer or, for an allocator that weighs layers, over all of them.
        """
