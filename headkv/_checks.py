"""Checks of the parameters of methods, scorers and allocators: the errors say what is allowed."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def whole(name: str, value: Any, least: int = 0) -> None:
    """A whole number of at least `least`."""
    allowed = f"{name} must be an int of at least {least}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(allowed)
    if value < least:
        raise ValueError(allowed)


def between(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """A number in `[low, high]`; infinity is a number here, NaN is not."""
    span = f"of at least {low}" if high == math.inf else f"in [{low}, {high}]"
    allowed = f"{name} must be a number {span}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(allowed)
    if not low <= float(value) <= high:
        raise ValueError(allowed)


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """One of a few words."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def has(name: str, value: Any, *members: str) -> None:
    """An object that offers these attributes, as a scorer, an allocator or a profile does."""
    missing = [m for m in members if isinstance(value, type) or not hasattr(value, m)]
    if missing:
        raise TypeError(f"{name} must be an object with {', '.join(missing)}, got {value!r}")
