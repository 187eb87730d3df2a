"""Choose a set of heads by what it is worth as a whole: heads that stand in for one another are seen only so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Head = tuple[int, int]  # (layer, KV head)
Value = Callable[
    [Tensor], Tensor
]  # gates [C, layers, H] -> what each configuration is worth, [C]; more is better


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


def swap_heads(
    value: Value, shape: tuple[int, int], candidates: Sequence[Head], chosen: Sequence[Head], rounds: int
) -> Iterator[tuple[list[Head], float]]:
    """Exchange heads while the set's worth rises: in turn the one that is missed least goes, and the best one comes.

    Each round yields the set and its worth. A round in which the same head comes back tries the next one; the end is
    when none of them can be bettered.
    """
    held = list(chosen)
    now = float(value(gates_of([held], shape))[0])
    tried = 0
    for _ in range(rounds):
        without = value(gates_of([[h for h in held if h != out] for out in held], shape))
        out = held[int(without.argsort(descending=True)[tried])]
        kept = [head for head in held if head != out]
        rest = [head for head in candidates if head not in held]
        worth = value(gates_of([[*kept, head] for head in rest], shape))
        best = int(worth.argmax())
        if float(worth[best]) > now:
            held, now, tried = [*kept, rest[best]], float(worth[best]), 0
        else:
            tried += 1
        yield held, now
        if tried == len(held):
            return


def drop_heads(
    value: Value, shape: tuple[int, int], candidates: Sequence[Head], count: int, share: float = 0.1
) -> Iterator[tuple[list[Head], float]]:
    """Drop the heads missed least, a `share` of them at a time, until `count` are left: each set and its worth."""
    held = list(candidates)
    while len(held) > count:
        without = value(gates_of([[h for h in held if h != out] for out in held], shape))
        fewer = max(count, min(len(held) - 1, round(len(held) * (1 - share))))
        gone = set(without.argsort(descending=True)[: len(held) - fewer].tolist())
        held = [head for index, head in enumerate(held) if index not in gone]
        yield held, float(without.max())
