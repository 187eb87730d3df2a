"""Small keys matter (L2 norm)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from headkv import _checks
from headkv.prefill import Prefill


@dataclass(frozen=True)
class KeyNormScorer:
    """Minus the norm of the key: small keys tend to be looked at, arXiv 2406.11430. No query is needed.

    Attributes:
        window: last entries that are always kept and do not compete.
    """

    window: int = 32
    by_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.whole("window", self.window)

    @property
    def observed_queries(self) -> int:
        """No queries (0)."""
        return 0

    def score(self, prefill: Prefill) -> Tensor:
        """Scores `[H, n - window]` float32."""
        m = max(0, prefill.length - self.window)
        return -prefill.keys[:, :m].float().norm(dim=-1)
