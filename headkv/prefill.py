"""What a method, and a scorer, may look at: one layer of one prompt, or all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from headkv import _checks
from headkv._brief import brief
from headkv.logits import Rule

ALL = None  # of a prompt's queries, as `observed_queries` says it


@dataclass(frozen=True, eq=False)
class Parts:
    """What a layer's attention has besides queries, keys and values; None where the model has it in no known form.

    Attributes:
        output: `[hidden, HQ * D]`, weight of the output projection.
        rotary: positions `[m]` to the cosines and sines `[m, R]` of the rotary embedding, float32, which turns the
            first `R <= D` dimensions, halves against each other.
        module: the attention itself, for code of other libraries that ranks by more than this.
        model: what it is part of.
    """

    output: Tensor | None = None
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    module: Any = field(default=None, repr=False)
    model: Any = field(default=None, repr=False)

    def require(self, name: str, who: str) -> Any:
        """The part `name`, which `who` can not do without.

        Raises:
            ValueError: the model has none that headkv knows.
        """
        part = getattr(self, name)
        if part is None:
            what = {"output": "output projection", "rotary": "rotary embedding"}[name]
            raise ValueError(
                f"{who} needs the {what} of the model's attention, which has none that headkv knows"
            )
        return part


@dataclass(frozen=True, eq=False)
class Prefill:
    """One layer of one prompt, padding already removed: all that a method may look at.

    Attributes:
        queries: `[HQ, w, D]`, after RoPE, of the last `w <= n` tokens; `w` is what the method asked for.
        keys: `[H, n, D]`, after RoPE.
        values: `[H, n, D]`.
        layer_idx: this layer, from 0; in hybrid models among those that attend.
        num_layers: layers of the model that attend.
        scale, sliding_window, softcap, sink_logits: how queries meet keys, see `headkv.logits.Rule`. Attention weights
            are the model's own, by which heads can be compared: they sum to less than 1 where a head has a sink.
        parts: of the layer's attention, for scorers that look at weights.
        hidden: `[n, hidden]`, what the layer's attention was given, where the method has `observes_hidden = True`.

    Raises:
        ValueError: shapes that do not belong together, an empty prompt, a layer outside the model, or a window or
            cap that is not positive.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    layer_idx: int
    num_layers: int
    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    parts: Parts = Parts()
    hidden: Tensor | None = None
    sink_logits: Tensor | None = None

    __repr__ = brief

    def __post_init__(self) -> None:
        if self.keys.ndim != 3 or 0 in self.keys.shape:
            raise ValueError(
                f"keys must have shape [H, n, D] with at least one token, got {list(self.keys.shape)}"
            )
        heads, n, dim = self.keys.shape
        if self.values.ndim != 3 or self.values.shape[:2] != self.keys.shape[:2]:
            raise ValueError(f"values must have shape [{heads}, {n}, D], got {list(self.values.shape)}")
        q = self.queries
        if q.ndim != 3 or q.shape[0] % heads or q.shape[0] == 0 or q.shape[1] > n or q.shape[2] != dim:
            allowed = f"[HQ, w, {dim}] with HQ a multiple of {heads} and w <= {n}"
            raise ValueError(f"queries must have shape {allowed}, got {list(q.shape)}")
        if self.hidden is not None and (self.hidden.ndim != 2 or self.hidden.shape[0] != n):
            raise ValueError(f"hidden must have shape [{n}, hidden], got {list(self.hidden.shape)}")
        _checks.whole("num_layers", self.num_layers, 1)
        if not 0 <= self.layer_idx < self.num_layers:
            raise ValueError(f"layer_idx must lie in [0, {self.num_layers}), got {self.layer_idx}")
        if self.sliding_window is not None:
            _checks.whole("sliding_window", self.sliding_window, 1)
        self.rule.check_heads(q[None])  # and the rest

    @property
    def rule(self) -> Rule:
        """How queries meet keys."""
        return Rule(self.scale, self.sliding_window, self.softcap, self.sink_logits)

    @property
    def length(self) -> int:
        """Tokens of the prompt, n."""
        return self.keys.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """KV heads, H."""
        return self.keys.shape[0]


class Prompt(Protocol):
    """A prompt that all layers have read, padding already removed; its whole cache is still there."""

    @property
    def num_layers(self) -> int:
        """Layers of the model."""

    @property
    def length(self) -> int:
        """Tokens of the prompt, n."""

    @property
    def input_ids(self) -> Tensor:
        """The text, `[n]` int64.

        Raises:
            ValueError: the model was given embeddings in place of tokens.
        """

    def layer(self, layer_idx: int) -> Prefill:
        """One layer, made when asked: dense keys and values of one layer at a time."""

    def read(self, input_ids: Tensor, watch: Callable[[int, Tensor, Tensor], None]) -> None:
        """Read `input_ids` `[m]` behind the prompt, and forget them again.

        Args:
            input_ids: int64.
            watch: called for each layer with its number, the new tokens' queries `[HQ, m, D]` and keys `[H, m, D]`,
                both after RoPE, before they attend to everything before them.
        """
