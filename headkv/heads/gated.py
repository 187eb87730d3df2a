"""Attention of many configurations over one text: each head sees all of it, what a streaming head keeps, or a mix.

Softmax over two sets of entries is the mean of the softmax over each, weighted by their shares of the exponentials. So
what is near (kept by a streaming head, and the new tokens) and what is far are attended to apart, and a gate says how
much of the far share is taken: 1 is full attention, 0 is that of a streaming head, and between them their mix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headkv.logits import Rule


def gated_attention(
    queries: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    far: slice,
    gates: Tensor,
    opened: Sequence[int],
    rule: Rule,
) -> Tensor:
    """Attend to a text that all rows share, and to each row's own new tokens, which see each other causally.

    Logits and softmax are float32 at least.

    Args:
        queries: [R, H, G, T, D] of the new tokens.
        key, value: [R, H, T, D] of the new tokens.
        keys, values: [H, n, D] of the text; of a sliding layer what its window can still see.
        far: entries of the text that a streaming head does not keep; none for a sliding layer.
        gates: [R, H].
        opened: heads whose gate is not 0 in all rows; the others' far entries are not touched.
        rule: how queries meet keys.

    Returns:
        [R, H, G, T, D].
    """
    new, queries = queries.shape[3], queries * rule.scale
    near_keys, near_values = (torch.cat([x[:, : far.start], x[:, far.stop :]], dim=1) for x in (keys, values))
    columns = near_keys.shape[1]
    logits = torch.cat([_products(queries, near_keys), queries @ key[:, :, None].mT], dim=-1)
    at = torch.arange(columns + new, device=queries.device)
    hidden = rule.hides(at[columns:, None], at)
    logits = rule.cap(_precise(logits)).masked_fill(hidden, -torch.inf)  # [R, H, G, T, columns + T]
    weights = rule.softmax(logits).to(value.dtype)
    output = _weighted(weights[..., :columns], near_values) + weights[..., columns:] @ value[:, :, None]
    if far.stop == far.start or not opened:
        return output
    some = slice(None) if len(opened) == len(keys) else list(opened)
    far_logits = rule.cap(_precise(_products(queries[:, some], keys[some, far])))
    # Of what is far, [R, H, G, T].
    share = torch.sigmoid(far_logits.logsumexp(-1) - rule.lse(logits)[:, some])
    taken = (gates[:, some, None, None] * share)[..., None].to(value.dtype)
    change = taken * (_weighted(far_logits.softmax(-1).to(value.dtype), values[some, far]) - output[:, some])
    if isinstance(some, slice):
        return output + change
    return output.index_add(1, torch.tensor(some, device=queries.device), change)


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    """Queries [R, H, G, T, D] with keys [H, m, D] that all rows share: [R, H, G, T, m], one product a head."""
    rows, heads, group, new, _ = queries.shape
    flat = queries.transpose(0, 1).flatten(1, 3) @ keys.mT  # [H, R * G * T, m]
    return flat.view(heads, rows, group, new, -1).transpose(0, 1)


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Weights [R, H, G, T, m] with values [H, m, D] that all rows share: [R, H, G, T, D]."""
    rows, heads, group, new, _ = weights.shape
    flat = weights.transpose(0, 1).flatten(1, 3) @ values
    return flat.view(heads, rows, group, new, -1).transpose(0, 1)


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
