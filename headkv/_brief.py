"""One line about an object that holds tensors: for a prompt, and for error messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from torch import Tensor

LONG = 40  # letters of a value that are too many


def brief(thing: Any) -> str:
    """A dataclass as a short call: what it needs first, then what differs from its default.

    Tensors and long lists are said by their shape, whatever has a `label` by that, and what `stands_for` another thing
    as that thing; fields with `repr=False` are not.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Window:
    ...     mask: Tensor
    ...     sinks: int = 4
    ...     recent: int = 256
    >>> import torch
    >>> brief(Window(torch.ones(30, 3), recent=64))
    'Window(<30 x 3>, recent=64)'
    """
    said = []
    for field in fields(thing):
        if not field.repr:
            continue
        value = getattr(thing, field.name)
        if _needed(field):
            said.append(_short(value))
        elif not _same(value, field):
            said.append(f"{field.name}={_short(value)}")
    return f"{type(thing).__name__}({', '.join(said)})"


def _needed(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _same(value: Any, field: Field[Any]) -> bool:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    return not isinstance(value, Tensor) and bool(value == default)


def _short(value: Any) -> str:
    value = getattr(value, "stands_for", value)
    if isinstance(label := getattr(value, "label", None), str):
        return f"<{label}>"
    if isinstance(value, Tensor):
        return f"<{' x '.join(map(str, value.shape))}>"
    if isinstance(value, float):
        return repr(value) if len(repr(value)) <= LONG // 4 else f"{value:.4g}"
    text = repr(value)
    if len(text) <= LONG:
        return text
    if is_dataclass(value):
        return brief(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        inner = f" x {len(value[0])}" if isinstance(value[0], Sequence) else ""
        return f"<{len(value)}{inner}>"
    return text
