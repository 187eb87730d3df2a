"""Equal shares of the entries for every program: the first of the two launches of a decode step.

The visible entries of all rows, one row after another, make one long line. It is cut into equal shares, one
for each program: many programs share a long row, and one program may serve many short rows (the idea of
stream-K, arXiv 2301.03598). Each program finds its place by a running sum over the row lengths, which it
reads itself. What it computes for one row is a segment: a normalised output and its log-sum-exp, which
`combine.py` puts together. On the line every row is followed by a gap, which stands for the time that
beginning and ending a segment takes; a program whose share holds one has fewer entries to read.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from headkv_kernels.quantised import (
    add_codes,
    apart,
    joined,
    load_scales,
    load_sum,
    load_vectors,
    rotated,
    store_codes,
    turned_from,
)
from headkv_kernels.residual import add_newest, before_newest, newest_from, ring_slots, store_turned
from headkv_kernels.softmax import add_block, add_entry, base_two, load_entries, spans, start_softmax

UNIT = tl.constexpr(4)  # shares are whole units of entries


class Plan(NamedTuple):
    """`[PAD]` each: the row `r`, its entries with the new one, whether it has room for that, how many of its newest are
    held as they came, its units, and where on the line these end."""

    r: tl.tensor
    lengths: tl.tensor
    grown: tl.tensor
    held: tl.tensor
    units: tl.tensor
    ends: tl.tensor


class Segment(NamedTuple):
    """A program's part of one row, scalars: its first unit and the one after its last; its row; where on the line
    the row ends; the row's first slot, entries, and whether it grows; what the row shows of the entries from `first`
    on (`spans`), those from `newest` on as they came; and the visible entries `begin .. end` of the row that are stored
    before those and of this segment."""

    unit: tl.tensor
    unit_end: tl.tensor
    row: tl.tensor
    row_end: tl.tensor
    base: tl.tensor
    entries: tl.tensor
    grows: tl.tensor
    first: tl.tensor
    front: tl.tensor
    back: tl.tensor
    newest: tl.tensor
    begin: tl.tensor
    end: tl.tensor


@triton.jit
def plan_rows(r, rows, rule, gap):
    """The rows `r` on the line, `gap` units between two of them.

    Positions grow by one or more an entry, so only a row's last entries, as many as a sliding window has positions,
    can be in it. A compensation entry is one more, the row's last. Every row has a unit, so that someone writes its
    output.
    """
    real = r < rows.number
    n = tl.load(rows.length + r, mask=real, other=0)
    s = tl.load(rows.sinks + r, mask=real, other=0)
    w = tl.load(rows.recent + r, mask=real, other=0)
    grown = r * 0
    if rows.capacity is not None:
        grown = (n < tl.load(rows.capacity + r, mask=real, other=0)).to(tl.int32)
        n += grown
    held, first = r * 0, first_in_window(n, rule)
    front, back = spans(first, n, s, w)
    visible = front + n - back
    if rows.residual is not None:
        held = tl.minimum(tl.load(rows.residual + r, mask=real, other=0) + grown, rows.ring_size)
        visible = before_newest(first, front, back, newest_from(n, held, w))[1]
    if rows.dropped is not None:
        visible += (tl.load(rows.dropped + r, mask=real, other=-1) >= 0).to(tl.int64)
    units = tl.where(real, tl.maximum(tl.cdiv(visible, UNIT), 1), 0).to(tl.int32)
    ends = tl.cumsum(tl.where(real, units + gap, 0), 0) - gap
    return Plan(r, n, grown, held, units, ends)


@triton.jit
def first_in_window(entries, rule):
    """The first of a row's entries that a sliding window can show."""
    first = entries * 0
    if rule.sliding_window is not None:
        first = tl.maximum(entries - rule.sliding_window, 0)
    return first


@triton.jit
def share_of(program, programs, ends):
    """A program's units `unit .. stop`, and how many units every share has."""
    whole = tl.max(ends, 0)
    share = tl.cdiv(whole, programs)
    return program * share, tl.minimum((program + 1) * share, whole), share


