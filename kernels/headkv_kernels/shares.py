"""Decode in one launch: equal shares of the entries for every program, and a combine by whoever comes last.

The visible entries of all rows, one row after another, make one long line. It is cut into equal shares, one
for each program: many programs share a long row, and one program may serve many short rows (the idea of
stream-K, arXiv 2301.03598). Each program finds its place by a running sum over the row lengths, which it
reads itself. What it computes for one row is a segment. Programs count what they finished of a row on the
row's ticket, and the one that completes the row combines its segments by their log-sum-exp: nobody waits for
another program, so none need run at the same time.
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
    write_result,
)

UNIT = tl.constexpr(4)  # shares are whole units of entries


@triton.jit
def plan_rows(
    r, length, sinks, recent, count, capacity, rows, window,
    COMPENSATE: tl.constexpr, APPEND: tl.constexpr,
):  # fmt: skip
    """`[PAD]` thrice: the entries of each row with the new one, whether it has room for that, and its units.

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
    units = tl.maximum(tl.cdiv(visible, UNIT), 1)
    return n, grown, tl.where(r < rows, units, 0).to(tl.int32)


@triton.jit
def segment_at(
    unit, stop, r, lengths, grown, units, ends, start, sinks, recent, rows, window
):  # fmt: skip
    """The segment that begins at `unit` of the line, as scalars: its row; the row's first unit and the one
    after its last, its first slot, entries, and whether it grows; what the row shows (`spans`); and the visible
    entries `begin .. end` of the row that are stored and of this segment."""
    row = tl.minimum(tl.sum((ends <= unit).to(tl.int32)), rows - 1)
    here = r == row
    row_end = tl.sum(tl.where(here, ends, 0))
    row_begin = row_end - tl.sum(tl.where(here, units, 0))
    entries, grows = tl.sum(tl.where(here, lengths, 0)), tl.sum(tl.where(here, grown, 0))
    base, first = tl.load(start + row), tl.maximum(entries - window, 0)
    early, late = spans(first, entries, tl.load(sinks + row), tl.load(recent + row))
    begin = (unit - row_begin) * UNIT
    end = (tl.minimum(row_end, stop) - row_begin) * UNIT
    end = tl.minimum(
        end, (early + entries - late).to(tl.int32) - grows
    )  # the new entry is the last one visible
    return row, row_begin, row_end, base, entries, grows, first, early, late, begin, end


@triton.jit
def ask_for(pool, slots, number, D: tl.constexpr):
    """Fetch `number` entries from each of the slots on into the L2 cache; none where it is 0 or less."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gt.s32 p, $2, 0;"
        " @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [(pool + slots * D).to(tl.int64), number * (D * pool.dtype.element_ty.primitive_bitwidth // 8)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


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
def combine_row(
    partial, lse, out, row, first, last, G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
    D_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's output from the segments of the programs `first .. last`, each weighted by 2**lse."""
    n, g, d = tl.arange(0, BLOCK), tl.arange(0, HEADS), tl.arange(0, D_PAD)
    top = tl.full([HEADS], -float("inf"), tl.float32)
    total, acc = tl.zeros([HEADS], tl.float32), tl.zeros([HEADS, D_PAD], tl.float32)
    for program in range(first, last, BLOCK):
        here = (program + n < last)[:, None] & (g < G)[None, :]
        at = (program + n + row)[:, None] * G + g[None, :]  # [BLOCK, HEADS]
        # Not from the L1 cache, which does not see what other multiprocessors write.
        real = here[:, :, None] & (d < D)[None, None, :]
        parts = tl.load(
            partial + at[:, :, None] * D + d[None, None, :], mask=real, other=0.0, cache_modifier=".cg"
        )
        part_lse = tl.load(lse + at, mask=here, other=-float("inf"), cache_modifier=".cg")
        top_now = tl.maximum(top, tl.max(part_lse, 0))
        base = tl.where(top_now == -float("inf"), 0.0, top_now)
        weight, shrink = tl.exp2(part_lse - base[None, :]), tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink[:, None] + tl.sum(parts * weight[:, :, None], 0)
        top = top_now
    write_result(out, row, total, acc, G, D)


@triton.jit
def decode_shares(
    length, sinks, recent, count, capacity, rows, window, q, q_batch, q_head, query_positions, heads,
    keys, values, positions, start, key_sum, value_sum, tickets,
    new_keys, k_batch, k_head, new_values, v_batch, v_head, seen, partial, out, scale, softcap,
    PAD: tl.constexpr, G: tl.constexpr, G_PAD: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    COMBINE: tl.constexpr, THREADS: tl.constexpr, PREFETCH: tl.constexpr, OPERAND: tl.constexpr,
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
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        if not AHEAD:
            tl.extra.cuda.gdc_wait()
    lengths, grown, units = plan_rows(
        r, length, sinks, recent, count, capacity, rows, window, COMPENSATE, APPEND
    )
    ends = tl.cumsum(units, 0)
    share = tl.cdiv(tl.sum(units), programs)
    unit = program * share
    stop = tl.minimum(unit + share, tl.sum(units))
    row, row_begin, row_end, base, entries, grows, first, early, late, begin, end = segment_at(
        unit, stop, r, lengths, grown, units, ends, start, sinks, recent, rows, window
    )
    if PREFETCH > 0:
        each: tl.constexpr = (PREFETCH + THREADS - 1) // THREADS
        soon = begin + tl.arange(0, THREADS) * each
        soon_slots = base + tl.where(soon < early, first + soon, late + soon - early)
        number = tl.minimum(tl.minimum(end, begin + PREFETCH) - soon, each)
        ask_for(keys, soon_slots, number, D)
        ask_for(values, soon_slots, number, D)
    if APPEND:
        tl.debug_barrier()  # all threads of this program have read the lengths, so it counts without a fence
        arrived = tl.atomic_add(tickets + rows, 1, sem="relaxed")
    if AHEAD:
        tl.extra.cuda.gdc_wait()
    if APPEND:  # noqa: SIM102 (APPEND is known to the compiler)
        if arrived == programs - 1:  # every program has read the lengths
            tl.store(length + r, lengths, mask=r < rows)
            tl.store(tickets + rows, 0)

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
        if APPEND:  # noqa: SIM102
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

        if (unit == row_begin) & (segment_end == row_end):  # the whole row
            write_result(out, row, total, acc, G, D)
        else:
            at = (program + row) * G + g  # segments are numbered by program + row: none share a number
            weight = tl.where(total > 0, total, 1.0)
            tl.store(lse + at, tl.where(total > 0, top + tl.log2(weight), -float("inf")), mask=g < G)
            tl.store(partial + at[:, None] * D + d[None, :], acc / weight[:, None], mask=real)
            tl.debug_barrier()  # all threads have stored before one of them counts
            done = tl.atomic_add(tickets + row, segment_end - unit, sem="acq_rel")
            if done + segment_end - unit == row_end - row_begin:
                combine_row(
                    partial, lse, out, row, row_begin // share, tl.cdiv(row_end, share),
                    G, D, HEADS, D_PAD, COMBINE,
                )  # fmt: skip
                tl.store(tickets + row, 0)
        unit = segment_end
        row, row_begin, row_end, base, entries, grows, first, early, late, begin, end = segment_at(
            unit, stop, r, lengths, grown, units, ends, start, sinks, recent, rows, window
        )
