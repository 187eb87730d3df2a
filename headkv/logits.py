"""The one formula of a logit, and of what a query may not see; the greatest weights that follow from both."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 24  # logits held at a time: 64 MiB


@dataclass(frozen=True)
class Rule:
    """How a layer's queries meet its keys.

    Attributes:
        scale: what products of queries and keys are multiplied with; positive and finite.
        sliding_window: the model's own window: a query sees this many last positions, itself included; None for all.
        softcap: c where logits are `c * tanh(logit / c)` (Gemma 2); None: they are as they are.

    Raises:
        ValueError: a number that is not as described.

    >>> rule = Rule(scale=0.5, softcap=2.0)
    >>> rule.logits(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 5.0], [100.0, 0.0]])).tolist()
    [[0.9242343306541443, 2.0]]
    """

    scale: float
    sliding_window: int | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be None or positive and finite, got {self.scale}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be None or at least 1, got {self.sliding_window}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be None or positive, got {self.softcap}")

    @classmethod
    def of(
        cls, head_dim: int, scale: float | None, sliding_window: int | None, softcap: float | None
    ) -> Rule:
        """The rule of heads of width `head_dim`, whose usual scale is `head_dim ** -0.5`."""
        return cls(float(head_dim**-0.5 if scale is None else scale), sliding_window, softcap)

    def logits(self, q: Tensor, keys: Tensor) -> Tensor:
        """`[..., m, D]` by `[..., n, D]` to `[..., m, n]`, in their dtype; nothing is hidden yet."""
        return self.cap(q @ keys.mT * self.scale)

    def cap(self, logits: Tensor) -> Tensor:
        """Scaled products, soft-capped where the model does so."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def hides(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Which keys a query does not see: those after it, and those that left its sliding window.

        Args:
            queries, keys: whole numbers, positions in the text, of shapes that broadcast.

        >>> Rule(1.0, sliding_window=2).hides(torch.tensor([[1], [3]]), torch.arange(4)).long().tolist()
        [[0, 0, 1, 1], [1, 1, 0, 0]]
        """
        hidden = keys > queries
        return hidden if self.sliding_window is None else hidden | (queries - keys >= self.sliding_window)


def greatest_weights(queries: Tensor, keys: Tensor, positions: Tensor, rule: Rule) -> Tensor:
    """The greatest weight that any of the queries gives to each key.

    Args:
        queries: `[HQ, m, D]`, of the last m keys' tokens.
        keys: `[H, k, D]`.
        positions: `[k]` int64, increasing, where the keys stand in the text.
        rule: how queries meet keys.

    Returns:
        `[H, k]` float32.
    """
    (heads, k, dim), m = keys.shape, queries.shape[1]
    keys, grouped = keys.float(), queries.float().reshape(heads, -1, m, dim)  # [H, G, m, D]
    step = max(1, BLOCK // (grouped.shape[1] * k))  # queries at a time
    best = torch.zeros(heads, k, device=keys.device)
    for first in range(0, m, step):
        rows = slice(first, min(first + step, m))
        hidden = rule.hides(positions[k - m :][rows, None], positions)
        for h in range(heads):
            logits = rule.logits(grouped[h, :, rows], keys[h]).masked_fill_(hidden, -torch.inf)
            best[h] = torch.maximum(best[h], logits.softmax(-1).amax((0, 1)))
    return best
