"""Equal shares of the entries for every program: the first of the two launches of a decode step.

The visible entries of all rows, one row after another, make one long line. It is cut into equal shares, one
for each program: many programs share a long row, and one program may serve many short rows (the idea of
stream-K, arXiv 2301.03598). Each program finds its place by a running sum over the row lengths, which it
reads itself. What it computes for one row is a segment: a normalised output and its log-sum-exp, which
`combine.py` puts together. On the line every row is followed by a gap, which stands for the time that
beginning and ending a segment takes; a program whose share holds one has fewer entries to read.
"""

import triton
import triton.language as tl

from headkv_kernels.softmax import (
    add_block,
    add_entry,
    base_two,
    load_entries,
    merge_parts,
    spans,
    start_softmax,
)

UNIT = tl.constexpr(4)  # shares are whole units of entries


@triton.jit
def plan_rows(
    r, length, sinks, recent, count, capacity, rows, window, gap,
    COMPENSATE: tl.constexpr, APPEND: tl.constexpr,
):  # fmt: skip
    """`[PAD]` four times: the entries of each row with the new one, whether it has room for that, the row's
    units, and where on the line these end; `gap` units lie between two rows.

    Positions grow by one or more an entry, so only a row's last `window` entries can be in a sliding window.
    A compensation entry is one more, the row's last. Every row has a unit, so that someone writes its output.
    """
    n = tl.load(length + r, mask=r < rows, other=0)
    s = tl.load(sinks + r, mask=r < rows, other=0)
    w = tl.load(recent + r, mask=r < rows, other=0)
    grown = r * 0
    if APPEND:
        grown = (n < tl.load(capacity + r, mask=r < rows, other=0)).to(tl.int32)
        n += grown
    early, late = spans(tl.maximum(n - window, 0), n, s, w)
    visible = early + n - late
    if COMPENSATE:
        visible += (tl.load(count + r, mask=r < rows, other=-1) >= 0).to(tl.int64)
    units = tl.where(r < rows, tl.maximum(tl.cdiv(visible, UNIT), 1), 0).to(tl.int32)
    ends = tl.cumsum(tl.where(r < rows, units + gap, 0), 0) - gap
    return n, grown, units, ends


@triton.jit
def share_of(program, programs, ends):
    """A program's units `unit .. stop`, and how many units every share has."""
    whole = tl.max(ends, 0)
    share = tl.cdiv(whole, programs)
    return program * share, tl.minimum((program + 1) * share, whole), share


@triton.jit
def segment_at(
    unit, stop, r, lengths, grown, units, ends, start, sinks, recent, rows, window
):  # fmt: skip
    """The segment at `unit` of the line, or behind the gap there, as scalars: its first unit, not below `stop`
    if there is none; its row; the row's first unit and the one after its last, its first slot, entries, and
    whether it grows; what the row shows (`spans`); and the visible entries `begin .. end` of the row that are
    stored and of this segment."""
    row = tl.minimum(tl.sum(((ends <= unit) & (r < rows)).to(tl.int32)), rows - 1)
    here = r == row
    row_end = tl.sum(tl.where(here, ends, 0))
    row_begin = row_end - tl.sum(tl.where(here, units, 0))
    unit = tl.maximum(unit, row_begin)
    entries, grows = tl.sum(tl.where(here, lengths, 0)), tl.sum(tl.where(here, grown, 0))
    base, first = tl.load(start + row), tl.maximum(entries - window, 0)
    early, late = spans(first, entries, tl.load(sinks + row), tl.load(recent + row))
    begin = (unit - row_begin) * UNIT
    end = (tl.minimum(row_end, stop) - row_begin) * UNIT
    end = tl.minimum(
        end, (early + entries - late).to(tl.int32) - grows
    )  # the new entry is the last one visible
    return unit, row, row_begin, row_end, base, entries, grows, first, early, late, begin, end


