"""The two moves of a layer's entries, by the fastest equal of the torch specification that is at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headkv.cache import layout, rust, triton
from headkv.cache.layout import Pools

if TYPE_CHECKING:
    from headkv.cache.ragged import RaggedLayer


def gather(pools: Pools, source: Tensor) -> Pools:
    """New pools whose slot `i` is slot `source[i]` of `pools`; see `layout.gather`."""
    if pools.keys.device.type == "cpu" and rust.available():
        return rust.gather(pools, source)
    return layout.gather(pools, source)


def append(layer: RaggedLayer, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
    """Write T new tokens behind each row, in place, and lengthen the rows.

    Args:
        layer: has room for T more entries in every row; its `seen` is still the position of the first new token.
        keys, values: `[B, H, T, D]`.
        valid: `[B, T]` bool or None; only True tokens are stored.
    """
    if layer.device.type == "cpu" and rust.available():
        rust.append(layer, keys, values, valid)
    elif layer.device.type == "cuda" and triton.available():
        triton.append(layer, keys, values, valid)
    else:
        append_reference(layer, keys, values, valid)


def append_reference(layer: RaggedLayer, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
    """What `append` does, in plain torch: its specification."""
    tokens, head_dim = keys.shape[2:]
    positions = torch.arange(layer.seen, layer.seen + tokens, dtype=torch.int32, device=layer.device)
    end = layer.start + layer.length
    flat_keys, flat_values = keys.reshape(-1, head_dim), values.reshape(-1, head_dim)
    if valid is None:
        slots = (end[:, None] + torch.arange(tokens, device=layer.device)).reshape(-1)
        layout.scatter(layer.pools, slots, flat_keys, flat_values, positions.repeat(layer.rows))
        layer.length = layer.length + tokens
        return
    stored = valid.repeat_interleave(layer.num_kv_heads, dim=0)  # [rows, T]
    slots = end[:, None] + stored.cumsum(1) - 1
    picked = stored.reshape(-1)
    where = positions.repeat(layer.rows)[picked]
    layout.scatter(layer.pools, slots[stored], flat_keys[picked], flat_values[picked], where)
    layer.length = layer.length + stored.sum(1)