@triton.jit
def segment_at(unit, stop, plan, rows, rule):
    """The segment at `unit` of the line, or behind the gap there; its `unit` is not below `stop` if there is none."""
    row = tl.minimum(tl.sum(((plan.ends <= unit) & (plan.r < rows.number)).to(tl.int32)), rows.number - 1)
    here = plan.r == row
    row_end = tl.sum(tl.where(here, plan.ends, 0))
    row_begin = row_end - tl.sum(tl.where(here, plan.units, 0))
    unit = tl.maximum(unit, row_begin)
    unit_end = tl.minimum(row_end, stop)
    entries, grows = tl.sum(tl.where(here, plan.lengths, 0)), tl.sum(tl.where(here, plan.grown, 0))
    base, first = tl.load(rows.start + row), first_in_window(entries, rule)
    recent = tl.load(rows.recent + row)
    front, back = spans(first, entries, tl.load(rows.sinks + row), recent)
    # The new entry is the last one visible, and not yet stored.
    newest = entries - grows
    stored = (front + newest - back).to(tl.int32)
    if rows.residual is not None:
        newest = newest_from(entries, tl.sum(tl.where(here, plan.held, 0)), recent)
        stored = before_newest(first, front, back, newest)[1].to(tl.int32)
    begin, end = (unit - row_begin) * UNIT, tl.minimum((unit_end - row_begin) * UNIT, stored)
    return Segment(unit, unit_end, row, row_end, base, entries, grows, first, front, back, newest, begin, end)


