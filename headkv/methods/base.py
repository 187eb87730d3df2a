"""What a method is: when it is asked, and what it answers (`Keep`, `Windows`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from headkv._brief import brief
from headkv.prefill import Prefill, Prompt


@dataclass(frozen=True, eq=False)
class Keep:
    """What a method answers for one layer of one prompt.

    Attributes:
        mask: `[H, n]` bool, the entries to keep; at least one True a head.
        sinks: `[H]` int64, or None without windowed rows: first entries that a windowed row always sees.
        recent: `[H]` int64, or None: last entries that a windowed row sees; 0 for an ordinary row.
        compensate: `[H]` bool, or None: rows that stand one mean entry in for all that they dropped.

    Raises:
        ValueError: a head that keeps nothing, or shapes that do not belong together.
    """

    mask: Tensor
    sinks: Tensor | None = None
    recent: Tensor | None = None
    compensate: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mask.ndim != 2 or self.mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool [H, n], got {self.mask.dtype} {list(self.mask.shape)}")
        if not bool(self.mask.any(1).all()):
            empty = (~self.mask.any(1)).nonzero()[:, 0].tolist()
            raise ValueError(f"mask must keep at least one entry a head, but heads {empty} keep none")
        if (self.sinks is None) != (self.recent is None):
            raise ValueError("sinks and recent must be given together, or neither")
        for name in ("sinks", "recent", "compensate"):
            given = getattr(self, name)
            if given is not None and given.shape != self.mask.shape[:1]:
                raise ValueError(f"{name} must have shape [{self.mask.shape[0]}], got {list(given.shape)}")

    __repr__ = brief

    def stored(self, sliding_window: int | None = None) -> Tensor:
        """How many entries each head stores, `[H]` int64 on the CPU; one that stands for dropped ones counts as one.

        Args:
            sliding_window: of the layer: what has left it, sinks excepted, is not stored, and nothing stands for it.

        >>> keep = Keep(torch.tensor([[True] * 6, [True] + [False] * 3 + [True] * 2]))
        >>> keep.stored().tolist(), keep.stored(sliding_window=3).tolist()
        ([6, 3], [2, 2])
        """
        mask = self.mask
        if sliding_window is None:
            counts = mask.sum(1)
            return (counts if self.compensate is None else counts + (self.compensate & ~mask.all(1))).cpu()
        age = torch.arange(mask.shape[1] - 1, -1, -1, device=mask.device)
        reach = age < sliding_window - 1
        if self.sinks is not None:
            reach = reach | (mask.cumsum(1) <= self.sinks.to(mask.device)[:, None])
        return (mask & reach).sum(1).clamp(min=1).cpu()

    @classmethod
    def all(cls, prefill: Prefill) -> Keep:
        """Keep every entry."""
        shape = (prefill.num_kv_heads, prefill.length)
        return cls(torch.ones(shape, dtype=torch.bool, device=prefill.keys.device))


@dataclass(frozen=True, eq=False)
class Windows:
    """Which heads of a layer stream while a prompt is read, and what they see.

    Attributes:
        sinks: `[H]` int64, first entries that a streaming head sees.
        recent: `[H]` int64, last entries that it sees; 0 for a head that sees, and keeps, all.
        compensate: `[H]` bool, or None: heads that see one mean entry in place of all others.

    Raises:
        ValueError: shapes that do not belong together, or numbers below 0.
    """

    sinks: Tensor
    recent: Tensor
    compensate: Tensor | None = None

    __repr__ = brief

    def __post_init__(self) -> None:
        if self.recent.ndim != 1:
            raise ValueError(f"recent must have shape [H], got {list(self.recent.shape)}")
        for name in ("sinks", "compensate"):
            given = getattr(self, name)
            if given is not None and given.shape != self.recent.shape:
                raise ValueError(f"{name} must have shape {list(self.recent.shape)}, got {list(given.shape)}")
        for name in ("sinks", "recent"):
            if bool((getattr(self, name) < 0).any()):
                raise ValueError(f"{name} must be at least 0 everywhere, got {getattr(self, name).tolist()}")


class Method(Protocol):
    """Which entries each row keeps of a prompt, decided a layer at a time, while that layer is prefilled.

    That takes the least memory: the layers that were decided, and one whole layer.

    A method whose answer follows from the layer's shape alone may say so by `by_shape = True`: where ranks share a
    model's heads it then needs nothing of the others.
    """

    @property
    def observed_queries(self) -> int | None:
        """How many of the last queries `plan` needs: 0 for none, `headkv.prefill.ALL` (None) for all of them."""

    def plan(self, prefill: Prefill) -> Keep:
        """Decide one layer of one prompt."""


class PromptMethod(Protocol):
    """A method that decides once all layers have read the prompt: budgets over all layers, or the text read again.

    Until then the whole cache is stored, so that its peak is that of the full cache, with what is kept beside it.
    """

    @property
    def observed_queries(self) -> int | None:
        """As in `Method`."""

    @property
    def whole_prompt(self) -> bool:
        """True: `plan_prompt` is asked, and `plan` is not. (No `Method` needs to have this.)"""

    def plan_prompt(self, prompt: Prompt) -> Sequence[Keep]:
        """Decide all layers of one prompt, one `Keep` a layer."""


class StreamingMethod(Method, Protocol):
    """A method that may also ask, ahead of a prompt, that heads stream while it is read. No method has to."""

    def prefill_windows(
        self, *, layer_idx: int, num_layers: int, num_kv_heads: int, length: int | None
    ) -> Windows | None:
        """The windows of one layer, those that `plan` answers too; None: every head sees the whole prompt.

        Args:
            layer_idx, num_layers, num_kv_heads: the layer.
            length: tokens of the prompt; None when it comes in chunks, so that nobody knows. The windows then are all
                that is decided: `plan` is not asked, and heads that do not stream keep all.

        Raises:
            ValueError: the windows depend on a length that is not known.
        """
