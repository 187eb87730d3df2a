"""A progress bar for the profilers, only where one is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T], label: str, shown: bool) -> Iterator[T]:
    """Iterate over `items`, with a progress bar on the standard error stream if `shown`."""
    from tqdm import tqdm

    yield from tqdm(items, desc=label, disable=not shown)
