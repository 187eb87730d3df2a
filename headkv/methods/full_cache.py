"""FullCache: keep all, to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from headkv.methods.base import Keep
from headkv.methods.explanation import Explained
from headkv.prefill import Prefill


@dataclass(frozen=True)
class FullCache(Explained):
    """Every KV head keeps every entry: the ragged cache without compression."""

    by_shape: ClassVar[bool] = True

    @classmethod
    def for_share(cls, share: float, length: int) -> FullCache:
        """The full cache, whatever the share: it stores all."""
        return cls()

    @property
    def observed_queries(self) -> int:
        """No queries (0)."""
        return 0

    def plan(self, prefill: Prefill) -> Keep:
        """Keep all entries."""
        return Keep.all(prefill)

    def stored_share(self, length: int) -> float:
        """All of a prompt."""
        return 1.0
