"""A number a head as a small picture in HTML: layers downward, heads across, for notebooks.

Cells have the colour of the text around them, the stronger the more, so that light and dark pages both show them, and
whoever tells no colours apart reads them too. Nothing is fetched and no script runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from torch import Tensor

TITLED = 1024  # cells up to which each says its own number when pointed at
WIDTH, HEIGHT = 14, 260  # of a cell, and of the whole grid at most


def grid_html(values: Tensor, caption: str, *, unit: str, heads: str, low: float | None = None) -> str:
    """A picture of `values` `[layers, heads]`, with `caption` under it and as its text alternative.

    Args:
        values: whole or floating numbers, on any device.
        caption: a sentence.
        unit: what a number is, e.g. "entries".
        heads: what a column is, e.g. "KV head".
        low: what an empty cell means; default: the least value.

    >>> import torch
    >>> html = grid_html(torch.tensor([[2, 4]]), "Two heads.", unit="entries", heads="KV head")
    >>> "<title>layer 0, KV head 1: 4 entries</title>" in html
    True
    """
    rows: list[list[float]] = values.detach().cpu().tolist()
    least, most = min(map(min, rows)), max(map(max, rows))
    low = least if low is None else low
    across, down = len(rows[0]), len(rows)
    height = max(2, min(10, HEIGHT // down))
    width = max(3, min(WIDTH, 640 // across))
    cells = []
    for layer, row in enumerate(rows):
        for head, value in enumerate(row):
            share = (value - low) / (most - low) if most > low else float(value > 0)
            place = f'x="{head * width}" y="{layer * height}" fill-opacity="{0.04 + 0.96 * share:.2f}"'
            if across * down > TITLED:
                cells.append(f"<rect {place}/>")
            else:
                title = f"layer {layer}, {heads} {head}: {value:.4g} {unit}".rstrip()
                cells.append(f"<rect {place}><title>{escape(title)}</title></rect>")
    size = f'width="{across * width}" height="{down * height}"'
    drawn = "".join(cells).replace("<rect ", f'<rect width="{width - 1}" height="{height - 1}" ')
    said = escape(caption)
    return (
        f'<figure style="margin:0.5em 0"><svg role="img" aria-label="{said}" {size} '
        f'fill="currentColor" xmlns="http://www.w3.org/2000/svg"><title>{said}</title>{drawn}</svg>'
        f'<figcaption style="font-size:90%">{said}<br>{escape(_legend(down, heads, unit, low, most))}</figcaption>'
        "</figure>"
    )


def _legend(layers: int, heads: str, unit: str, low: float, high: float) -> str:
    """How the picture is read."""
    return f"{layers} layers downward, {heads}s across; the stronger, the more: {spread([low, high])} {unit}".rstrip()


def spread(values: Sequence[float] | Tensor) -> str:
    """The least and the greatest of some numbers.

    >>> spread([3, 3]), spread([1, 1250])
    ('3', '1 to 1,250')
    """
    flat = values.flatten().tolist() if isinstance(values, Tensor) else list(values)
    ends = min(flat), max(flat)
    least, most = (f"{x:,}" if isinstance(x, int) else _number(x, max(map(abs, ends))) for x in ends)
    return least if least == most else f"{least} to {most}"


def _number(value: float, most: float) -> str:
    """Three digits; 0 for what is nothing beside the largest number."""
    return "0" if abs(value) < most / 1000 else f"{value:.3g}"
