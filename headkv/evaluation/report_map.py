"""What a sweep found, cell by cell and small: what the book's map of quality against bytes is drawn from."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import product
from typing import Any

from headkv.evaluation.report import Cell, cells
from headkv.evaluation.rows import SweepRow

FULL = "FullCache"
COLUMNS = (
    *("model", "question", "task", "length", "method", "budget"),
    *("bytes", "full_bytes", "entries", "score", "low", "high", "log_probability", "divergence", "documents"),
)


def as_map(rows: Sequence[SweepRow], command: str) -> dict[str, Any]:
    """Means and intervals for each model, way to ask, task, length, method and budget, as plain JSON.

    Args:
        rows: of one sweep or several.
        command: that made it.

    Returns:
        `command`; `made_by`, the sweeps that make such rows; `devices` and `versions`;
        `models`, `questions`, `tasks`, `lengths`, `methods` (the full cache first)
        and `budgets` (rising); and `cells`, each a list with what `columns` names. The first six are places in those
        lists. A task behind the last stands for all tasks together, each counting alike; it is there where a length has
        more than one.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("rows must hold one or more, got none")
    parts: dict[str, list[Any]] = {
        "models": list(dict.fromkeys(row.model for row in rows)),
        "questions": list(dict.fromkeys(row.question for row in rows)),
        "tasks": list(dict.fromkeys(row.task for row in rows)),
        "lengths": sorted({row.length for row in rows}),
        "methods": sorted(dict.fromkeys(row.method for row in rows), key=lambda name: name != FULL),
        "budgets": sorted({row.budget for row in rows}),
    }
    groups: dict[tuple[str, str, int], list[SweepRow]] = {}
    for row in rows:
        groups.setdefault((row.model, row.question, row.length), []).append(row)
    made = []
    for model, question, length in product(parts["models"], parts["questions"], parts["lengths"]):
        here = groups.get((model, question, length), [])
        own = {task: [row for row in here if row.task == task] for task in parts["tasks"]}
        own = {task: some for task, some in own.items() if some}
        views = [(parts["tasks"].index(task), some) for task, some in own.items()]
        if len(own) > 1:
            views.append((len(parts["tasks"]), here))
        for task, some in views:
            for cell in cells(some):
                place = (
                    *(parts["models"].index(model), parts["questions"].index(question), task),
                    *(parts["lengths"].index(length), parts["methods"].index(cell.method)),
                    parts["budgets"].index(cell.budget),
                )
                made.append([*place, *_figures(cell)])
    return {
        "command": command,
        "made_by": _sweeps(rows),
        "devices": list(dict.fromkeys(row.device for row in rows)),
        "versions": list(dict.fromkeys(row.versions for row in rows)),
        **parts,
        "columns": list(COLUMNS),
        "cells": made,
    }


def _sweeps(rows: Sequence[SweepRow]) -> list[str]:
    """The commands that make these rows, one for each model and the ways to ask at a length; of a sweep in several
    parts, as if it had been one."""
    found = []
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        asked: dict[int, dict[str, None]] = {}
        for row in own:
            asked.setdefault(row.length, {})[row.question] = None
        for ways in dict.fromkeys(map(tuple, asked.values())):
            part = [row for row in own if tuple(asked[row.length]) == ways]
            words: dict[str, list[Any]] = {
                "method": [name for name in dict.fromkeys(row.method for row in part) if name != FULL],
                "budget": sorted({f"{row.budget:g}" for row in part if row.method != FULL}, key=float),
                "tasks": list(dict.fromkeys(row.task for row in part)),
                "lengths": sorted({row.length for row in part}),
                "question": list(ways),
                "seed": sorted({row.seed for row in part}),
                "limit": [len({row.doc_id for row in part})],
                "new-tokens": [max(row.max_new_tokens for row in part)],
            }
            options = [[f"--{name}", *map(str, values)] for name, values in words.items()]
            found.append(shlex.join(["headkv", "eval", "--model", model, *sum(options, [])]))
    return found


def _figures(cell: Cell) -> list[float]:
    return [
        *(round(cell.nbytes), round(cell.full_nbytes), round(cell.stored_share, 4)),
        *(round(x, 3) for x in (cell.score, *cell.interval, cell.log_probability, cell.divergence)),
        cell.documents,
    ]
