"""The budgets that you say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from headkv import _checks
from headkv._brief import brief


@dataclass(frozen=True)
class FixedAllocator:
    """Given budgets, the window not counted, whatever the scores and the method's own budget say.

    A method's budget still decides whether anything is evicted: one that reaches the whole prompt keeps all.

    Attributes:
        budgets: one int a KV head for every layer alike, or such a list a layer; more than m counts as m.

    >>> fixed = FixedAllocator([[5, 1], [2, 9]])
    >>> fixed.allocate(torch.zeros(2, 6), 3, layer_idx=1, num_layers=2).tolist()
    [2, 6]
    """

    budgets: Sequence[int] | Sequence[Sequence[int]]
    needs_scores: ClassVar[bool] = False

    __repr__ = brief

    def __post_init__(self) -> None:
        given: Any = self.budgets.tolist() if isinstance(self.budgets, Tensor) else list(self.budgets)
        rows = given if given and isinstance(given[0], Sequence) else [given]
        if not rows[0] or any(len(row) != len(rows[0]) for row in rows):
            raise ValueError(
                f"budgets must hold an int a KV head, as many in every layer, got {self.budgets!r}"
            )
        for value in (value for row in rows for value in row):
            _checks.whole("budgets", value)
        object.__setattr__(self, "budgets", tuple(map(tuple, rows)))

    def allocate(self, scores: Tensor, budget: int, *, layer_idx: int, num_layers: int) -> Tensor:
        """Budgets `[H]` of one layer for scores `[H, m]`.

        Raises:
            ValueError: given for another number of layers or heads.
        """
        given = torch.tensor(self.budgets, dtype=torch.int64, device="cpu")
        heads, m = scores.shape
        if given.shape[1] != heads or given.shape[0] not in (1, num_layers):
            allowed = f"[{heads}] or [{num_layers}, {heads}]"
            raise ValueError(f"budgets must have shape {allowed} for this model, got {list(given.shape)}")
        return given[layer_idx if len(given) > 1 else 0].clamp(max=m)
