"""Attention of a prefill over dense keys and values: what torch has, without padding and without n x n."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headkv.attention import streaming
from headkv.logits import Rule

TOKENS = 1 << 14  # of the rows served at once where rows differ; a longer row is served without a copy


def prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rule: Rule,
    *,
    valid: Tensor | None = None,
    sinks: Tensor | None = None,
    recent: Tensor | None = None,
    compensate: Tensor | None = None,
) -> Tensor:
    """Causal attention of whole prompts.

    Args:
        q: `[B, HQ, n, D]`.
        keys, values: `[B, H, n, D]`.
        rule: how queries meet keys. With sinks no gradient passes.
        valid: `[B, n]` bool, False where the prompt is padding: such tokens neither ask nor are seen, and get 0.
        sinks, recent: `[B, H]` int: rows with `recent > 0` stream, they only see the first `sinks` and last `recent`
            tokens, see `streaming.attend`. Default: every row sees all.
        compensate: `[B, H]` bool: streaming rows whose mean entry stands for what they do not see. Default: none.

    Returns:
        `[B, HQ, n, D]` in the dtype of `q`.
    """
    rule.check_heads(q)
    windows = None
    if sinks is not None and recent is not None:
        compensate = torch.zeros_like(recent) if compensate is None else compensate
        windows = torch.stack([sinks, recent, compensate], -1).tolist()
    if valid is None or bool(valid.all()):
        return _by_kind(q, keys, values, torch.arange(q.shape[2], device=q.device), windows, rule)
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        where = valid[b].nonzero()[:, 0]
        if where.numel() == 0:
            continue
        sequence = (q[b : b + 1, :, where], keys[b : b + 1, :, where], values[b : b + 1, :, where])
        own = None if windows is None else windows[b : b + 1]
        out[b, :, where] = _by_kind(*sequence, where, own, rule)[0]
    return out


def _by_kind(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    windows: list[list[list[int]]] | None,
    rule: Rule,
) -> Tensor:
    """Rows of one kind together: `windows[batch][head] = [sinks, recent, compensate]`, or None."""
    n, everything = q.shape[2], (0, 0, 0)
    kinds: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for b, heads in enumerate(windows or ()):
        for h, window in enumerate(heads):
            streams = window[1] > 0 and window[0] + window[1] < n
            kinds.setdefault(tuple(window) if streams else everything, []).append((b, h))
    if kinds.keys() <= {everything}:
        return _causal(q, keys, values, positions, rule)
    num_kv_heads = keys.shape[1]
    q = q.unflatten(1, (num_kv_heads, -1))
    out = torch.empty_like(q)
    for kind, pairs in kinds.items():
        step = max(1, TOKENS // n)
        for some in (pairs[i : i + step] for i in range(0, len(pairs), step)):
            some_q, some_keys, some_values = (_rows(x, some) for x in (q, keys, values))
            own = rule.of_heads((h for _, h in some), num_kv_heads)
            if kind == everything:
                got = _causal(some_q, some_keys[:, None], some_values[:, None], positions, own)
            else:
                sinks, recent, compensate = kind
                got = streaming.attend(
                    *(some_q, some_keys, some_values, positions, own),
                    sinks=sinks,
                    recent=recent,
                    compensate=bool(compensate),
                )
            for (b, h), row in zip(some, got, strict=True):
                out[b, h] = row
    return out.flatten(1, 2)


def _rows(x: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    """The rows `(batch, head)` of `[B, H, ...]`, together; a single one is not copied."""
    rows = [x[b, h] for b, h in pairs]
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def _causal(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, rule: Rule) -> Tensor:
    n, window = q.shape[2], rule.sliding_window
    plain = rule.softcap is None and rule.sink_logits is None
    if plain and (window is None or int(positions[-1] - positions[0]) < window):
        causal = n > 1
        return F.scaled_dot_product_attention(
            q, keys, values, is_causal=causal, scale=rule.scale, enable_gqa=True
        )
    # A row that streams with a window of the whole prompt: its blocks know sliding windows, softcaps and LSEs.
    rows = q.unflatten(1, (keys.shape[1], -1)).flatten(0, 1)  # [B * H, G, n, D]
    pools = keys.flatten(0, 1), values.flatten(0, 1)
    return streaming.attend(rows, *pools, positions, rule, sinks=0, recent=n).reshape(q.shape)
