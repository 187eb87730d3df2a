"""Ranges of entries to underline, with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headkv.widgets import checks


def spans(facts: Sequence[Sequence[Any]] | None, n: int) -> list[list[Any]]:
    """`[start, end, label]` of each fact in n entries, end excluded.

    Raises:
        TypeError, ValueError: one is no range of entries.
    """
    out = []
    for i, fact in enumerate(facts or ()):
        if isinstance(fact, str) or len(fact) not in (2, 3):
            raise TypeError(f"facts[{i}] must be (start, end) or (start, end, label), got {fact!r}")
        start = checks.whole(f"facts[{i}] start", fact[0], 0, n - 1)
        end = checks.whole(f"facts[{i}] end", fact[1], start + 1, n)
        out.append([start, end, str(fact[2]) if len(fact) == 3 else ""])
    return out
