"""FullCache: keep all, to compare with."""

from __future__ import annotations

from dataclasses import dataclass

from headkv.methods.base import Keep, Prefill


@dataclass(frozen=True)
class FullCache:
    """Every KV head keeps every entry: the ragged cache without compression."""

    @property
    def observed_queries(self) -> int:
        """None are needed."""
        return 0

    def plan(self, prefill: Prefill) -> Keep:
        """Keep all entries."""
        return Keep.all(prefill)
