"""Rows as a table of plain text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence


def table(rows: Sequence[Mapping[str, str | float]], words: Collection[str] = ()) -> str:
    """Rows of equal columns under their names: the columns named in `words` to the left, the others to the right.

    Raises:
        ValueError: there is no row, or a row has other columns than the first.

    Example:
        >>> print(table([{"method": "AdaKV", "stored": "20.0%"}, {"method": "none", "stored": "100.0%"}], ["method"]))
        method  stored
        ──────  ──────
        AdaKV    20.0%
        none    100.0%
    """
    if not rows:
        raise ValueError("rows must hold at least one row, got none")
    names = list(rows[0])
    for row in rows:
        if list(row) != names:
            raise ValueError(f"rows must have the columns {names}, got {list(row)}")
    cells = [[str(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    rule = ["─" * width for width in widths]

    def line(texts: Sequence[str]) -> str:
        columns = zip(names, texts, widths, strict=True)
        aligned = (text.ljust(width) if name in words else text.rjust(width) for name, text, width in columns)
        return "  ".join(aligned).rstrip()

    return "\n".join(map(line, [names, rule, *cells]))
