"""Pictures that a reader can move: anywidgets over plain arrays, alive in JupyterLab and in a built page.

Each class takes arrays or numbers (one a cache's snapshots), never a model. The front end computes everything in the
page: with its state embedded, a widget needs neither kernel nor network. anywidget is imported when one is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "BudgetExplorer": "budget_explorer",
    "CacheBill": "cache_bill",
    "EvictionTimeline": "eviction_timeline",
    "HeadGrid": "head_grid",
    "HeadMap": "head_map",
    "QualityMap": "quality_map",
    "RaggedPool": "ragged_pool",
    "Roofline": "roofline",
    "SideBySide": "side_by_side",
    "SparsityDial": "sparsity_dial",
    "WorkShares": "work_shares",
}

__all__ = [
    "BudgetExplorer",
    "CacheBill",
    "EvictionTimeline",
    "HeadGrid",
    "HeadMap",
    "QualityMap",
    "RaggedPool",
    "Roofline",
    "SideBySide",
    "SparsityDial",
    "WorkShares",
]  # noqa: F822 (loaded when first used)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import anywidget  # noqa: F401
    except ImportError as error:
        raise ImportError(f"headkv.widgets.{name} needs anywidget: pip install 'headkv[widgets]'") from error
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
