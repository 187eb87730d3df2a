"""Attention weights of some queries, and their reduction over a group, for scorers that look at them."""

from __future__ import annotations

import torch
from torch import Tensor

from headkv.logits import Rule

REDUCTIONS = ("mean", "max", "sum")


def attention_weights(queries: Tensor, keys: Tensor, first: int, rule: Rule) -> Tensor:
    """Causal attention weights in float32 whatever the input's dtype: rounding would make ties.

    Args:
        queries: `[H, G, w, D]`, of the positions `first .. first + w - 1`.
        keys: `[H, n, D]`, of the positions `0 .. n - 1`.
        first: position of the first query.
        rule: how queries meet keys, of these heads alone.

    Returns:
        `[H, G, w, n]` float32; each row sums to 1, or less where its head has a sink.
    """
    heads, group, w, dim = queries.shape
    n = keys.shape[1]
    logits = _products(queries.reshape(heads, group * w, dim), keys, rule.scale).view(heads, group, w, n)
    logits = rule.cap(logits)
    # Without a sliding window no key before the first query is hidden.
    begin = first if rule.sliding_window is None else 0
    query = torch.arange(first, first + w, device=keys.device)[:, None]
    key = torch.arange(begin, n, device=keys.device)
    logits[..., begin:].masked_fill_(rule.hides(query, key), -torch.inf)
    return rule.softmax(logits)


def _products(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """`[H, m, D]` by `[H, n, D]` to `[H, m, n]` float32, with all digits that 16-bit queries and keys have."""
    narrow = queries.dtype == keys.dtype and keys.element_size() == 2
    if queries.is_cuda and narrow and "dtype" in torch.ops.aten.bmm.overloads():  # torch 2.8 on: tensor cores
        return torch.bmm(queries, keys.transpose(1, 2), out_dtype=torch.float32).mul_(scale)
    return (queries.float() * scale) @ keys.float().transpose(1, 2)


def reduce_group(weights: Tensor, reduce: str) -> Tensor:
    """`[H, G, ...]` to `[H, ...]`: one value a KV head from the query heads that share it."""
    if reduce == "max":
        return weights.amax(1)
    return weights.mean(1) if reduce == "mean" else weights.sum(1)
