"""The one formula of a logit, of what a query may not see, and of weights; the greatest weights that follow."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Logits held at a time: on a CPU 4 MiB, which stay in its caches from the product to the greatest; elsewhere 64 MiB.
BLOCK, BLOCK_CPU = 1 << 24, 1 << 20


@dataclass(frozen=True, eq=False)
class Rule:
    """How a layer's queries meet its keys.

    Attributes:
        scale: what products of queries and keys are multiplied with; positive and finite.
        sliding_window: the model's own window: a query sees this many last positions, itself included; None for all.
        softcap: c where logits are `c * tanh(logit / c)` (Gemma 2); None: they are as they are.
        sink_logits: `[HQ]`, of any floating dtype: of each query head one more logit, learned, that has no value
            (GPT-OSS). Weights sum to less than 1 then. -inf: that head has none; None: no head has.

    Raises:
        ValueError: a number that is not as described. Sinks on a GPU are not looked at: that would wait for it.
        TypeError: sinks that are no floating tensor.

    >>> rule = Rule(scale=0.5, softcap=2.0)
    >>> rule.logits(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 5.0], [100.0, 0.0]])).tolist()
    [[0.9242343306541443, 2.0]]
    """

    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be None or positive and finite, got {self.scale}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be None or at least 1, got {self.sliding_window}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be None or positive, got {self.softcap}")
        if (sinks := self.sink_logits) is None:
            return
        if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
            got = getattr(sinks, "dtype", type(sinks).__name__)
            raise TypeError(f"sink_logits must be None or a floating tensor [HQ], got {got}")
        if sinks.ndim != 1:
            raise ValueError(f"sink_logits must have shape [HQ], got {list(sinks.shape)}")
        if sinks.device.type == "cpu" and not bool((sinks < math.inf).all()):
            raise ValueError(f"sink_logits must be below infinity (-inf: no sink), got {sinks.tolist()}")

    @classmethod
    def of(
        cls,
        head_dim: int,
        scale: float | None,
        sliding_window: int | None,
        softcap: float | None,
        sink_logits: Tensor | None = None,
    ) -> Rule:
        """The rule of heads of width `head_dim`, whose usual scale is `head_dim ** -0.5`."""
        scale = float(head_dim**-0.5 if scale is None else scale)
        return cls(scale, sliding_window, softcap, sink_logits)

    def check_heads(self, q: Tensor) -> None:
        """One sink for each of the query heads of `q` `[B, HQ, ...]`, on its device.

        Raises:
            ValueError: it is otherwise.
        """
        if (sinks := self.sink_logits) is None:
            return
        if sinks.shape != q.shape[1:2]:
            raise ValueError(
                f"sink_logits must have shape [{q.shape[1]}] like the heads of q, got {list(sinks.shape)}"
            )
        if sinks.device != q.device:
            raise ValueError(f"sink_logits must be on {q.device} like q, got {sinks.device}")

    def of_heads(self, heads: Iterable[int] | slice | Tensor, num_kv_heads: int) -> Rule:
        """The same for the query heads of these of `num_kv_heads` KV heads alone."""
        if self.sink_logits is None:
            return self
        groups = self.sink_logits.unflatten(0, (num_kv_heads, -1))
        some = (
            groups[heads] if isinstance(heads, (slice, Tensor)) else torch.stack([groups[h] for h in heads])
        )
        return replace(self, sink_logits=some.flatten())

    def sinks(self, shape: torch.Size) -> Tensor:
        """Of each query head its sink, of a shape whose last dimensions count the heads; only where there are sinks."""
        assert self.sink_logits is not None
        return self.sink_logits.repeat(shape.numel() // self.sink_logits.numel()).view(shape)

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

    def softmax(self, logits: Tensor) -> Tensor:
        """Weights `[..., HQ, m, n]` of logits of that shape; heads may also be `[..., H, G, m, n]`.

        >>> Rule(1.0, sink_logits=torch.tensor([0.0])).softmax(torch.zeros(1, 1, 3)).tolist()
        [[[0.25, 0.25, 0.25]]]
        """
        if self.sink_logits is None:
            return logits.softmax(-1)
        sinks = self.sinks(logits.shape[:-2]).to(logits.dtype)[..., None, None]
        return torch.cat([logits, sinks.expand(*logits.shape[:-1], 1)], -1).softmax(-1)[..., :-1]

    def lse(self, logits: Tensor) -> Tensor:
        """The logarithm of what `softmax` divides by, `[..., HQ, m]`."""
        lse = logits.logsumexp(-1)
        if self.sink_logits is None:
            return lse
        return torch.logaddexp(lse, self.sinks(lse.shape[:-1]).to(lse.dtype)[..., None])


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
    block = BLOCK_CPU if keys.device.type == "cpu" else BLOCK
    step = max(1, block // (grouped.shape[1] * k))  # queries at a time
    best = torch.zeros(heads, k, device=keys.device)
    for first in range(0, m, step):
        rows = slice(first, min(first + step, m))
        seen = slice(k - m + rows.stop)  # by the last of these queries
        hidden = rule.hides(positions[k - m :][rows, None], positions[seen])
        for h in range(heads):
            logits = rule.logits(grouped[h, :, rows], keys[h, seen]).masked_fill_(hidden, -torch.inf)
            weights = rule.of_heads([h], heads).softmax(logits)
            best[h, seen] = torch.maximum(best[h, seen], weights.amax((0, 1)))
    return best
