"""A progress bar for the profilers, only where one is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T], label: str, shown: bool) -> Iterator[T]:
    """Iterate over `items`, with a progress bar on the standard error stream if `shown`."""
    if not shown:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as bar

    yield from bar(items, label, console=Console(stderr=True))
