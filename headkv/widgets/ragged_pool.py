"""Unequal rows in one flat pool: append, evict and trim, with the bytes that each moves."""

from __future__ import annotations

from collections.abc import Sequence

import traitlets as t

from headkv.widgets import checks
from headkv.widgets.base import Picture, bundle


class RaggedPool(Picture):
    """A pool of a few entries to play with, moved as `headkv.RaggedLayer` moves its own, one entry at a time.

    Args:
        lengths: entries of each row, at least 1.
        headroom: free slots behind each row when the pool is rewritten, at least 0.
        windows: one (sinks, recent) a row, recent 0 for an ordinary row; None: all ordinary.
        appended: tokens that have been appended when the picture is first seen; what they moved is counted.
        growth: head room on a rewrite, as a share of the mean row, if that is more than `headroom`.
        bytes_per_entry: bytes of one key and one value (512: head dim 64, float32).
        title: a line above the picture.

    Attributes:
        state: lengths, capacities, bytes moved, and what a cache moves that copies itself at every append.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example:
        >>> RaggedPool([3, 1, 4], headroom=2)
        RaggedPool: 3 rows of lengths 3, 1, 4 in one pool of 14 slots, starting at 0, 5, 8 (head room 2).
    """

    _esm = bundle("ragged_pool.js")

    lengths = t.List(t.Int()).tag(sync=True)
    headroom = t.Int().tag(sync=True)
    windows = t.List(t.List(t.Int())).tag(sync=True)
    appended = t.Int().tag(sync=True)
    growth = t.Float().tag(sync=True)
    bytes_per_entry = t.Int().tag(sync=True)
    title = t.Unicode().tag(sync=True)
    state = t.Dict().tag(sync=True)

    def __init__(
        self,
        lengths: Sequence[int] = (3, 1, 4),
        *,
        headroom: int = 2,
        windows: Sequence[tuple[int, int]] | None = None,
        appended: int = 0,
        growth: float = 1 / 16,
        bytes_per_entry: int = 512,
        title: str | None = None,
    ) -> None:
        rows = checks.lengths(lengths, 16, 256)
        if windows is not None and len(windows) != len(lengths):
            raise ValueError(f"windows must hold {len(lengths)} pairs, one a row, got {len(windows)}")
        super().__init__(
            lengths=rows,
            headroom=checks.whole("headroom", headroom, 0, 64),
            windows=[_window(i, pair) for i, pair in enumerate(windows or [(0, 0)] * len(lengths))],
            appended=checks.whole("appended", appended, 0, 64),
            growth=checks.share("growth", growth),
            bytes_per_entry=checks.whole("bytes_per_entry", bytes_per_entry, 1),
            title=title or "",
        )

    def describe(self) -> str:
        capacities = [length + self.headroom for length in self.lengths]
        starts = [sum(capacities[:i]) for i in range(len(capacities))]
        rows = "1 row of length" if len(starts) == 1 else f"{len(starts)} rows of lengths"
        then = f", then {self.appended} appended" if self.appended else ""
        return (
            f"RaggedPool: {rows} {', '.join(map(str, self.lengths))} in one pool of {sum(capacities)} slots, "
            f"starting at {', '.join(map(str, starts))} (head room {self.headroom}){then}."
        )


def _window(row: int, pair: tuple[int, int]) -> list[int]:
    if len(pair) != 2:
        raise ValueError(f"windows[{row}] must be (sinks, recent), got {pair!r}")
    sinks, recent = pair
    return [
        checks.whole(f"windows[{row}] sinks", sinks, 0),
        checks.whole(f"windows[{row}] recent", recent, 0),
    ]
