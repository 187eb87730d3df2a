"""A row's newest entries as they came, beside their codes, as `headkv.cache.residual` specifies them.

They lie rotated in the row's ring, so that the rotated query of `quantised.py` meets them as it meets codes.
"""

import triton
import triton.language as tl

from headkv_kernels.softmax import add_block, base_two, load_entries


@triton.jit
def newest_from(entries, held, recent):
    """The first of a row's entries that attention sees as it came: of a windowed row at the earliest the window's."""
    return entries - tl.where(recent > 0, tl.minimum(held, recent), held)


@triton.jit
def before_newest(first, front, back, newest):
    """Of what `spans` shows how many entries of the front, and how many of all, come before the entry `newest`."""
    front = tl.minimum(front, tl.maximum(newest - first, 0))
    return front, front + tl.maximum(newest - back, 0)


@triton.jit
def ring_slots(rows, row, entry):
    """Where the entries `[N]` of a row lie in the rings of all rows."""
    return row.to(tl.int64) * rows.ring_size + entry.to(tl.int32) % rows.ring_size


@triton.jit
def store_turned(turned, rings, at, here, D: tl.constexpr):
    """New keys or values, rotated, `[M, D_PAD]` into the slots `at` `[M]` of the rings that are `here`; returns them in
    float32 as they are there."""
    d = tl.arange(0, turned.shape[1])[None, :]
    turned = turned.to(rings.dtype.element_ty)
    tl.store(rings + at[:, None] * D + d, turned, mask=here[:, None] & (d < D))
    return turned.to(tl.float32)


@triton.jit
def add_newest(
    query, query_positions, rows, pools, new, rule, segment, top, total, acc,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """The row's stored entries that are seen as they came."""
    stop = segment.entries - segment.grows
    for begin in range(segment.newest, stop, BLOCK):
        entry = begin + tl.arange(0, BLOCK)
        visible = (entry >= segment.first) & (entry < stop)
        visible = visible & ((entry < segment.first + segment.front) | (entry >= segment.back))
        if rule.sliding_window is not None:
            where = new.seen if new is not None else query_positions + segment.row // rows.heads
            position = tl.load(pools.position + segment.base + entry, mask=visible, other=0)
            visible = visible & (tl.load(where) - position < rule.sliding_window)
        at = ring_slots(rows, segment.row, entry)
        keys = load_entries(rows.residual_key, at, visible, D, D_PAD, OPERAND)
        values = load_entries(rows.residual_value, at, visible, D, D_PAD, OPERAND)
        logits = tl.dot(query, tl.trans(keys), input_precision="ieee") * rule.scale
        logits = tl.where(visible[None, :], base_two(logits, rule), -float("inf"))
        top, total, acc = add_block(logits, values, top, total, acc)
    return top, total, acc
