"""Choose a set of heads by what it is worth as a whole: heads that stand in for one another are seen only so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Head = tuple[int, int]  # (layer, KV head)
# Gates [C, layers, H] -> what each configuration is worth, [C]; more is better.
Value = Callable[[Tensor], Tensor]


def gates_of(heads: Sequence[Sequence[Head]], shape: tuple[int, int]) -> Tensor:
    """Gates [C, layers, H] of C sets of heads: 1 for those in the set, 0 for the others.

    >>> gates_of([[(0, 1)], []], (1, 2)).tolist()
    [[[0.0, 1.0]], [[0.0, 0.0]]]
    """
    gates = torch.zeros(len(heads), *shape)
    for row, chosen in zip(gates, heads, strict=True):
        for layer, head in chosen:
            row[layer, head] = 1
    return gates


def add_heads(
    value: Value, shape: tuple[int, int], candidates: Sequence[Head], count: int, chosen: Sequence[Head] = ()
) -> Iterator[tuple[Head, float]]:
    """Add the head that makes the set worth most, until it holds `count`: each head, and the set's worth with it."""
    held = list(chosen)
    while len(held) < count:
        rest = [head for head in candidates if head not in held]
        worth = value(gates_of([[*held, head] for head in rest], shape))
        best = int(worth.argmax())
        held.append(rest[best])
        yield rest[best], float(worth[best])
