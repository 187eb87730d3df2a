"""DuoAttention: retrieval heads keep all, streaming heads sinks and a window; learned gates say which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from headkv import _checks
from headkv._brief import brief
from headkv.methods.base import Keep, Windows
from headkv.methods.explanation import Explained
from headkv.methods.windows import head_scores, split_share, top_heads, windowed, windowed_share, windows_of
from headkv.prefill import Prefill

if TYPE_CHECKING:
    from headkv.heads import HeadProfile


@dataclass(frozen=True, eq=False)
class DuoAttention(Explained):
    """DuoAttention, arXiv 2410.10819: the heads with the highest gates keep all, the others stream.

    A share of heads decides, not a threshold: most gates of grouped-query models are near 1. Equal gates go
    to the earlier layer and head; published code adds noise from the global random state to the caller's
    own array.

    While the prompt is read, every head sees all of it, as in a published one-shot prefill, and the window
    slides from then on. With `streaming_prefill` streaming heads stream from the first token: token i sees
    the sinks and the tokens (i - recent, i], as when the gates were learned. Their share of the prefill's
    attention then is O(n), and a chunked prefill stores O(chunk) of them. In published code what they see
    depends on the chunks; here it does not.

    Attributes:
        profile: gates, or any scores where higher means that a head needs the far past more.
        sparsity: share of the model's KV heads that stream, in [0, 1]; layers may have none or all of their
            heads.
        sinks: first entries that a streaming head sees.
        recent: last entries that a streaming head sees, at least 1. Published gates were trained with 128
            and 256.
        reduce: query heads of a group to one, for profiles of query heads: "max", "sum" or "mean".
        streaming_prefill: streaming heads stream while the prompt is read, too.
    """

    profile: HeadProfile
    sparsity: float = 0.5
    sinks: int = 64
    recent: int = 256
    reduce: str = "max"
    streaming_prefill: bool = False
    by_shape: ClassVar[bool] = True

    __repr__ = brief

    def __post_init__(self) -> None:
        _checks.has("profile", self.profile, "scores", "kv_scores")
        _checks.between("sparsity", self.sparsity, 0, 1)
        _checks.whole("sinks", self.sinks)
        _checks.whole("recent", self.recent, 1)
        _checks.one_of("reduce", self.reduce, ("max", "sum", "mean"))
        _checks.flag("streaming_prefill", self.streaming_prefill)

    @classmethod
    def for_share(
        cls,
        share: float,
        length: int,
        profile: HeadProfile,
        *,
        sinks: int = 64,
        recent: int = 256,
        streaming_prefill: bool = False,
    ) -> DuoAttention:
        """The sparsity with which about `share` of a prompt of `length` tokens is stored.

        Where sinks and window would take more than half of the share they are made smaller.
        """
        full, sinks, recent = split_share(share, length, sinks, recent)
        return cls(profile, 1 - full, sinks, recent, streaming_prefill=streaming_prefill)

    @property
    def observed_queries(self) -> int:
        """No queries (0)."""
        return 0

    @property
    def profiles(self) -> tuple[HeadProfile, ...]:
        """The profiles, to be checked against a model."""
        return (self.profile,)

    def retrieval_heads(self, scores: Tensor) -> Tensor:
        """The heads that keep all, `[L, H]` bool, for gates `[L, H]`."""
        return top_heads(scores, round((1 - self.sparsity) * scores.numel()))

    def stored_share(self, length: int) -> float:
        """Share stored of a prompt of `length` tokens, up to the rounding to whole heads."""
        return windowed_share(1 - self.sparsity, self.sinks + self.recent, length)

    def prefill_windows(
        self, *, layer_idx: int, num_layers: int, num_kv_heads: int, length: int | None
    ) -> Windows | None:
        """The windows of this layer's streaming heads, with `streaming_prefill`."""
        if not self.streaming_prefill:
            return None
        return windows_of(self._retrieval(layer_idx, num_layers, num_kv_heads), self.sinks, self.recent)

    def plan(self, prefill: Prefill) -> Keep:
        """Keep all entries of this layer's retrieval heads, and the sinks and the window of the others."""
        retrieval = self._retrieval(prefill.layer_idx, prefill.num_layers, prefill.num_kv_heads)
        return windowed(prefill, retrieval, self.sinks, self.recent)

    def _retrieval(self, layer_idx: int, num_layers: int, num_kv_heads: int) -> Tensor:
        """One layer's retrieval heads, `[H]` bool."""
        scores = head_scores("profile", self.profile, num_layers, num_kv_heads, self.reduce)
        return self.retrieval_heads(scores)[layer_idx]
