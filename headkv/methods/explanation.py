"""What a method will store, said before it does: entries a head, share, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headkv import _checks
from headkv._brief import brief
from headkv._config import CacheShape
from headkv._grid import grid_html, spread
from headkv.prefill import Prefill

if TYPE_CHECKING:
    from headkv.methods.base import Keep


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """What a method stores of a prompt.

    In a layer with a sliding window what has left it is not stored. Of methods that choose by scores the numbers are
    upper bounds there, unless they were given that layer's `Prefill`.

    Attributes:
        method: as a short call.
        length: tokens of the prompt.
        budgets: entries that each KV head stores, `[layers, H]` int64, or `[H]` of one layer; None where the split
            follows the prompt. An entry that stands for dropped ones counts as one.
        entries: of all heads together.
        full_entries: those of a full cache.
        entry_nbytes: of one key and one value.
    """

    method: str
    length: int
    budgets: Tensor | None
    entries: int
    full_entries: int
    entry_nbytes: int

    @property
    def share(self) -> float:
        """Of the full cache's entries, in (0, 1]."""
        return self.entries / self.full_entries

    @property
    def nbytes(self) -> int:
        """Of keys and values; `RaggedCache.nbytes` has head room and bookkeeping besides."""
        return self.entries * self.entry_nbytes

    def __repr__(self) -> str:
        return f"Explanation({self})"

    def __str__(self) -> str:
        each = "the split follows the prompt"
        if self.budgets is not None:
            each = f"{spread(self.budgets)} entries a head"
        full = _megabytes(self.full_entries * self.entry_nbytes)
        size = f"{_megabytes(self.nbytes)} of {full} MB"
        return f"{self.method} of {self.length:,} tokens: {each}, {self.entries:,} in all, {self.share:.1%}, {size}"

    def _repr_html_(self) -> str:
        if self.budgets is None or self.budgets.ndim == 1:
            return f"<p>{escape(str(self))}</p>"
        return grid_html(self.budgets, str(self), unit="entries", heads="KV head", low=0)


class Explained:
    """A method that can say what it will store. A subclass only has to have `plan`."""

    def explain(self, prompt: Prefill | Any, length: int | None = None) -> Explanation:
        """What this method stores: entries a head, share, bytes.

        Args:
            prompt: one layer of a prompt that was read; or, ahead of any, a transformers model or its configuration.
            length: tokens of the prompt that is to come; None with a `Prefill`.

        Raises:
            TypeError: `prompt` is none of these, or `length` is no int.
            ValueError: a length below 1, or one beside a `Prefill`; a profile of another model; one layer for a method
                that decides over all of them.

        >>> from headkv.methods import SnapKV
        >>> from headkv.models import tiny_model
        >>> SnapKV(0.25).explain(tiny_model("llama"), 400)
        Explanation(SnapKV(0.25) of 400 tokens: 100 entries a head, 600 in all, 25.0%, 0.1 of 0.3 MB)
        """
        if isinstance(prompt, Prefill):
            if length is not None:
                raise ValueError(f"length must be None with a Prefill, which has its own, got {length!r}")
            return self._of_layer(prompt)
        if not hasattr(prompt, "config") and not hasattr(prompt, "get_text_config"):
            allowed = "a Prefill, a transformers model or its configuration"
            raise TypeError(f"prompt must be {allowed}, got {type(prompt).__name__}")
        shape = CacheShape.of(prompt)
        length = _checks.whole("length", length, 1)
        for profile in getattr(self, "profiles", ()):
            profile.check_model(prompt)
        budgets = self.budgets_ahead(_blank_layers(shape, length))
        full = shape.num_layers * shape.num_kv_heads * length
        if budgets is None:
            method: Any = self
            reach = [
                length if window is None else min(length, max(1, window - 1)) for window in shape.windows
            ]
            entries = min(round(method.stored_share(length) * full), sum(reach) * shape.num_kv_heads)
        else:
            entries = int(torch.stack(budgets).sum())
        return Explanation(
            brief(self) if is_dataclass(self) else repr(self),
            length,
            None if budgets is None else torch.stack(budgets),
            entries,
            full,
            2 * shape.head_dim * shape.dtype.itemsize,
        )

    def budgets_ahead(self, layers: Sequence[Prefill]) -> list[Tensor] | None:
        """Entries that each KV head will store, `[H]` int64 a layer; None where the split follows the prompt.

        Here for methods whose `plan` looks at shapes alone: it is asked.

        Args:
            layers: of a prompt of which no more than the shape is known; all numbers are 0.
        """
        return [self.plan(layer).stored(layer.sliding_window) for layer in layers]

    def _of_layer(self, prefill: Prefill) -> Explanation:
        if getattr(self, "whole_prompt", False):
            allowed = "a model, with a length, for a method that decides over all layers at once"
            raise ValueError(f"prompt must be {allowed}, got the Prefill of one for {brief(self)}")
        stored = self.plan(prefill).stored(prefill.sliding_window)
        entry = sum(x.shape[-1] * x.dtype.itemsize for x in (prefill.keys, prefill.values))
        full = prefill.num_kv_heads * prefill.length
        return Explanation(brief(self), prefill.length, stored, int(stored.sum()), full, entry)

    if TYPE_CHECKING:

        def plan(self, prefill: Prefill) -> Keep: ...


def _blank_layers(shape: CacheShape, length: int) -> list[Prefill]:
    """A prompt of zeros, which take no memory."""
    zero = torch.zeros(1, dtype=shape.dtype, device="cpu")
    entries = zero.expand(shape.num_kv_heads, length, shape.head_dim)
    return [
        Prefill(entries[:, :0], entries, entries, i, shape.num_layers, 1.0, window)
        for i, window in enumerate(shape.windows)
    ]


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f}"
