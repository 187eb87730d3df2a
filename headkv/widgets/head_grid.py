"""The grid alone: one cell a KV head, layers downward, heads across."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import traitlets as t

from headkv.widgets import checks
from headkv.widgets.base import Picture, bundle

MAX_KINDS = 6


class HeadGrid(Picture):
    """Any number or kind that a head has, one cell a head; choosing a cell sets `selected`.

    Args:
        values: `[layers, heads]`: numbers (scores, budgets), or words (kinds, at most six different ones).
        kinds: the words in the order in which they get their signs; default: as they first appear.
        label: what is measured, shown above the grid.
        head_names: one name a head.
        selected: the chosen (layer, head).
        title: a line above the picture.

    Attributes:
        selected: `[layer, head]`, kept in step with the page.
        kinds: the different words; empty for numbers.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example:
        >>> HeadGrid([["full", "streaming"], ["streaming", "streaming"]])
        HeadGrid: 2 layers of 2 heads; full: 1, streaming: 3.
    """

    _esm = bundle("head_grid.js")

    _shape = t.List(t.Int()).tag(sync=True)
    values = t.List(t.List()).tag(sync=True)
    kinds = t.List(t.Unicode()).tag(sync=True)
    label = t.Unicode().tag(sync=True)
    head_names = t.List(t.Unicode()).tag(sync=True)
    selected = t.List(t.Int()).tag(sync=True)
    title = t.Unicode().tag(sync=True)

    def __init__(
        self,
        values: Any,
        *,
        kinds: Sequence[str] | None = None,
        label: str | None = None,
        head_names: Sequence[str] | None = None,
        selected: tuple[int, int] = (0, 0),
        title: str | None = None,
    ) -> None:
        words, numbers = _kinds(values, kinds)
        shape = (numbers.shape[0], numbers.shape[1])
        rounded: list[list[Any]] = [[float(f"{x:.6g}") for x in row] for row in numbers]
        if words or np.array_equal(numbers, np.rint(numbers)):
            rounded = numbers.astype(int).tolist()
        super().__init__(
            _shape=list(shape),
            values=rounded,
            kinds=words,
            label=label or "",
            head_names=checks.strings("head_names", head_names, shape[1]),
            selected=checks.pair("selected", selected, shape),
            title=title or "",
        )

    def describe(self) -> str:
        layers, heads = self._shape
        flat = [x for row in self.values for x in row]
        if self.kinds:
            said = ", ".join(f"{kind}: {flat.count(i)}" for i, kind in enumerate(self.kinds))
        else:
            best = max(range(len(flat)), key=flat.__getitem__)
            where = f"layer {best // heads}, head {best % heads}"
            said = f"from {min(flat):g} to {flat[best]:g}, highest at {where}"
        return f"HeadGrid: {layers} {'layer' if layers == 1 else 'layers'} of {heads} heads; {said}."


def _kinds(values: Any, order: Sequence[str] | None) -> tuple[list[str], np.ndarray]:
    """Words become their numbers and a list of the words; numbers stay."""
    if hasattr(values, "detach"):
        return [], checks.array("values", values, ndim=(2,))
    words = np.asarray(values)
    if words.dtype.kind != "U":
        return [], checks.array("values", values, ndim=(2,))
    if words.ndim != 2 or 0 in words.shape:
        raise ValueError(f"values must have 2 dimensions and not be empty, got shape {words.shape}")
    found = dict.fromkeys(words.ravel().tolist())
    kinds = list(found if order is None else order)
    if missing := [kind for kind in found if kind not in kinds]:
        raise ValueError(f"kinds must name every kind in values, got {kinds} without {missing[0]!r}")
    if len(kinds) > MAX_KINDS:
        raise ValueError(f"values must hold at most {MAX_KINDS} different kinds, got {len(kinds)}")
    return kinds, np.vectorize(kinds.index)(words)
