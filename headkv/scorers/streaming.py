"""First and last come first (StreamingLLM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headkv import _checks
from headkv.prefill import Prefill


@dataclass(frozen=True)
class StreamingScorer:
    """The sinks, then the later the better: which entries StreamingLLM keeps of a prompt (arXiv 2309.17453).

    For composing with allocators; the method `StreamingLLM` also slides its window while decoding.

    Attributes:
        sinks: first entries, ranked above all others.
        window: last entries that are kept whatever the ranking.
    """

    sinks: int = 4
    window: int = 0
    by_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.whole("sinks", self.sinks)
        _checks.whole("window", self.window)

    @property
    def observed_queries(self) -> int:
        """No queries (0)."""
        return 0

    def score(self, prefill: Prefill) -> Tensor:
        """Scores `[H, n - window]` float32: the position, and for sinks more than any position."""
        m = max(0, prefill.length - self.window)
        position = torch.arange(m, device=prefill.keys.device)
        rank = torch.where(position < self.sinks, m + self.sinks - position, position)
        return rank.float().repeat(prefill.num_kv_heads, 1)
