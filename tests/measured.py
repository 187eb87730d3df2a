"""Widgets of measured figures, small and made up: for the tests of what a page shows of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from headkv.widgets import HeadMap, QualityMap, Roofline, SparsityDial

LISTS = ("gates", "ablation", "by lot")
COUNTS, LENGTHS = (0, 1, 4, 9, 15), (1000, 2000)
KINDS = {"words": (9, 10), "numbers": (6, 10)}  # right with the full cache, asked


def dial_scores() -> dict[str, np.ndarray]:
    """Five layers of three heads; the gates have equal ones at both ends."""
    rng = np.random.default_rng(3)
    made = {name: rng.normal(size=(5, 3)) for name in LISTS}
    made["gates"] = made["gates"].clip(0, 1)
    return made


def dial_cells() -> list[dict[str, Any]]:
    rng = np.random.default_rng(4)
    return [
        {
            "profile": name,
            "kind": kind,
            "length": length,
            "heads": count,
            "stored": 0.1 + 0.9 * count / 15,
            "right": full if count == 15 else int(rng.integers(0, full + 1)),
            "full": full,
            "asked": asked,
        }
        for name in LISTS
        for kind, (full, asked) in KINDS.items()
        for length in LENGTHS
        for count in COUNTS
    ]


def sparsity_dial(**options: Any) -> SparsityDial:
    return SparsityDial(dial_scores(), dial_cells(), **{"title": "Which heads?", **options})


METHODS = ("FullCache", "SnapKV", "AdaKV", "KVzip")
BUDGETS = (0.1, 0.5, 1.0)
TASKS = ("needle", "lists")


def found_cells() -> list[list[Any]]:
    """All that there can be, but KVzip's at a half in the second turn; task 2 is all tasks."""
    rng = np.random.default_rng(5)
    cells = []
    for question, task, length, method, budget in np.ndindex(2, 3, 2, 4, 3):
        if (method == 0) != (budget == 2) or (question, method, budget) == (1, 3, 1):
            continue
        score, full = round(float(rng.uniform(0.2, 0.8)), 3), 1000 * (length + 1)
        figures = [round(full * BUDGETS[budget]) + 50, full, BUDGETS[budget], score, score - 0.1, score + 0.1]
        cells.append([0, question, task, length, method, budget, *figures, -0.5, 0.25, 8 + task])
    return cells


def quality_map(cells: list[list[Any]] | None = None, **options: Any) -> QualityMap:
    found = {
        "models": ["tiny"],
        "questions": ["unseen", "second"],
        "tasks": list(TASKS),
        "lengths": list(LENGTHS),
        "methods": list(METHODS),
        "budgets": list(BUDGETS),
        "cells": found_cells() if cells is None else cells,
    }
    return QualityMap(found, **{"title": "Answers and bytes", "uniform": ["SnapKV"], **options})


def head_map(**options: Any) -> HeadMap:
    """Five layers of three heads over 25 entries; the page rounds weights to a 65535th."""
    rng = np.random.default_rng(6)
    look = rng.exponential(size=(5, 3, 25))
    kept = {name: rng.random(look.shape) < share for name, share in (("SnapKV", 0.3), ("HeadKV", 0.6))}
    return HeadMap(
        {"gates": rng.random((5, 3)), "ablation": rng.normal(size=(5, 3))},
        look / look.sum(-1, keepdims=True),
        [f" w{i}" for i in range(25)],
        **{"kept": kept, "facts": [(7, 10, "a city")], "title": "Where a head looks", **options},
    )


ROOF = {"bandwidth": 1e12, "arithmetic": 4e13}  # they meet at 40 operations a byte
ROOF_CASES = [{"name": str(n), "bytes": 1e7 + 1e4 * n, "operations": 2e7 * n} for n in (1, 4, 16, 64, 256)]
ROOF_SECONDS = {
    "ours": [1.5e-5, 1.6e-5, 2e-5, 5e-5, 2.5e-4],
    "theirs": [4e-5, None, 9e-5, 3e-4, 1.1e-3],
}


def roofline(**options: Any) -> Roofline:
    """Five sizes: the bytes set the limit of the first three, arithmetic that of the others; one is not measured."""
    options = {"across": "tokens", "title": "Against the limit", "machine": "made up", **options}
    return Roofline(ROOF_CASES, ROOF_SECONDS, **ROOF, **options)
