"""Append: new entries go behind each row, in place, and the lengths grow in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headkv_kernels.arguments import New, Strided
from headkv_kernels.quantised import store_codes, turned_from
from headkv_kernels.residual import ring_slots, store_turned
from headkv_kernels.rows import FUSED, Rows, guard, padded


def ragged_append(
    rows: Rows,
    capacity: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    seen: int | Tensor,
    valid: Tensor | None = None,
) -> None:
    """Store T new tokens behind every row and add them to `rows.length`, both in place.

    Args:
        rows: with room for the new tokens. Whatever the lengths say, nothing is written beyond a row's
            capacity, and its length then counts what was stored.
        capacity: `[rows]` int64, slots that each row owns.
        keys, values: `[B, H, T, D]` in the dtype of the rows; any strides, but 1 along D.
        seen: position of the first new token: an int, or `[1]` int64 on the device, read anew at every
            replay of a CUDA graph.
        valid: `[B, T]` bool, False where the new text is padding, which is counted but not stored.

    Raises:
        ValueError, TypeError: before anything is launched.
    """
    device, dtype, dim = rows.keys.device, rows.dtype, rows.dim
    if (
        keys.ndim != 4
        or 0 in keys.shape
        or keys.shape[0] * keys.shape[1] != rows.number
        or keys.shape[3] != dim
    ):
        raise ValueError(
            f"keys must have shape [B, H, T >= 1, {dim}], B * H = {rows.number}, got {list(keys.shape)}"
        )
    for name, new in (("keys", keys), ("values", values)):
        if new.dtype != dtype or new.device != device:
            raise TypeError(
                f"{name} must be {dtype} on {device} like the rows, got {new.dtype} on {new.device}"
            )
        if new.shape != keys.shape or new.stride(-1) != 1:
            got = f"{list(new.shape)} with strides {list(new.stride())}"
            raise ValueError(f"{name} must have shape {list(keys.shape)} and stride 1 along D, got {got}")
    if capacity.dtype != torch.int64 or capacity.shape != rows.length.shape or capacity.device != device:
        raise ValueError(
            f"capacity must be int64 [{rows.number}] on {device}, got {capacity.dtype} {list(capacity.shape)}"
        )
    batch, heads, tokens = keys.shape[:3]
    if valid is not None and (
        valid.dtype != torch.bool or valid.shape != (batch, tokens) or valid.device != device
    ):
        raise ValueError(
            f"valid must be bool [{batch}, {tokens}] on {device}, got {valid.dtype} {list(valid.shape)}"
        )
    if not isinstance(seen, Tensor):
        seen = torch.full((1,), seen, device=device)
    elif seen.dtype != torch.int64 or seen.numel() != 1 or seen.device != device:
        raise ValueError(f"seen must be an int or int64 [1] on {device}, got {seen.dtype} {list(seen.shape)}")
    with guard(keys):
        append_rows[(rows.number,)](
            New(Strided.of(keys), Strided.of(values), seen),
            None if valid is None else valid.contiguous(),
            tokens,
            rows.table(heads, capacity.contiguous()),
            rows.pools,
            D=dim,
            D_PAD=padded(dim),
            BLOCK=min(32, padded(tokens, 1)),
            **FUSED,
        )


@triton.jit
def append_rows(
    new, valid, tokens, rows, pools, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row: its new tokens, a block at a time."""
    row = tl.program_id(0)
    batch, head = (row // rows.heads).to(tl.int64), row % rows.heads
    n, d = tl.arange(0, BLOCK), tl.arange(0, D_PAD)
    base, entries = tl.load(rows.start + row), tl.load(rows.length + row)
    room, now = tl.load(rows.capacity + row), tl.load(new.seen)
    if rows.residual is not None:  # tokens that others of this call push out again must not be written at all
        number = room * 0
        if valid is None:
            number += tokens
        else:
            for i in range(0, tokens, BLOCK):
                some = tl.load(valid + batch * tokens + i + n, mask=i + n < tokens, other=0)
                number += tl.sum((some != 0).to(tl.int64))
        number = tl.minimum(number, room - entries)
        oldest = entries + number - rows.ring_size
        held = tl.minimum(tl.load(rows.residual + row) + number, rows.ring_size)
        tl.store(rows.residual + row, held)
    for i in range(0, tokens, BLOCK):
        token = (i + n).to(tl.int64)
        stored = token < tokens
        if valid is not None:
            stored = stored & (tl.load(valid + batch * tokens + token, mask=stored, other=0) != 0)
        entry = entries + tl.cumsum(stored.to(tl.int32), 0) - 1
        stored = stored & (entry < room)
        slot = base + entry
        both = stored[:, None] & (d < D)[None, :]
        target = slot[:, None] * D + d[None, :]
        for_keys = batch * new.key.batch + head * new.key.head + token * new.key.token
        for_values = batch * new.value.batch + head * new.value.head + token * new.value.token
        key = tl.load(new.key.data + for_keys[:, None] + d[None, :], mask=both)
        value = tl.load(new.value.data + for_values[:, None] + d[None, :], mask=both)
        if pools.scale is None:
            tl.store(pools.key + target, key, mask=both)
            tl.store(pools.value + target, value, mask=both)
        else:
            key, value = turned_from(key, D), turned_from(value, D)
            store_codes(key, pools.key, pools.scale, slot, stored, D)
            store_codes(value, pools.value, pools.scale + 1, slot, stored, D)
            if rows.residual is not None:
                at = ring_slots(rows, row, entry)
                store_turned(key, rows.residual_key, at, stored & (entry >= oldest), D)
                store_turned(value, rows.residual_value, at, stored & (entry >= oldest), D)
        tl.store(pools.position + slot, (now + token).to(tl.int32), mask=stored)
        entries += tl.sum(stored.to(tl.int32))
    tl.store(rows.length + row, entries)