@triton.jit
def sums_outside(
    rows, row, pools, begin, end, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """`[D_PAD]` twice: the sums over what a row dropped and over what it hides, the slots `begin .. end`."""
    n = tl.arange(0, BLOCK)
    key = load_sum(rows.key_sum, row, pools, D, D_PAD)
    value = load_sum(rows.value_sum, row, pools, D, D_PAD)
    for i in range(begin, end, BLOCK):
        keys = load_vectors(pools.key, i + n, i + n < end, D, D_PAD, tl.float32)
        if pools.scale is not None:
            key_scales, value_scales = load_scales(pools, i + n, i + n < end)
            keys *= key_scales[:, None]
        key += tl.sum(keys, 0)
        values = load_vectors(pools.value, i + n, i + n < end, D, D_PAD, tl.float32)
        if pools.scale is not None:
            values *= value_scales[:, None]
        value += tl.sum(values, 0)
    return key, value


@triton.jit
def decode_shares(
    q, query_positions, rows, pools, new, rule, gap, partial,
    PAD: tl.constexpr, G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, OPERAND: tl.constexpr, EARLY: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One share."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    g, d, n = tl.arange(0, G_PAD), tl.arange(0, D_PAD), tl.arange(0, BLOCK)
    real = (g < G)[:, None] & (d < D)[None, :]
    lse = partial + (programs + rows.number) * G * D
    # The next launches may start once all before this one have ended: `combine_segments` and, `ahead`, other layers'
    # steps then read lengths at once.
    if EARLY and not AHEAD:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    plan = plan_rows(tl.arange(0, PAD), rows, rule, gap)
    unit, stop, share = share_of(program, programs, plan.ends)
    segment = segment_at(unit, stop, plan, rows, rule)
    unit = segment.unit
    if AHEAD:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    while unit < stop:
        row, base, front, back = segment.row, segment.base, segment.front, segment.back
        ends_row = segment.unit_end == segment.row_end
        batch, head = (row // rows.heads).to(tl.int64), row % rows.heads
        query = q.data + batch * q.batch + (head * G + g)[:, None] * q.head + d[None, :]
        query = tl.load(query, mask=real, other=0.0)  # [G_PAD, D_PAD]
        if pools.scale is not None:
            query = rotated(query.to(tl.float32), D)
        query = query.to(OPERAND)
        top, total, acc = start_softmax(G_PAD, D_PAD)
        if pools.scale is not None:
            query_apart, acc = apart(query, pools.key), apart(acc, pools.value)
        coded = front
        if rows.residual is not None:
            coded = before_newest(segment.first, front, back, segment.newest)[0]
        for i in tl.range(segment.begin, segment.end, BLOCK, num_stages=STAGES):
            at = i + n  # [BLOCK]
            visible = at < segment.end
            slots = base + tl.where(at < coded, segment.first + at, back + at - coded)
            here = visible
            if pools.scale is None:
                k = load_entries(pools.key, slots, here, D, D_PAD, OPERAND)
                v = load_entries(pools.value, slots, here, D, D_PAD, OPERAND)
            if rule.sliding_window is not None:
                query_position = tl.load(new.seen if new is not None else query_positions + batch)
                position = tl.load(pools.position + slots, mask=visible, other=0)
                visible = visible & (query_position - position < rule.sliding_window)
            if pools.scale is None:
                logits = tl.dot(query, tl.trans(k), input_precision="ieee") * rule.scale
                logits = tl.where(visible[None, :], base_two(logits, rule), -float("inf"))
                top, total, acc = add_block(logits, v, top, total, acc)
            else:
                top, total, acc = add_codes(
                    query_apart, pools, slots, here, visible, rule, top, total, acc, D, D_PAD, OPERAND
                )
        if pools.scale is not None:
            acc = joined(acc)
        if rows.residual is not None:  # noqa: SIM102 (known to the compiler)
            if ends_row:
                top, total, acc = add_newest(
                    *(query, query_positions, rows, pools, new, rule, segment, top, total, acc),
                    *(D, D_PAD, 16, OPERAND),
                )
        if new is not None:  # noqa: SIM102 (known to the compiler)
            if ends_row & (segment.grows > 0):  # from where it was made, then into the pools
                new_key = new.key.data + batch * new.key.batch + head * new.key.head + d
                new_key = tl.load(new_key, mask=d < D, other=0.0)
                new_value = new.value.data + batch * new.value.batch + head * new.value.head + d
                new_value = tl.load(new_value, mask=d < D, other=0.0)
                slot = base + segment.entries - 1
                key, value = new_key, new_value
                if pools.scale is None:
                    tl.store(pools.key + slot * D + d, new_key, mask=d < D)
                    tl.store(pools.value + slot * D + d, new_value, mask=d < D)
                else:  # they are seen as they are stored, or as they came
                    into = slot + tl.arange(0, 1)
                    turned = turned_from(new_key[None, :], D)
                    key = store_codes(turned, pools.key, pools.scale, into, into >= 0, D)
                    if rows.residual is not None:
                        ring = ring_slots(rows, row, segment.entries - 1 + tl.arange(0, 1))
                        key = store_turned(turned, rows.residual_key, ring, ring >= 0, D)
                    turned = turned_from(new_value[None, :], D)
                    value = store_codes(turned, pools.value, pools.scale + 1, into, into >= 0, D)
                    if rows.residual is not None:
                        value = store_turned(turned, rows.residual_value, ring, ring >= 0, D)
                    key, value = tl.reshape(key, [D_PAD]), tl.reshape(value, [D_PAD])
                tl.store(pools.position + slot, tl.load(new.seen).to(tl.int32))
                logit = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], 1) * rule.scale
                logit = base_two(logit, rule)
                top, total, acc = add_entry(logit, value.to(tl.float32)[None, :], top, total, acc)
        if rows.dropped is not None:
            dropped = tl.load(rows.dropped + row)
            if ends_row & (dropped >= 0):
                number = (dropped + back - front).to(tl.float32)
                if number > 0:
                    key, value = sums_outside(rows, row, pools, base + front, base + back, D, D_PAD, BLOCK)
                    logit = tl.sum(query.to(tl.float32) * (key / number)[None, :], 1) * rule.scale
                    logit = base_two(logit, rule) + tl.log2(number)
                    top, total, acc = add_entry(logit, (value / number)[None, :], top, total, acc)

        at = (program + row) * G + g  # segments are numbered by program + row: none share a number
        weight = tl.where(total > 0, total, 1.0)
        tl.store(lse + at, tl.where(total > 0, top + tl.log2(weight), -float("inf")), mask=g < G)
        tl.store(partial + at[:, None] * D + d[None, :], acc / weight[:, None], mask=real)
        unit = segment.unit_end
        if unit < stop:
            segment = segment_at(unit, stop, plan, rows, rule)
            unit = segment.unit
