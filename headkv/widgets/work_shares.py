"""Who works and who waits: one program a row against equal shares of all entries, on so many multiprocessors."""

from __future__ import annotations

from collections.abc import Sequence

import traitlets as t

from headkv.widgets import checks
from headkv.widgets.base import Picture, bundle

UNIT = 4  # shares are whole units of entries, as in `headkv_kernels.shares`


def equal_shares(lengths: Sequence[int], programs: int, gap: int = 0) -> list[list[tuple[int, int, int]]]:
    """For each program the segments (row, begin, end) that it serves, as the Triton kernel cuts them.

    `gap` entries that nobody has to read lie between two rows (`headkv_kernels.DecodeConfig.gap`).

    >>> equal_shares([12, 4, 16], programs=4)
    [[(0, 0, 8)], [(0, 8, 12), (1, 0, 4)], [(2, 0, 8)], [(2, 8, 16)]]
    >>> equal_shares([12, 4, 16], programs=4, gap=4)
    [[(0, 0, 12)], [(1, 0, 4)], [(2, 0, 12)], [(2, 12, 16)]]
    """
    units = [max(1, -(-length // UNIT)) for length in lengths]
    between = gap // UNIT
    share = -(-(sum(units) + between * (len(units) - 1)) // programs)
    served: list[list[tuple[int, int, int]]] = [[] for _ in range(programs)]
    first = 0
    for row, (length, own) in enumerate(zip(lengths, units, strict=True)):
        for program in range(first // share, -(-(first + own) // share)):
            begin = max(program * share, first) - first
            end = min((program + 1) * share, first + own) - first
            served[program].append((row, begin * UNIT, min(end * UNIT, length)))
        first += own + between
    return served


class WorkShares(Picture):
    """Multiprocessors over time, twice: each row served by one program, and all rows cut into equal shares.

    Time is counted in entries read: every multiprocessor reads equally fast, and nothing else takes time,
    which is why there is no gap between rows here.

    Args:
        lengths: entries of each row, at least 1.
        multiprocessors: that there are, 4 to 132 on the slider.
        skew: 1 for the lengths as given, 0 for equal ones, anything between.
        title: a line above the picture.

    Attributes:
        state: the lengths drawn, each program's segments, and when the slowest one ends, both ways.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example:
        >>> WorkShares([12, 4, 16], multiprocessors=4)
        WorkShares: 3 rows of 12, 4, 16 entries on 4 multiprocessors. One program a row ends after 16 entries, equal shares after 8, 2.0 times sooner.
    """  # noqa: E501 (one line is what it prints)

    _esm = bundle("work_shares.js")

    lengths = t.List(t.Int()).tag(sync=True)
    multiprocessors = t.Int().tag(sync=True)
    skew = t.Float().tag(sync=True)
    title = t.Unicode().tag(sync=True)
    state = t.Dict().tag(sync=True)

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        multiprocessors: int = 132,
        skew: float = 1.0,
        title: str | None = None,
    ) -> None:
        super().__init__(
            lengths=checks.lengths(lengths, 64),
            multiprocessors=checks.whole("multiprocessors", multiprocessors, 4, 132),
            skew=checks.share("skew", skew),
            title=title or "",
        )

    def describe(self) -> str:
        slowest = max(sum(end - begin for _, begin, end in own) for own in self.shares)
        waited = max(self.by_row)
        return (
            f"WorkShares: {len(self.lengths)} rows of {', '.join(f'{n:,}' for n in self.lengths)} entries on "
            f"{self.multiprocessors} multiprocessors. One program a row ends after {waited:,} entries, equal shares "
            f"after {slowest:,}, {waited / slowest:.1f} times sooner."
        )

    @property
    def shares(self) -> list[list[tuple[int, int, int]]]:
        """`equal_shares` of the lengths as given."""
        return equal_shares(self.lengths, self.multiprocessors)

    @property
    def by_row(self) -> list[int]:
        """Entries that each multiprocessor reads if it serves whole rows, and whoever is free takes the next."""
        busy = [0] * self.multiprocessors
        for length in self.lengths:
            busy[busy.index(min(busy))] += length
        return busy
