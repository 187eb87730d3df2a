"""Widgets of measured figures, small and made up: for the tests of what a page shows of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from headkv.widgets import SparsityDial

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
