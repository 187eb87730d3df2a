"""The moves of a layer's entries, and their rounding, by the fastest equal of the torch specification at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from headkv.cache import layout, quantised, residual, rust, triton
from headkv.cache.rows import Pools, Rows


def gather(pools: Pools, source: Tensor) -> Pools:
    """New pools whose slot `i` is slot `source[i]` of `pools`; see `layout.gather`."""
    if pools.keys.device.type == "cpu" and rust.available():
        return rust.gather(pools, source)
    return layout.gather(pools, source)


def quantise(pools: Pools, bits: tuple[int, int]) -> Pools:
    """Pools of float entries as codes of so many bits; see `quantised.quantised_pools`."""
    if pools.keys.device.type == "cpu" and rust.available():
        return rust.quantise(pools, bits)
    return quantised.quantised_pools(pools, bits)


def append(rows: Rows, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
    """Write T new tokens behind each row, in place, and lengthen the rows.

    Args:
        rows: have room for T more entries each; `seen` is still the position of the first new token.
        keys, values: `[B, H, T, D]`.
        valid: `[B, T]` bool or None; only True tokens are stored.
    """
    if rows.device.type == "cpu" and rust.available():
        rust.append(rows, keys, values, valid)
    elif rows.device.type == "cuda" and triton.available():
        triton.append(rows, keys, values, valid)
    else:
        append_reference(rows, keys, values, valid)


def append_reference(rows: Rows, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
    """What `append` does, in plain torch: its specification."""
    tokens, head_dim = keys.shape[2:]
    positions = torch.arange(rows.seen, rows.seen + tokens, dtype=torch.int32, device=rows.device)
    end = rows.start + rows.length
    new = Pools(keys.reshape(-1, head_dim), values.reshape(-1, head_dim), positions.repeat(rows.rows))
    if rows.scales is not None:
        new = quantised.quantised_pools(new, quantised.bits_of(rows.pools))
    if valid is None:
        slots = (end[:, None] + torch.arange(tokens, device=rows.device)).reshape(-1)
        length = rows.length + tokens
    else:
        stored = valid.repeat_interleave(rows.num_kv_heads, dim=0)  # [rows, T]
        slots = (end[:, None] + stored.cumsum(1) - 1)[stored]
        picked, length = stored.reshape(-1), rows.length + stored.sum(1)
        new = new.each(lambda pool: pool[picked])
    held = residual.appended(rows, keys, values, valid)
    layout.scatter(rows.pools, slots, new)
    residual.write(rows, held)
    rows.length = length
