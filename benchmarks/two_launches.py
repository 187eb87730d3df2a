"""The decode that `ragged_step` replaced, for comparison: a launch for the shares, then one for the combine.

The visible entries of all rows, one row after another, make one long line. It is cut into equal shares, one
for each program: many programs share a long row, and one program may serve many short rows (the idea of
stream-K, arXiv 2301.03598). Each program finds its place by a running sum over the row lengths, which it
reads itself. What it computes for one row is a segment; the segments of a row are then combined by their
log-sum-exp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headkv_kernels import DecodeConfig, Rows
from headkv_kernels.rows import FUSED, padded
from headkv_kernels.shares import sums_outside
from headkv_kernels.softmax import add_block, add_entry, base_two, load_entries, spans, start_softmax

UNIT = tl.constexpr(16)  # shares are whole units, so that segments begin at multiples of 16 entries


@triton.jit
def units_of_rows(length, sinks, recent, count, rows, window, PAD: tl.constexpr, COMPENSATE: tl.constexpr):
    """How much of the line each row is, `[PAD]` int32. A compensation entry is one more, the row's last.

    Positions grow by one or more an entry, so only a row's last `window` entries can be in a sliding window.
    """
    r = tl.arange(0, PAD)
    n = tl.load(length + r, mask=r < rows, other=0)
    s = tl.load(sinks + r, mask=r < rows, other=0)
    w = tl.load(recent + r, mask=r < rows, other=0)
    early, late = spans(tl.maximum(n - window, 0), n, s, w)
    visible = early + n - late
    if COMPENSATE:
        visible += (tl.load(count + r, mask=r < rows, other=-1) >= 0).to(tl.int64)
    return tl.cdiv(visible, UNIT).to(tl.int32)


@triton.jit
def decode_shares(
    length, sinks, recent, count, rows, window, q, q_batch, q_head, query_positions, heads,
    keys, values, positions, start, key_sum, value_sum, partial, lse, scale, softcap,
    PAD: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, COMPENSATE: tl.constexpr,
    EARLY: tl.constexpr, G_PAD: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    OPERAND: tl.constexpr, SLIDING: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One share: for each row that it touches, a normalised output `[G, D]` and its log-sum-exp `[G]`."""
    program = tl.program_id(0)
    r, g, d, n = tl.arange(0, PAD), tl.arange(0, G_PAD), tl.arange(0, D_PAD), tl.arange(0, BLOCK)
    real = (g < G)[:, None] & (d < D)[None, :]
    if EARLY:  # what is read below may still be being written by the kernel before this one
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    units = units_of_rows(length, sinks, recent, count, rows, window, PAD, COMPENSATE)
    ends = tl.cumsum(units, 0)
    share = tl.cdiv(tl.sum(units), tl.num_programs(0))
    unit = program * share
    stop = tl.minimum(unit + share, tl.sum(units))
    while unit < stop:
        row = tl.sum((ends <= unit).to(tl.int32))
        row_end = tl.sum(tl.where(r == row, ends, 0))
        row_begin = row_end - tl.sum(tl.where(r == row, units, 0))
        segment_end = tl.minimum(row_end, stop)

        batch, head = row // heads, row % heads
        query = q + batch.to(tl.int64) * q_batch + (head * G + g)[:, None] * q_head + d[None, :]
        query = tl.load(query, mask=real, other=0.0).to(OPERAND)  # [G_PAD, D_PAD]
        base, entries = tl.load(start + row), tl.load(length + row)
        first = tl.maximum(entries - window, 0)
        early, late = spans(first, entries, tl.load(sinks + row), tl.load(recent + row))
        begin = (unit - row_begin) * UNIT
        end = tl.minimum(early + entries - late, (segment_end - row_begin) * UNIT).to(tl.int32)
        top, total, acc = start_softmax(0, G_PAD, D_PAD)
        for i in tl.range(begin, end, BLOCK, num_stages=STAGES):
            at = i + n
            visible = at < end
            slots = base + tl.where(at < early, first + at, late + at - early)
            k = load_entries(keys, slots, visible, D, D_PAD, OPERAND)
            v = load_entries(values, slots, visible, D, D_PAD, OPERAND)
            if SLIDING:
                position = tl.load(positions + slots, mask=visible, other=0)
                visible = visible & (tl.load(query_positions + batch) - position < window)
            logits = base_two(tl.dot(query, tl.trans(k), input_precision="ieee") * scale, softcap, SOFTCAP)
            logits = tl.where(visible[None, :], logits, -float("inf"))
            top, total, acc = add_block(logits, v, top, total, acc)
        if COMPENSATE:
            dropped = tl.load(count + row)
            if (segment_end == row_end) & (dropped >= 0):
                number = (dropped + late - early).to(tl.float32)
                if number > 0:
                    hide, show = base + early, base + late
                    key, value = sums_outside(
                        key_sum, value_sum, row, keys, values, hide, show, D, D_PAD, BLOCK
                    )
                    logit = tl.sum(query.to(tl.float32) * (key / number)[None, :], 1) * scale
                    logit = base_two(logit, softcap, SOFTCAP) + tl.log2(number)
                    top, total, acc = add_entry(logit, (value / number)[None, :], top, total, acc)

        segment = program + row  # grows by one or more from segment to segment, so none share it
        weight = tl.where(total > 0, total, 1.0)
        tl.store(lse + segment * G + g, tl.where(total > 0, top + tl.log2(weight), -float("inf")), mask=g < G)
        tl.store(partial + (segment * G + g)[:, None] * D + d[None, :], acc / weight[:, None], mask=real)
        unit = segment_end


