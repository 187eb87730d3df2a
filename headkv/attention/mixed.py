"""Attention over a layer whose heads are stored in several parts: over each part, put together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headkv.cache import RaggedLayer
from headkv.cache.mixed import Store
from headkv.logits import Rule


def by_part(run: Callable[..., Tensor], layer: Store, q: Tensor, *new: Tensor, rule: Rule) -> Tensor:
    """`run(q, *new, layer=layer, rule=rule)`, for the heads of each part of a layer by themselves.

    Args:
        run: a backend's attention of a `RaggedLayer`.
        q: `[B, HQ, ...]`; so is what comes back, in the same dtype.
        new: of each KV head something, `[B, H, ...]`.
    """
    if isinstance(layer, RaggedLayer):
        return run(q, *new, layer=layer, rule=rule)
    out, heads = torch.empty_like(q), layer.num_kv_heads
    grouped, answers = (x.unflatten(1, (heads, -1)) for x in (q, out))
    for part, where in zip(layer.parts, layer.where, strict=True):
        own = run(
            grouped[:, where].flatten(1, 2),
            *(x[:, where] for x in new),
            layer=part,
            rule=rule.of_heads(where, heads),
        )
        answers[:, where] = own.unflatten(1, (part.num_kv_heads, -1))
    return out
