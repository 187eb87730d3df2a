"""RandomHeads: retrieval heads chosen by chance, to compare with those that a profile chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headkv import _checks
from headkv.methods.base import Keep
from headkv.methods.explanation import Explained
from headkv.methods.windows import split_share, top_heads, windowed, windowed_share
from headkv.prefill import Prefill


@dataclass(frozen=True)
class RandomHeads(Explained):
    """A control, as in RazorAttention (arXiv 2407.15891): as many heads keep all, but any heads.

    Attributes:
        share: share of the model's KV heads that keep all, in [0, 1].
        sinks: first entries that the other heads see.
        recent: last entries that the other heads see, at least 1.
        seed: at least 0; the same seed chooses the same heads. The global random state is neither read nor
            changed.
    """

    share: float = 0.5
    sinks: int = 64
    recent: int = 256
    seed: int = 0
    by_shape: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.between("share", self.share, 0, 1)
        _checks.whole("sinks", self.sinks)
        _checks.whole("recent", self.recent, 1)
        _checks.whole("seed", self.seed)

    @classmethod
    def for_share(
        cls, share: float, length: int, *, sinks: int = 64, recent: int = 256, seed: int = 0
    ) -> RandomHeads:
        """The share of heads with which about `share` of a prompt of `length` tokens is stored.

        Where sinks and window would take more than half of the share they are made smaller.
        """
        full, sinks, recent = split_share(share, length, sinks, recent)
        return cls(full, sinks, recent, seed)

    @property
    def observed_queries(self) -> int:
        """No queries (0)."""
        return 0

    def retrieval_heads(self, num_layers: int, num_kv_heads: int) -> Tensor:
        """The heads that keep all, `[L, H]` bool."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        lots = torch.randperm(num_layers * num_kv_heads, generator=generator, device="cpu")
        return top_heads(lots.view(num_layers, num_kv_heads), round(self.share * lots.numel()))

    def stored_share(self, length: int) -> float:
        """Share stored of a prompt of `length` tokens, up to the rounding to whole heads."""
        return windowed_share(self.share, self.sinks + self.recent, length)

    def plan(self, prefill: Prefill) -> Keep:
        """Keep all entries of this layer's chosen heads, and the sinks and the window of the others."""
        retrieval = self.retrieval_heads(prefill.num_layers, prefill.num_kv_heads)
        return windowed(prefill, retrieval[prefill.layer_idx], self.sinks, self.recent)
