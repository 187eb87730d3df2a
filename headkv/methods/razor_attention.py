"""RazorAttention: echo and induction heads keep all; the others let one entry stand for what they drop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from headkv import _checks
from headkv._brief import brief
from headkv.methods.base import Keep, Windows
from headkv.methods.explanation import Explained
from headkv.methods.windows import head_scores, top_heads, windowed, windowed_share, windows_of
from headkv.prefill import Prefill

if TYPE_CHECKING:
    from headkv.heads import HeadProfile


@dataclass(frozen=True, eq=False)
class RazorAttention(Explained):
    """RazorAttention, arXiv 2407.15891, Algorithm 1.

    The union of the model's top echo heads and top induction heads keeps all; a KV head scores what the
    best of its query heads does. Every other head keeps `sinks` and the last `max(min_recent, window_share
    * n)` entries, and one compensation entry: the mean key and value of what it dropped, weighing as much
    as their number. It takes in what leaves the window while decoding.

    While the prompt is read, every head sees all of it. With `streaming_prefill` the others then see sinks,
    window and compensation entry already, each token its own, with the window that the length of the prompt
    gives. In a chunked prefill nobody knows that length: `window_share` must be 0, and `min_recent` the window.

    Attributes:
        echo: profile of kind "echo"; or one profile of another kind for both.
        induction: profile of kind "induction"; or the same.
        echo_share: share of the model's KV heads, in [0, 1]; at least one head unless 0.
        induction_share: the same for induction.
        sinks: first entries that stay.
        min_recent: the window on short prompts, at least 1. With the paper's 4000 nothing is saved below
            4000 tokens.
        window_share: the window on long prompts, as a share of the prompt.
        compensation: False leaves the compensation entry out, to see what it does.
        streaming_prefill: the others see no more than that while the prompt is read, too.
    """

    echo: HeadProfile
    induction: HeadProfile
    echo_share: float = 0.01
    induction_share: float = 0.14
    sinks: int = 4
    min_recent: int = 4000
    window_share: float = 1 / 5
    compensation: bool = True
    streaming_prefill: bool = False
    by_shape: ClassVar[bool] = True

    __repr__ = brief

    def __post_init__(self) -> None:
        for kind in ("echo", "induction"):
            profile = getattr(self, kind)
            _checks.has(kind, profile, "kind", "scores", "kv_scores")
            of_another_kind = profile.kind not in ("echo", "induction") and self.echo is self.induction
            if profile.kind != kind and not of_another_kind:
                raise ValueError(f"{kind} must be a profile of kind {kind!r}, got {profile.kind!r}")
        _checks.between("echo_share", self.echo_share, 0, 1)
        _checks.between("induction_share", self.induction_share, 0, 1)
        _checks.whole("sinks", self.sinks)
        _checks.whole("min_recent", self.min_recent, 1)
        _checks.between("window_share", self.window_share, 0, 1)
        _checks.flag("streaming_prefill", self.streaming_prefill)

    @classmethod
    def for_share(
        cls,
        share: float,
        length: int,
        echo: HeadProfile,
        induction: HeadProfile,
        *,
        num_kv_heads: int,
        echo_share: float = 0.01,
        induction_share: float = 0.14,
        sinks: int = 4,
        streaming_prefill: bool = False,
    ) -> RazorAttention:
        """The window with which about `share` of a prompt is stored; the heads are the paper's choice unless said.

        Raises:
            ValueError: the retrieval heads alone exceed the share.
        """
        _checks.between("share", share, 0, 1)
        _checks.whole("length", length, 1)
        shares: dict[str, Any] = {"echo_share": echo_share, "induction_share": induction_share}
        full = cls(echo, induction, **shares).retrieval_share(num_kv_heads)
        window = round((share - full) / (1 - full) * length) if full < 1 else 0
        if window < sinks + 2:
            least = windowed_share(full, sinks + 2, length)
            raise ValueError(
                f"share must be at least {least:.3f} for these profiles and {length} tokens, got {share}"
            )
        recent = window - sinks - 1
        return cls(
            echo,
            induction,
            **shares,
            sinks=sinks,
            min_recent=recent,
            window_share=min(1.0, recent / length),
            streaming_prefill=streaming_prefill,
        )

    @property
    def observed_queries(self) -> int:
        """No queries (0)."""
        return 0

    @property
    def profiles(self) -> tuple[HeadProfile, ...]:
        """The profiles, to be checked against a model."""
        return (self.echo, self.induction)

    def recent(self, length: int) -> int:
        """The window of a prompt of `length` tokens."""
        return max(self.min_recent, round(self.window_share * length))

    def retrieval_heads(self, echo: Tensor, induction: Tensor) -> Tensor:
        """The heads that keep all, `[L, H]` bool, for echo and induction scores `[L, H]`."""
        return top_heads(echo, _quota(self.echo_share, echo.numel())) | top_heads(
            induction, _quota(self.induction_share, induction.numel())
        )

    def retrieval_share(self, num_kv_heads: int) -> float:
        """Share of the KV heads that keep all."""
        scores = (self.echo.kv_scores(num_kv_heads, "max"), self.induction.kv_scores(num_kv_heads, "max"))
        return float(self.retrieval_heads(*scores).double().mean())

    def stored_share(self, length: int, num_kv_heads: int) -> float:
        """Share stored of a prompt of `length` tokens, the compensation entry counted as one."""
        window = self.sinks + self.recent(length) + self.compensation
        return windowed_share(self.retrieval_share(num_kv_heads), window, length)

    def prefill_windows(
        self, *, layer_idx: int, num_layers: int, num_kv_heads: int, length: int | None
    ) -> Windows | None:
        """The windows of this layer's other heads, with `streaming_prefill`.

        Raises:
            ValueError: no length, and a window that depends on it.
        """
        if not self.streaming_prefill:
            return None
        if length is None and self.window_share:
            raise ValueError(
                f"window_share must be 0 where a prompt that streams is read in chunks, got {self.window_share}: "
                "nobody knows its length yet; set window_share=0 and min_recent to the window, or read it at once"
            )
        retrieval = self._retrieval(layer_idx, num_layers, num_kv_heads)
        return windows_of(retrieval, self.sinks, self.recent(length or 0), compensate=self.compensation)

    def plan(self, prefill: Prefill) -> Keep:
        """Keep all entries of this layer's retrieval heads; sinks, window and one mean entry of the others.

        In a layer with a sliding window nothing stands in for what the model itself does not see any more.
        """
        retrieval = self._retrieval(prefill.layer_idx, prefill.num_layers, prefill.num_kv_heads)
        compensate = self.compensation and prefill.sliding_window is None
        return windowed(prefill, retrieval, self.sinks, self.recent(prefill.length), compensate=compensate)

    def _retrieval(self, layer_idx: int, num_layers: int, num_kv_heads: int) -> Tensor:
        """One layer's retrieval heads, `[H]` bool."""
        echo = head_scores("echo", self.echo, num_layers, num_kv_heads)
        induction = head_scores("induction", self.induction, num_layers, num_kv_heads)
        return self.retrieval_heads(echo, induction)[layer_idx]


def _quota(share: float, heads: int) -> int:
    """Heads in a share, at least one unless it is 0: 1% of 30 heads would round to none."""
    return max(1, round(share * heads)) if share else 0