@triton.jit
def combine_segments(
    length, sinks, recent, count, rows, window, partial, lse, out, programs,
    PAD: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, COMPENSATE: tl.constexpr,
    EARLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One query head: the segments of its row, each weighted by 2**lse. A row without entries gives 0."""
    row, g = tl.program_id(0) // G, tl.program_id(0) % G
    r, d, n = tl.arange(0, PAD), tl.arange(0, D_PAD), tl.arange(0, BLOCK)
    units = units_of_rows(length, sinks, recent, count, rows, window, PAD, COMPENSATE)
    share = tl.maximum(tl.cdiv(tl.sum(units), programs), 1)
    begin = tl.sum(tl.where(r < row, units, 0))
    end = begin + tl.sum(tl.where(r == row, units, 0))
    last = tl.where(end > begin, tl.cdiv(end, share), 0)  # the row's programs are begin // share .. last
    if EARLY:  # the lengths above were written before decode_shares let this kernel start
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    top, total, acc = -float("inf"), 0.0, tl.zeros([D_PAD], tl.float32)
    for program in range(begin // share, last, BLOCK):
        here = program + n < last
        segment = (program + n + row) * G + g
        part_lse = tl.load(lse + segment, mask=here, other=-float("inf"))
        real = here[:, None] & (d < D)[None, :]
        part = tl.load(partial + segment[:, None] * D + d[None, :], mask=real, other=0.0)
        top_now = tl.maximum(top, tl.max(part_lse))
        base = tl.where(top_now == -float("inf"), 0.0, top_now)
        weight, shrink = tl.exp2(part_lse - base), tl.exp2(top - base)
        total = total * shrink + tl.sum(weight)
        acc = acc * shrink + tl.sum(part * weight[:, None], 0)
        top = top_now
    result = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + tl.program_id(0) * D + d, result.to(out.dtype.element_ty), mask=d < D)


def decode_in_two(q: Tensor, rows: Rows, scale: float, config: DecodeConfig) -> Tensor:
    """`q` `[B, HQ, D]` -> `[B, HQ, D]`; the new token is stored already."""
    group, segments = q.shape[0] * q.shape[1] // rows.number, config.programs + rows.number
    out = torch.empty_like(q)
    partial = torch.empty((segments, group, rows.dim), device=q.device)
    lse = torch.empty((segments, group), device=q.device)
    line = (rows.length, rows.sinks, rows.recent, rows.count, rows.number, 2**31 - 1)
    shape = {"PAD": padded(rows.number), "G": group, "D": rows.dim, "D_PAD": padded(rows.dim)}
    shape |= {"COMPENSATE": rows.count is not None, "EARLY": config.early}
    launch = FUSED | ({"launch_pdl": True} if config.early else {})
    decode_shares[(config.programs,)](
        *(*line, q, q.stride(0), q.stride(1), None, rows.number // q.shape[0]),
        *(rows.keys, rows.values, rows.positions, rows.start, rows.key_sum, rows.value_sum),
        *(partial, lse, scale, 1.0),
        **shape,
        G_PAD=padded(group),
        BLOCK=config.block,
        STAGES=config.stages,
        OPERAND=rows.operand(q),
        SLIDING=False,
        SOFTCAP=False,
        num_warps=config.warps,
        **launch,
    )
    combine_segments[(rows.number * group,)](
        *line, partial, lse, out, config.programs, **shape, BLOCK=32, num_warps=4, **launch
    )
    return out
