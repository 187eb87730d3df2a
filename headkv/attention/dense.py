"""Attention of a prefill over dense keys and values: what torch has, without padding and without n x n."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # queries at a time where a mask is needed


def prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    valid: Tensor | None = None,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of whole prompts.

    Args:
        q: `[B, HQ, n, D]`.
        keys, values: `[B, H, n, D]`.
        valid: `[B, n]` bool, False where the prompt is padding: such tokens neither ask nor are seen, and get 0.
        scale, sliding_window, softcap: as in `ragged_decode`.

    Returns:
        `[B, HQ, n, D]` in the dtype of `q`.
    """
    options: dict[str, Any] = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap}
    if valid is None or bool(valid.all()):
        return _causal(q, keys, values, torch.arange(q.shape[2], device=q.device), **options)
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        where = valid[b].nonzero()[:, 0]
        if where.numel() == 0:
            continue
        sequence = (q[b : b + 1, :, where], keys[b : b + 1, :, where], values[b : b + 1, :, where])
        out[b, :, where] = _causal(*sequence, where, **options)[0]
    return out


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
    out = torch.empty_like(q)
    group = q.shape[1] // keys.shape[1]
    for begin in range(0, n, BLOCK):
        end = min(begin + BLOCK, n)
        first = 0
        if sliding_window is not None:  # the oldest key that any query of this block may see
            first = int((positions > positions[begin] - sliding_window).nonzero()[0])
        distance = positions[begin:end, None] - positions[None, first:end]
        seen = (distance >= 0) & (distance < (sliding_window or n + int(positions[-1]) + 1))
        block_keys, block_values = keys[:, :, None, first:end], values[:, :, None, first:end]
        block_q = q[:, :, begin:end].unflatten(1, (-1, group)).float()  # [B, H, G, block, D]
        logits = block_q @ block_keys.float().transpose(-1, -2) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        out[:, :, begin:end] = (weights @ block_values.float()).flatten(1, 2).to(q.dtype)
    return out
