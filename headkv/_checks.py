"""Checks of parameters, one way everywhere: the errors name the argument, what is allowed and what it was.

A wrong type is a TypeError, and a bool is no number; a wrong value is a ValueError. numpy's numbers are numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def whole(name: str, value: Any, least: int = 0, most: int | None = None) -> int:
    """A whole number of at least `least` and, where it is said, at most `most`; as an int.

    >>> whole("sinks", 4), whole("sinks", 4, 1, 8)
    (4, 4)
    """
    span = f"of at least {least}" if most is None else f"in [{least}, {most}]"
    allowed = f"{name} must be an int {span}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(allowed)
    number = int(value)
    if number < least or (most is not None and number > most):
        raise ValueError(allowed)
    return number


def between(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """A number in `[low, high]`; infinity is a number here, NaN is not."""
    span = f"of at least {low}" if high == math.inf else f"in [{low}, {high}]"
    allowed = f"{name} must be a number {span}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(allowed)
    if not low <= float(value) <= high:
        raise ValueError(allowed)


def one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of a few words."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return str(value)


def flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def has(name: str, value: Any, *members: str) -> None:
    """An object that offers these attributes, as a scorer, an allocator or a profile does."""
    missing = [m for m in members if isinstance(value, type) or not hasattr(value, m)]
    if missing:
        raise TypeError(f"{name} must be an object with {', '.join(missing)}, got {value!r}")
