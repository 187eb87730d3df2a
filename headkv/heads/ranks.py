"""Which heads lie on which rank of a tensor parallel model, and how even that makes what ranks store."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headkv import _checks
from headkv._table import table


@dataclass(frozen=True, eq=False, repr=False)
class RankLoads:
    """What each rank stores, and reads in a decode step: entries, bytes, or the scores of a profile.

    Attributes:
        layers: `[L, ranks]` float64, of each layer.
    """

    layers: Tensor

    @classmethod
    def of(cls, loads: Tensor, ranks: int, order: Tensor | None = None) -> RankLoads:
        """Of heads `[L, H]`: each rank has an equal run of every layer's heads, as they stand or in `order`.

        Raises:
            ValueError: heads that can not be shared out evenly.

        >>> loads = torch.tensor([[9.0, 7.0, 1.0, 1.0]])
        >>> RankLoads.of(loads, 2).totals.tolist(), RankLoads.of(loads, 2, balanced_order(loads, 2)).totals.tolist()
        ([16.0, 2.0], [10.0, 8.0])
        """
        _check(loads, ranks)
        standing = loads.double().cpu()
        if order is not None:
            standing = standing.gather(1, order)
        return cls(standing.unflatten(1, (ranks, -1)).sum(-1))

    @property
    def totals(self) -> Tensor:
        """Of all layers, `[ranks]`."""
        return self.layers.sum(0)

    @property
    def uneven(self) -> float:
        """The fullest rank over the mean: 1 is even. By so much more memory has to be there."""
        return float(self.totals.max() / self.totals.mean())

    @property
    def waits(self) -> float:
        """The sum over layers of the fullest rank's load, over that of the mean: ranks wait for it in every layer."""
        return float(self.layers.amax(1).sum() / self.layers.mean(1).sum())

    def __repr__(self) -> str:
        return f"RankLoads({self.layers.shape[1]} ranks, uneven {self.uneven:.3f}, waits {self.waits:.3f})"

    def __str__(self) -> str:
        mean = float(self.totals.mean())
        rows = [
            {"rank": i, "load": round(x, 1), "of the mean": f"{x / mean:.3f}"}
            for i, x in enumerate(self.totals.tolist())
        ]
        return f"{table(rows, ['of the mean'])}\n{self!r}"


def balanced_order(loads: Tensor, ranks: int) -> Tensor:
    """An order of each layer's heads by which equal runs of them are as even as can be.

    In every layer the heaviest head that is left goes to the rank that has least of that layer and still has room; then
    heads change places while that lowers the layer's fullest rank. What is left uneven evens out over layers, from the
    most uneven on: the lightest part goes to the rank with the most so far.

    Args:
        loads: `[L, H]`, at least 0: what each KV head is expected to store, e.g. `method.explain(...).budgets`, the
            `cache.lengths()` of some prompts, or a profile's scores.
        ranks: a divisor of H.

    Returns:
        `[L, H]` int64: at place i of layer l stands head `order[l, i]`; rank r has places r * H / ranks and up.

    Raises:
        ValueError: loads below 0, or heads that can not be shared out evenly.

    >>> balanced_order(torch.tensor([[9.0, 7.0, 1.0, 1.0], [9.0, 7.0, 1.0, 1.0]]), 2).tolist()
    [[0, 3, 1, 2], [1, 2, 0, 3]]
    """
    _check(loads, ranks)
    weighed = []  # by layer: the parts, lightest first, and what they weigh
    for layer in loads.double().tolist():
        parts = sorted((sum(layer[h] for h in part), sorted(part)) for part in _parts(layer, ranks))
        weighed.append(parts)
    totals, order = [0.0] * ranks, torch.empty(loads.shape, dtype=torch.int64, device="cpu")
    # Large differences first, so that small ones are left to even them out.
    for i in sorted(range(len(weighed)), key=lambda i: weighed[i][-1][0] - weighed[i][0][0], reverse=True):
        fullest_first = sorted(range(ranks), key=lambda rank: (totals[rank], rank), reverse=True)
        places: list[list[int]] = [[] for _ in range(ranks)]
        for rank, (weight, part) in zip(fullest_first, weighed[i], strict=True):
            places[rank] = part
            totals[rank] += weight
        order[i] = torch.tensor([head for part in places for head in part])
    return order


def _parts(layer: list[float], ranks: int) -> list[list[int]]:
    """The heads of one layer in `ranks` parts of equal number, as even as swaps of two heads make them."""
    room = len(layer) // ranks
    parts: list[list[int]] = [[] for _ in range(ranks)]

    def load(part: list[int]) -> float:
        return sum(layer[h] for h in part)

    for head in sorted(range(len(layer)), key=layer.__getitem__, reverse=True):
        min((part for part in parts if len(part) < room), key=load).append(head)
    while True:
        fullest = max(parts, key=load)
        swaps = [
            (max(load(fullest) - layer[a] + layer[b], load(part) + layer[a] - layer[b]), a, b, part)
            for part in parts
            if part is not fullest
            for a in fullest
            for b in part
        ]
        least = min(swaps, key=lambda swap: swap[0], default=None)
        if least is None or least[0] >= load(fullest) * (1 - 1e-12):
            return parts
        _, a, b, part = least
        fullest[fullest.index(a)], part[part.index(b)] = b, a


def _check(loads: Tensor, ranks: int) -> None:
    _checks.whole("ranks", ranks, 1)
    if loads.ndim != 2 or loads.numel() == 0 or bool((loads < 0).any()):
        raise ValueError(f"loads must be [L, H] and at least 0, got {list(loads.shape)}")
    if loads.shape[1] % ranks:
        raise ValueError(f"ranks must be a divisor of the {loads.shape[1]} KV heads, got {ranks}")
