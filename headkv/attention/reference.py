"""The specification of attention over a ragged layer: a loop over rows in plain torch, nothing clever.

Every backend equals this file. It accumulates in float32 (float64 when the queries are) and returns the dtype of `q`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headkv.cache.ragged import RaggedLayer
from headkv.logits import Rule


def decode(q: Tensor, layer: RaggedLayer, rule: Rule) -> Tensor:
    """One new token a sequence, already appended. `q` `[B, HQ, D]` -> `[B, HQ, D]`."""
    last = torch.full((q.shape[0], 1), layer.seen - 1, device=q.device)
    return extend(q[:, :, None], layer, rule, query_positions=last)[:, :, 0]


def extend(q: Tensor, layer: RaggedLayer, rule: Rule, *, query_positions: Tensor) -> Tensor:
    """T new tokens, already appended, causal among themselves. `q` `[B, HQ, T, D]` -> `[B, HQ, T, D]`."""
    work = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape, dtype=work, device=q.device)
    group = q.shape[1] // layer.num_kv_heads
    for b in range(layer.batch_size):
        for h in range(layer.num_kv_heads):
            heads = slice(h * group, (h + 1) * group)
            keys, values, positions = layer.row(b, h)
            keys, values = keys.to(work), values.to(work)
            own = rule.of_heads([h], layer.num_kv_heads)
            for t, position in enumerate(query_positions[b]):
                query = q[b, heads, t].to(work)
                eligible, visible = visible_entries(layer, b, h, positions, position, rule)
                logits, entries = rule.logits(query, keys[visible]), values[visible]  # [G, visible]
                mean = compensation_entry(layer, b, h, keys, values, eligible & ~visible)
                if mean is not None:
                    mean_key, mean_value, n = mean
                    logit = rule.logits(query, mean_key[None]) + n.log()
                    logits, entries = torch.cat([logits, logit], 1), torch.cat([entries, mean_value[None]])
                if entries.shape[0]:
                    out[b, heads, t] = own.softmax(logits[:, None])[:, 0] @ entries
    return out.to(q.dtype)


def visible_entries(
    layer: RaggedLayer, batch: int, head: int, positions: Tensor, position: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Which entries of a row a query at `position` may see: `[n]` bool by causality alone, and then also by the model's
    sliding window and by the row's own window (its first `sinks` and its last `recent` entries)."""
    r = batch * layer.num_kv_heads + head
    eligible = positions <= position
    visible = ~rule.hides(position, positions)
    if layer.recent[r] > 0:
        entry = torch.arange(positions.numel(), device=positions.device)
        newest = eligible.sum() - 1
        visible &= (entry < layer.sinks[r]) | (entry > newest - layer.recent[r])
    return eligible, visible


def compensation_entry(
    layer: RaggedLayer, batch: int, head: int, keys: Tensor, values: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The one entry that stands for everything outside a compensating row's window: its mean key `[D]`, its mean value
    `[D]` and the number N of entries; its logit gets ln N (RazorAttention, arXiv 2407.15891, section 3.2)."""
    r = batch * layer.num_kv_heads + head
    if layer.count is None or layer.key_sum is None or layer.value_sum is None or layer.count[r] < 0:
        return None
    n = (layer.count[r] + hidden.sum()).to(keys.dtype)
    if n == 0:
        return None
    key, value = layer.key_sum[r] + keys[hidden].sum(0), layer.value_sum[r] + values[hidden].sum(0)
    return (key / n).to(keys.dtype), (value / n).to(keys.dtype), n
