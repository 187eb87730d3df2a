"""Errors in the reader's words: each names the argument, what it was and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from headkv._checks import one_of, whole

__all__ = ["array", "budget_share", "lengths", "one_of", "pair", "positive", "share", "strings", "whole"]


def array(name: str, values: Any, *, ndim: tuple[int, ...]) -> np.ndarray:
    """`values` as a float array; a torch tensor on any device is taken too.

    Raises:
        TypeError: it does not hold numbers.
        ValueError: wrong number of dimensions, an empty one, or a NaN or infinite value.
    """
    if hasattr(values, "detach"):
        values = values.detach().float().cpu().numpy()
    try:
        out = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array of numbers, got {type(values).__name__}") from error
    if out.ndim not in ndim:
        allowed = " or ".join(str(d) for d in ndim)
        raise ValueError(f"{name} must have {allowed} dimensions, got shape {out.shape}")
    if 0 in out.shape:
        raise ValueError(f"{name} must not be empty, got shape {out.shape}")
    if not np.isfinite(out).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(out))[0])
        raise ValueError(f"{name} must be finite, got {out[where]} at {where}")
    return out


def lengths(values: Sequence[Any], rows: int, high: int | None = None) -> list[int]:
    """`lengths` of 1 to `rows` rows, each an int in [1, high]."""
    if not 1 <= len(values) <= rows:
        raise ValueError(f"lengths must hold 1 to {rows} rows, got {len(values)}")
    return [whole(f"lengths[{i}]", length, 1, high) for i, length in enumerate(values)]


def share(name: str, value: Any, *, zero: bool = True) -> float:
    """A float in [0, 1], or (0, 1] without zero."""
    allowed = f"a share in {'[' if zero else '('}0, 1]"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {allowed}, got {value!r}")
    if not (0 <= float(value) <= 1) or (value == 0 and not zero):
        raise ValueError(f"{name} must be {allowed}, got {value}")
    return float(value)


def positive(name: str, value: Any) -> float:
    """A finite float above 0."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number above 0, got {value!r}")
    if not 0 < float(value) < float("inf"):
        raise ValueError(f"{name} must be a number above 0, got {value}")
    return float(value)


def budget_share(value: Any, n: int) -> float:
    """A budget, entries a head on average (int) or a share of the prompt (float), as a share of n entries."""
    allowed = f"budget must be a positive int or a share in (0, 1], got {value!r}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(allowed)
    if not float(value) > 0:
        raise ValueError(allowed)
    if isinstance(value, Integral):
        return min(int(value), n) / n
    if float(value) > 1:
        raise ValueError(allowed)
    return float(value)


def strings(name: str, values: Sequence[str] | None, length: int) -> list[str]:
    """A list of `length` strings; None gives an empty one."""
    if values is None:
        return []
    if isinstance(values, str) or not all(isinstance(v, str) for v in values):
        raise TypeError(f"{name} must be a sequence of strings, got {type(values).__name__}")
    if len(values) != length:
        raise ValueError(f"{name} must hold {length} strings, got {len(values)}")
    return list(values)


def pair(name: str, value: Any, shape: tuple[int, int]) -> list[int]:
    """A (layer, head) that exists."""
    try:
        layer, head = value
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be (layer, head), got {value!r}") from error
    return [whole(f"{name}[0]", layer, 0, shape[0] - 1), whole(f"{name}[1]", head, 0, shape[1] - 1)]
