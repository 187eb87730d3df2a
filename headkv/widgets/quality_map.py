"""Answers against bytes: every method at every budget, by task, length and way to ask, as a sweep has measured them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import traitlets as t

from headkv.widgets import checks
from headkv.widgets.base import Picture, bundle

LISTS = ("models", "questions", "tasks", "lengths", "methods", "budgets")
PLACES = ("model", "question", "task", "length", "method", "budget")
FIGURES = (
    *("bytes", "full_bytes", "entries", "score", "low", "high"),
    *("log_probability", "divergence", "documents"),
)
ALL = "all tasks"


class QualityMap(Picture):
    """Quality against bytes, a line a method; a point opens what it is the mean of.

    Nothing is computed in the page: `found` has the means, their intervals and the bytes that the allocator gave. What
    is picked there takes the other choices along to where it was measured.

    Args:
        found: what `headkv report FILE... --cells` wrote: lists of `models`, `questions`, `tasks`, `lengths`, `methods`
            (the first is the full cache) and `budgets`, and `cells` with the columns that `columns` names; without
            `columns`, as in the example. Log-probability and divergence may be None.
        uniform: methods that give all heads of a layer the same, drawn dotted.
        model, question, task, length, method, budget: what is shown and chosen first, as `found` calls it; default: the
            first of each, "unseen" where that was asked, all tasks together, the last method, its least budget.
        title: a line above the picture.

    Attributes:
        model, question, task, length, method, budget: their places in the lists of `found`, kept in step with the page;
            a task behind the last is all of them together.

    Raises:
        TypeError, ValueError: an argument is not as described, or nothing was measured there; the message names it.

    Example:
        >>> cells = [[0, 0, 0, 0, 0, 1, 900, 900, 1.0, 1.0, 1.0, 1.0, -0.1, 0.0, 8],
        ...          [0, 0, 0, 0, 1, 0, 100, 900, 0.1, 0.75, 0.5, 1.0, -0.4, 0.2, 8]]
        >>> QualityMap({"models": ["tiny"], "questions": ["unseen"], "tasks": ["needle"], "lengths": [64],
        ...             "methods": ["FullCache", "KVzip"], "budgets": [0.1, 1.0], "cells": cells})
        QualityMap: tiny, question unseen, needle, 64 tokens; KVzip at 10% of the entries, 100 bytes: 0.75 right ...
    """

    _esm = bundle("quality_map.js")

    models = t.List(t.Unicode()).tag(sync=True)
    questions = t.List(t.Unicode()).tag(sync=True)
    tasks = t.List(t.Unicode()).tag(sync=True)
    lengths = t.List(t.Int()).tag(sync=True)
    methods = t.List(t.Unicode()).tag(sync=True)
    budgets = t.List(t.Float()).tag(sync=True)
    cells: t.List[Any] = t.List().tag(sync=True)
    uniform = t.List(t.Unicode()).tag(sync=True)
    model = t.Int().tag(sync=True)
    question = t.Int().tag(sync=True)
    task = t.Int().tag(sync=True)
    length = t.Int().tag(sync=True)
    method = t.Int().tag(sync=True)
    budget = t.Int().tag(sync=True)
    title = t.Unicode().tag(sync=True)

    def __init__(
        self,
        found: Mapping[str, Any],
        *,
        uniform: Sequence[str] = (),
        model: str | None = None,
        question: str | None = None,
        task: str | None = None,
        length: int | None = None,
        method: str | None = None,
        budget: float | None = None,
        title: str | None = None,
    ) -> None:
        if missing := [name for name in (*LISTS, "cells") if not found.get(name)]:
            raise ValueError(f"found must have {', '.join((*LISTS, 'cells'))}, got no {missing[0]}")
        lists: dict[str, list[Any]] = {name: list(found[name]) for name in LISTS}
        columns = list(found.get("columns", (*PLACES, *FIGURES)))
        if columns != [*PLACES, *FIGURES]:
            raise ValueError(f"columns must be {', '.join((*PLACES, *FIGURES))}, got {', '.join(columns)}")
        sizes = [len(lists[name]) - (name != "tasks") for name in LISTS]
        cells = [_cell(i, cell, sizes) for i, cell in enumerate(found["cells"])]
        tasks = [*lists["tasks"], ALL]
        first = {
            "model": model,
            "question": question or ("unseen" if "unseen" in lists["questions"] else None),
            "task": task or (ALL if any(cell[2] == len(tasks) - 1 for cell in cells) else None),
            "length": length,
            "method": method or lists["methods"][-1],
            "budget": budget,
        }
        among = (
            lists["models"],
            lists["questions"],
            tasks,
            lists["lengths"],
            lists["methods"],
            lists["budgets"],
        )
        places = {
            name: 0 if first[name] is None else _place(name, first[name], values)
            for name, values in zip(PLACES, among, strict=True)
        }
        if budget is None:
            fixed = [places[name] for name in PLACES[:-1]]
            places["budget"] = min((cell[5] for cell in cells if cell[:5] == fixed), default=0)
        super().__init__(
            **lists,
            cells=cells,
            uniform=[checks.one_of("uniform", name, tuple(lists["methods"])) for name in uniform],
            **places,
            title=title or "",
        )
        if self._chosen() is None:
            said = ", ".join(str(values[places[name]]) for name, values in zip(PLACES, among, strict=True))
            raise ValueError(f"found must have a cell of what is shown first, got none of {said}")

    @t.validate(*PLACES)
    def _as_described(self, proposal: Any) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        most = {"task": len(self.tasks)}.get(name, len(getattr(self, f"{name}s")) - 1)
        return checks.whole(name, value, 0, most)

    def _chosen(self) -> list[Any] | None:
        """The cell that is chosen, if it was measured."""
        place = [getattr(self, name) for name in PLACES]
        return next((list(cell) for cell in self.cells if cell[:6] == place), None)

    def describe(self) -> str:
        where = (
            f"QualityMap: {self.models[self.model]}, question {self.questions[self.question]}, "
            f"{[*self.tasks, ALL][self.task]}, {self.lengths[self.length]:,} tokens; {self.methods[self.method]}"
        )
        if (cell := self._chosen()) is None:
            return f"{where}: not measured."
        nbytes, _, entries, score, low, high, *_, documents = cell[6:]
        return (
            f"{where} at {entries:.0%} of the entries, {nbytes:,} bytes: {score:.2f} right ({low:.2f} to {high:.2f}, "
            f"{documents} documents)."
        )


def _place(name: str, value: Any, values: Sequence[Any]) -> int:
    if value not in values:
        raise ValueError(f"{name} must be one of {', '.join(map(str, values))}, got {value!r}")
    return values.index(value)


def _cell(i: int, cell: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
    """A cell, checked: places within the lists, figures that are numbers."""
    if len(cell) != len(PLACES) + len(FIGURES):
        raise ValueError(f"cells[{i}] must have {len(PLACES) + len(FIGURES)} values, got {len(cell)}")
    for name, value, most in zip(PLACES, cell, sizes, strict=False):
        checks.whole(f"cells[{i}] {name}", value, 0, most)
    measured = [0.0 if value is None and at in (6, 7) else value for at, value in enumerate(cell[6:])]
    figures = checks.array(f"cells[{i}]", measured, ndim=(1,)).tolist()
    nbytes, full, entries, score, low, high, *_, documents = figures
    for name, value in (("entries", entries), ("score", score), ("low", low), ("high", high)):
        checks.share(f"cells[{i}] {name}", value)
    if nbytes <= 0 or full <= 0 or documents < 1:
        raise ValueError(f"cells[{i}] must have bytes and documents, got {nbytes:g}, {full:g}, {documents:g}")
    return list(cell)
