"""StreamingLLM: every head keeps the first and the last entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from headkv import _checks
from headkv.methods.base import Keep
from headkv.methods.explanation import Explained
from headkv.methods.selection import budget_entries, check_budget, stored_share
from headkv.methods.windows import windowed
from headkv.prefill import Prefill


@dataclass(frozen=True)
class StreamingLLM(Explained):
    """StreamingLLM, arXiv 2309.17453: all heads keep sinks and a recent window, which slides while decoding.

    Positions stay those of the text: entries are not numbered anew when the window moves.

    Attributes:
        budget: entries a KV head (int), or the share of the prompt (float in (0, 1]); sinks and window
            together.
        sinks: first entries that stay; fewer where the budget leaves no room for one recent entry.
    """

    budget: int | float
    sinks: int = 4
    by_shape: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_budget(self.budget)
        _checks.whole("sinks", self.sinks)

    @classmethod
    def for_share(cls, share: float, length: int, *, sinks: int = 4) -> StreamingLLM:
        """The budget with which `share` of a prompt is stored."""
        _checks.whole("length", length, 1)
        return cls(share, sinks)

    def stored_share(self, length: int) -> float:
        """Share stored of a prompt of `length` tokens."""
        return stored_share(self.budget, length)

    @property
    def observed_queries(self) -> int:
        """No queries (0)."""
        return 0

    def plan(self, prefill: Prefill) -> Keep:
        """Keep the first `sinks` entries and the last of the budget."""
        entries = budget_entries(self.budget, prefill.length)
        sinks = min(self.sinks, entries - 1)
        none = torch.zeros(prefill.num_kv_heads, dtype=torch.bool, device="cpu")
        return windowed(prefill, none, sinks, entries - sinks)
