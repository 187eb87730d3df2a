"""Chance, to compare with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headkv import _checks
from headkv.prefill import Prefill


@dataclass(frozen=True)
class RandomScorer:
    """Scores drawn uniformly; the same for the same seed, layer and shape, on every device.

    Attributes:
        seed: at least 0. The global random state is neither read nor changed.
        window: last entries that are always kept and do not compete.
    """

    seed: int = 0
    window: int = 32

    def __post_init__(self) -> None:
        _checks.whole("seed", self.seed)
        _checks.whole("window", self.window)

    @property
    def observed_queries(self) -> int:
        """No queries (0)."""
        return 0

    def score(self, prefill: Prefill) -> Tensor:
        """Scores `[H, n - window]` float32 in [0, 1)."""
        m = max(0, prefill.length - self.window)
        generator = torch.Generator("cpu").manual_seed((self.seed << 16) + prefill.layer_idx)
        return torch.rand(prefill.num_kv_heads, m, generator=generator, device="cpu").to(prefill.keys.device)
