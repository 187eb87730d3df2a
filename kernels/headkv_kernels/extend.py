"""Attention of several new tokens over ragged rows: one program for each row and block of queries.

All that a query may see is a matter of entry numbers: since positions increase along a row, a binary search
finds how many entries are not after the query and how many are too old for a sliding window.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headkv_kernels.rows import FUSED, Rows, check_positions, check_queries, guard, padded
from headkv_kernels.softmax import add_block, add_entry, base_two, load_entries, spans, start_softmax


def ragged_extend(
    q: Tensor,
    rows: Rows,
    *,
    query_positions: Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """T new tokens a sequence, already stored, causal by position. `q` `[B, HQ, T, D]` -> `[B, HQ, T, D]`.

    Args:
        query_positions: `[B, T]` int: a query sees the entries whose position is not after its own.
        scale, softcap, sliding_window: as in `ragged_decode`.

    Raises:
        ValueError, TypeError: before anything is launched.
    """
    group = check_queries(q, rows, 4, scale, sliding_window, softcap)
    batch, _, tokens, dim = q.shape
    check_positions(query_positions, (batch, tokens), rows)
    heads_pad = padded(group, 1)
    operand, compensate, dim_pad = rows.operand(q), rows.count is not None, padded(dim)
    # What a program holds must fit in its registers; float32 is multiplied without tensor cores.
    held = dim_pad * (4 if operand == tl.float32 else 1) * (2 if compensate else 1)
    block = 64 if held <= 128 else 32 if held <= 256 else 16
    queries = max(16, heads_pad, min(block, padded(tokens, 1) * heads_pad))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    with guard(q):
        extend_rows[(rows.number, triton.cdiv(tokens, queries // heads_pad))](
            *(q, *q.stride()[:3], query_positions, *query_positions.stride(), rows.number // batch, tokens),
            *(rows.keys, rows.values, rows.positions, rows.start, rows.length, rows.sinks, rows.recent),
            *(rows.count, rows.key_sum, rows.value_sum, out, scale, sliding_window or 0, softcap or 1.0),
            G=group,
            HEADS=heads_pad,
            M=queries,
            D=dim,
            D_PAD=dim_pad,
            BLOCK=block,
            STAGES=2,
            OPERAND=operand,
            SLIDING=sliding_window is not None,
            SOFTCAP=softcap is not None,
            COMPENSATE=compensate,
            num_warps=8 if compensate or dim_pad > 128 else 4,
            **FUSED,
        )
    return out


@triton.jit
def entries_until(positions, entries, position):
    """How many entries of a row are not after `position` `[M]`: binary search from the highest bit down."""
    step = 1
    while 2 * step <= entries:
        step *= 2
    found = tl.zeros_like(position)
    while step > 0:
        there = found + step
        inside = there <= entries
        here = tl.load(positions + there - 1, mask=inside, other=0)
        found = tl.where(inside & (here <= position), there, found)
        step //= 2
    return found


@triton.jit
def extend_rows(
    q, q_batch, q_head, q_token, query_positions, p_batch, p_token, heads, tokens, keys, values, positions,
    start, length, sinks, recent, count, key_sum, value_sum, out, scale, window, softcap,
    G: tl.constexpr, HEADS: tl.constexpr, M: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, OPERAND: tl.constexpr, SLIDING: tl.constexpr,
    SOFTCAP: tl.constexpr, COMPENSATE: tl.constexpr,
):  # fmt: skip
    """A block of `M // HEADS` queries, for all heads of the row's group, over the row's entries."""
    row = tl.program_id(0)
    batch, head = row // heads, row % heads
    m, d, n = tl.arange(0, M), tl.arange(0, D_PAD), tl.arange(0, BLOCK)
    token, g = tl.program_id(1) * (M // HEADS) + m // HEADS, m % HEADS
    real = (token < tokens) & (g < G)
    query = batch.to(tl.int64) * q_batch + (head * G + g) * q_head + token.to(tl.int64) * q_token  # [M]
    query = tl.load(q + query[:, None] + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0).to(
        OPERAND
    )

    base, entries = tl.load(start + row), tl.load(length + row)
    where = query_positions + batch * p_batch + token * p_token
    position = tl.load(where, mask=token < tokens, other=-1).to(tl.int64)
    end = entries_until(positions + base, entries, position)  # [M]: entries that are eligible
    first = tl.zeros_like(end)
    if SLIDING:
        first = entries_until(positions + base, entries, position - window)
    row_sinks, row_recent = tl.load(sinks + row), tl.load(recent + row)
    early, late = spans(first, end, row_sinks, row_recent)

    # What any query of the block sees, again as two spans; with compensation all is read, hidden or not.
    block_end = tl.max(end)
    block_first = tl.min(tl.where(token < tokens, first, entries))
    block_late = tl.min(tl.where(token < tokens, late, entries))
    block_early = tl.max(tl.where(row_recent > 0, tl.minimum(row_sinks, end), 0)) - block_first
    if COMPENSATE:
        block_early, block_late = tl.zeros_like(block_end), tl.zeros_like(block_end)
        hidden_logit, hidden_value = tl.zeros([M], tl.float32), tl.zeros([M, D_PAD], tl.float32)
    block_early = tl.maximum(block_early, 0)
    block_late = tl.maximum(block_late, block_first + block_early)  # an entry comes once

    top, total, acc = start_softmax(0, M, D_PAD)
    for i in tl.range(0, (block_early + block_end - block_late).to(tl.int32), BLOCK, num_stages=STAGES):
        at = i + n
        entry = tl.where(at < block_early, block_first + at, block_late + at - block_early)
        here = entry < block_end
        k = load_entries(keys, base + entry, here, D, D_PAD, OPERAND)
        v = load_entries(values, base + entry, here, D, D_PAD, OPERAND)
        j = entry[None, :]
        eligible = (j >= first[:, None]) & (j < end[:, None])
        shown = (j < (first + early)[:, None]) | (j >= late[:, None])
        logits = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        if COMPENSATE:
            hidden = shown == 0  # and eligible: nothing from `late` on is hidden
            hidden_logit += tl.sum(tl.where(hidden, logits, 0.0), 1)
            hidden_value = tl.dot(hidden.to(OPERAND), v, hidden_value, input_precision="ieee")
        logits = tl.where(eligible & shown, base_two(logits, softcap, SOFTCAP), -float("inf"))
        top, total, acc = add_block(logits, v, top, total, acc)
    if COMPENSATE:
        dropped = tl.load(count + row)
        if dropped >= 0:
            number = (dropped + late - early).to(tl.float32)  # [M]
            some = tl.maximum(number, 1.0)
            key = tl.load(key_sum + row * D + d, mask=d < D, other=0.0)
            value = tl.load(value_sum + row * D + d, mask=d < D, other=0.0)
            logit = (hidden_logit + tl.sum(query.to(tl.float32) * key[None, :], 1) * scale) / some
            logit = tl.where(number > 0, base_two(logit, softcap, SOFTCAP) + tl.log2(some), -float("inf"))
            top, total, acc = add_entry(
                logit, (hidden_value + value[None, :]) / some[:, None], top, total, acc
            )

    result = (acc / tl.where(total > 0, total, 1.0)[:, None]).to(out.dtype.element_ty)
    target = (((batch * heads + head) * G + g).to(tl.int64) * tokens + token) * D
    tl.store(out + target[:, None] + d[None, :], result, mask=real[:, None] & (d < D)[None, :])
