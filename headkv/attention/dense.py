"""Attention of a prefill over dense keys and values: what torch has, without padding and without n x n."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headkv.attention import streaming

TOKENS = 1 << 14  # of the rows served at once where rows differ; a longer row is served without a copy


def prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    valid: Tensor | None = None,
    sinks: Tensor | None = None,
    recent: Tensor | None = None,
    compensate: Tensor | None = None,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of whole prompts.

    Args:
        q: `[B, HQ, n, D]`.
        keys, values: `[B, H, n, D]`.
        valid: `[B, n]` bool, False where the prompt is padding: such tokens neither ask nor are seen, and get 0.
        sinks, recent: `[B, H]` int: rows with `recent > 0` stream, they only see the first `sinks` and last `recent`
            tokens, see `streaming.attend`. Default: every row sees all.
        compensate: `[B, H]` bool: streaming rows whose mean entry stands for what they do not see. Default: none.
        scale, sliding_window, softcap: as in `ragged_decode`.

    Returns:
        `[B, HQ, n, D]` in the dtype of `q`.
    """
    options: dict[str, Any] = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap}
    windows = None
    if sinks is not None and recent is not None:
        compensate = torch.zeros_like(recent) if compensate is None else compensate
        windows = torch.stack([sinks, recent, compensate], -1).tolist()
    if valid is None or bool(valid.all()):
        return _by_kind(q, keys, values, torch.arange(q.shape[2], device=q.device), windows, **options)
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        where = valid[b].nonzero()[:, 0]
        if where.numel() == 0:
            continue
        sequence = (q[b : b + 1, :, where], keys[b : b + 1, :, where], values[b : b + 1, :, where])
        own = None if windows is None else windows[b : b + 1]
        out[b, :, where] = _by_kind(*sequence, where, own, **options)[0]
    return out


def _by_kind(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    windows: list[list[list[int]]] | None,
    **options: Any,
) -> Tensor:
    """Rows of one kind together: `windows[batch][head] = [sinks, recent, compensate]`, or None."""
    n, everything = q.shape[2], (0, 0, 0)
    kinds: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for b, heads in enumerate(windows or ()):
        for h, window in enumerate(heads):
            streams = window[1] > 0 and window[0] + window[1] < n
            kinds.setdefault(tuple(window) if streams else everything, []).append((b, h))
    if kinds.keys() <= {everything}:
        return _causal(q, keys, values, positions, **options)
    q = q.unflatten(1, (keys.shape[1], -1))
    out = torch.empty_like(q)
    for kind, pairs in kinds.items():
        step = max(1, TOKENS // n)
        for some in (pairs[i : i + step] for i in range(0, len(pairs), step)):
            some_q, some_keys, some_values = (_rows(x, some) for x in (q, keys, values))
            if kind == everything:
                got = _causal(some_q, some_keys[:, None], some_values[:, None], positions, **options)
            else:
                own: dict[str, Any] = dict(zip(("sinks", "recent", "compensate"), kind, strict=True))
                got = streaming.attend(some_q, some_keys, some_values, positions, **own, **options)
            for (b, h), row in zip(some, got, strict=True):
                out[b, h] = row
    return out.flatten(1, 2)


def _rows(x: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    """The rows `(batch, head)` of `[B, H, ...]`, together; a single one is not copied."""
    rows = [x[b, h] for b, h in pairs]
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def _causal(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    n = q.shape[2]
    if softcap is None and (sliding_window is None or int(positions[-1] - positions[0]) < sliding_window):
        return F.scaled_dot_product_attention(q, keys, values, is_causal=n > 1, scale=scale, enable_gqa=True)
    # A row that streams with a window of the whole prompt: its blocks know sliding windows and softcaps.
    rows = q.unflatten(1, (keys.shape[1], -1)).flatten(0, 1)  # [B * H, G, n, D]
    options: dict[str, Any] = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap}
    pools = keys.flatten(0, 1), values.flatten(0, 1)
    return streaming.attend(rows, *pools, positions, sinks=0, recent=n, **options).reshape(q.shape)