@triton.jit
def sums_outside(
    key_sum, value_sum, row, keys, values, begin, end,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`[D_PAD]` twice: the sums over what a row dropped and over what it hides, the slots `begin .. end`."""
    d, n = tl.arange(0, D_PAD), tl.arange(0, BLOCK)
    key = tl.load(key_sum + row * D + d, mask=d < D, other=0.0)
    value = tl.load(value_sum + row * D + d, mask=d < D, other=0.0)
    for i in range(begin, end, BLOCK):
        key += tl.sum(load_entries(keys, i + n, i + n < end, D, D_PAD, tl.float32), 0)
        value += tl.sum(load_entries(values, i + n, i + n < end, D, D_PAD, tl.float32), 0)
    return key, value


@triton.jit
def decode_shares(
    length, sinks, recent, count, capacity, rows, window, gap, q, q_batch, q_head, query_positions, heads,
    keys, values, positions, start, key_sum, value_sum,
    new_keys, k_batch, k_head, new_values, v_batch, v_head, seen, partial, scale, softcap,
    PAD: tl.constexpr, G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, OPERAND: tl.constexpr,
    COMPENSATE: tl.constexpr, SLIDING: tl.constexpr, SOFTCAP: tl.constexpr, APPEND: tl.constexpr,
    EARLY: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One share. With `PARTS`, so many warps take entries of their own and meet only at a segment's end."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    r, g, d = tl.arange(0, PAD), tl.arange(0, G_PAD), tl.arange(0, D_PAD)
    n = tl.arange(0, BLOCK)
    if PARTS:
        n = tl.reshape(n, (PARTS, BLOCK // PARTS))
    real = (g < G)[:, None] & (d < D)[None, :]
    lse = partial + (programs + rows) * G * D
    if EARLY:  # `combine_segments` reads the lengths as soon as it may start: not before this launch may
        if not AHEAD:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    lengths, grown, units, ends = plan_rows(
        r, length, sinks, recent, count, capacity, rows, window, gap, COMPENSATE, APPEND
    )
    unit, stop, share = share_of(program, programs, ends)
    unit, row, row_begin, row_end, base, entries, grows, first, early, late, begin, end = segment_at(
        unit, stop, r, lengths, grown, units, ends, start, sinks, recent, rows, window
    )
    if AHEAD:
        tl.extra.cuda.gdc_wait()

    while unit < stop:
        segment_end = tl.minimum(row_end, stop)
        batch, head = (row // heads).to(tl.int64), row % heads
        query = q + batch * q_batch + (head * G + g)[:, None] * q_head + d[None, :]
        query = tl.load(query, mask=real, other=0.0).to(OPERAND)  # [G_PAD, D_PAD]
        queries = query
        if PARTS:
            queries = tl.broadcast_to(query[None, :, :], (PARTS, G_PAD, D_PAD))
        top, total, acc = start_softmax(PARTS, G_PAD, D_PAD)
        for i in tl.range(begin, end, BLOCK, num_stages=STAGES):
            at = i + n  # [BLOCK], or [PARTS, BLOCK // PARTS]
            visible = at < end
            slots = base + tl.where(at < early, first + at, late + at - early)
            k = load_entries(keys, slots, visible, D, D_PAD, OPERAND)
            v = load_entries(values, slots, visible, D, D_PAD, OPERAND)
            if SLIDING:
                query_position = tl.load(seen) if APPEND else tl.load(query_positions + batch)
                position = tl.load(positions + slots, mask=visible, other=0)
                visible = visible & (query_position - position < window)
            k = tl.permute(k, (0, 2, 1)) if PARTS else tl.trans(k)
            logits = tl.dot(queries, k, input_precision="ieee") * scale
            logits = tl.where(tl.expand_dims(visible, -2), base_two(logits, softcap, SOFTCAP), -float("inf"))
            top, total, acc = add_block(logits, v, top, total, acc)
        if PARTS:
            top, total, acc = merge_parts(top, total, acc)
        if APPEND:  # noqa: SIM102 (APPEND is known to the compiler)
            if (segment_end == row_end) & (grows > 0):  # from where it was made, then into the pools
                new_key = tl.load(new_keys + batch * k_batch + head * k_head + d, mask=d < D, other=0.0)
                new_value = tl.load(new_values + batch * v_batch + head * v_head + d, mask=d < D, other=0.0)
                slot = base + entries - 1
                tl.store(keys + slot * D + d, new_key, mask=d < D)
                tl.store(values + slot * D + d, new_value, mask=d < D)
                tl.store(positions + slot, tl.load(seen).to(tl.int32))
                logit = tl.sum(query.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale
                logit = base_two(logit, softcap, SOFTCAP)
                top, total, acc = add_entry(logit, new_value.to(tl.float32)[None, :], top, total, acc)
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

        at = (program + row) * G + g  # segments are numbered by program + row: none share a number
        weight = tl.where(total > 0, total, 1.0)
        tl.store(lse + at, tl.where(total > 0, top + tl.log2(weight), -float("inf")), mask=g < G)
        tl.store(partial + at[:, None] * D + d[None, :], acc / weight[:, None], mask=real)
        unit = segment_end
        if unit < stop:
            unit, row, row_begin, row_end, base, entries, grows, first, early, late, begin, end = segment_at(
                unit, stop, r, lengths, grown, units, ends, start, sinks, recent, rows, window
            )
