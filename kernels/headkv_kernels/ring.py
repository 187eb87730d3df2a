"""The shares of `shares.py` once more, for Hopper, in Triton's Gluon dialect, which says where data lies.

The keys and values of a share pass through a ring of blocks in shared memory. A cursor of its own fetches
them, on across the ends of rows, and begins before the launch before this one has ended. Each warp computes
on entries of its own. For 16-bit rows without compensation and sliding window.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from headkv_kernels.shares import plan_rows, segment_at, share_of
from headkv_kernels.softmax import add_entry, base_two, raise_top

copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
WIDE = gl.constexpr(8)  # bytes of a 16-byte access in entries of 2 bytes


@gluon.jit
def fetch(
    k_slot, v_slot, keys, values, unit, stop, at, end, base, early, first, late, row_end, n, d,
    r, lengths, grown, units, ends, start, sinks, recent, rows, window, D: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Begin to copy the cursor's next block, zeros after the last one; returns the cursor behind it."""
    while (at >= end) & (unit < stop):
        unit = gl.minimum(row_end, stop)
        unit, row, row_begin, row_end, base, entries, grows, first, early, late, at, end = segment_at(
            unit, stop, r, lengths, grown, units, ends, start, sinks, recent, rows, window
        )
    here = at + n  # [PARTS, BLOCK // PARTS]
    slots = base + gl.where(here < early, first + here, late + here - early)
    real = ((here < end) & (unit < stop))[:, :, None]
    offsets = slots[:, :, None] * D + d[None, None, :]
    copy(k_slot, keys + offsets, mask=real)
    copy(v_slot, values + offsets, mask=real)
    async_copy.commit_group()
    return unit, at + BLOCK, end, base, early, first, late, row_end


@gluon.jit
def lower_half(x, HALF: gl.constexpr):
    """The first half `HALF` along dimension 1 of `[PARTS, 2 * HALF]` or `[PARTS, 2 * HALF, D]`: in registers."""
    P: gl.constexpr = x.shape[0]
    if len(x.shape) == 2:
        low, high = gl.split(gl.permute(gl.reshape(x, [P, 2, HALF]), (0, 2, 1)))
    else:
        D: gl.constexpr = x.shape[2]
        low, high = gl.split(gl.permute(gl.reshape(x, [P, 2, HALF, D]), (0, 2, 3, 1)))
    return low


@gluon.jit
def ring_shares(
    length, sinks, recent, count, capacity, rows, window, gap, q, q_batch, q_head, query_positions, heads,
    keys, values, positions, start, key_sum, value_sum,
    new_keys, k_batch, k_head, new_values, v_batch, v_head, seen, partial, scale, softcap,
    PAD: gl.constexpr, G: gl.constexpr, G_PAD: gl.constexpr, D: gl.constexpr, D_PAD: gl.constexpr,
    PARTS: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, OPERAND: gl.constexpr,
    COMPENSATE: gl.constexpr, SLIDING: gl.constexpr, SOFTCAP: gl.constexpr, APPEND: gl.constexpr,
    EARLY: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """`shares.decode_shares`, whose arguments these are, with a ring of `STAGES` blocks."""
    N: gl.constexpr = BLOCK // PARTS
    lanes: gl.constexpr = D // WIDE  # that copy one entry
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [PARTS], [0])
    copied: gl.constexpr = gl.BlockedLayout([1, 1, WIDE], [1, 32 // lanes, lanes], [PARTS, 1, 1], [2, 1, 0])
    ring: gl.constexpr = gl.SwizzledSharedLayout(WIDE, 1, 8, [2, 1, 0])
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [PARTS, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    by_head: gl.constexpr = gl.SliceLayout(2, mma)  # [PARTS, G_PAD]
    # A thread holds all parts of a number: sums over parts stay inside of it.
    merged: gl.constexpr = gl.BlockedLayout([PARTS, 1, 4], [1, 128 // D, D // 4], [1, PARTS, 1], [2, 1, 0])
    if D > 128:
        gl.static_assert(False, "D must be 64 or 128")
    rest: gl.constexpr = gl.SliceLayout(0, merged)  # [M, D]
    HALVED: gl.constexpr = G <= G_PAD // 2
    M: gl.constexpr = G_PAD // 2 if HALVED else G_PAD

    program, programs = gl.program_id(0), gl.num_programs(0)
    lse = partial + (programs + rows) * G * D
    k_ring = gl.allocate_shared_memory(OPERAND, [STAGES, PARTS, N, D], ring)
    v_ring = gl.allocate_shared_memory(OPERAND, [STAGES, PARTS, N, D], ring)
    r = gl.arange(0, PAD, layout=flat)
    if EARLY:
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

    pairs: gl.constexpr = gl.SliceLayout(2, copied)
    part = gl.arange(0, PARTS, layout=gl.SliceLayout(1, pairs))[:, None]
    n = part * N + gl.arange(0, N, layout=gl.SliceLayout(0, pairs))[None, :]
    d = gl.arange(0, D, layout=gl.SliceLayout(0, gl.SliceLayout(1, copied)))
    f_unit, f_at, f_end, f_row_end = unit, begin, end, row_end
    f_base, f_early, f_first, f_late = base, early, first, late
    for ahead in gl.static_range(STAGES - 1):
        f_unit, f_at, f_end, f_base, f_early, f_first, f_late, f_row_end = fetch(
            k_ring.index(ahead), v_ring.index(ahead), keys, values,
            f_unit, stop, f_at, f_end, f_base, f_early, f_first, f_late, f_row_end, n, d,
            r, lengths, grown, units, ends, start, sinks, recent, rows, window, D, BLOCK,
        )  # fmt: skip
    if AHEAD:
        tl.extra.cuda.gdc_wait()

    part_q = gl.arange(0, PARTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, left)))[:, None, None] * 0
    g_q = gl.arange(0, G_PAD, layout=gl.SliceLayout(0, gl.SliceLayout(2, left)))[None, :][:, :, None]
    d_q = gl.arange(0, D, layout=gl.SliceLayout(0, gl.SliceLayout(1, left)))[None, None, :]
    part_l = gl.arange(0, PARTS, layout=gl.SliceLayout(1, gl.SliceLayout(1, mma)))[:, None]
    n_logit = part_l * N + gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(1, mma)))[None, :]
    rows_of: gl.constexpr = gl.SliceLayout(1, rest)
    g = gl.arange(0, M, layout=rows_of)
    d_rest = gl.arange(0, D, layout=gl.SliceLayout(0, rest))
    real = (g < G)[:, None]
    slot = 0
    while unit < stop:
        segment_end = gl.minimum(row_end, stop)
        batch, head = (row // heads).to(gl.int64), row % heads
        query = q + batch * q_batch + head * G * q_head
        operand = gl.load(
            query + (part_q + g_q * q_head + d_q), mask=(part_q + g_q < G) & (d_q < D), other=0.0
        )
        if APPEND:  # asked for before the loop, so that nothing waits for them behind it
            new = (segment_end == row_end) & (grows > 0)
            asked = gl.load(query + g[:, None] * q_head + d_rest[None, :], mask=real & new, other=0.0)
            new_key = gl.load(new_keys + batch * k_batch + head * k_head + d_rest, mask=new, other=0.0)
            new_value = gl.load(new_values + batch * v_batch + head * v_head + d_rest, mask=new, other=0.0)
        top = gl.full([PARTS, G_PAD], -float("inf"), gl.float32, layout=by_head)
        total = gl.zeros_like(top)
        acc = gl.zeros([PARTS, G_PAD, D], gl.float32, layout=mma)
        for i in range(begin, end, BLOCK):
            async_copy.wait_group(STAGES - 2)  # this block has come
            barrier()  # to all warps, and all have done with the block before it, whose place is next
            free = gl.where(slot == 0, STAGES - 1, slot - 1)
            f_unit, f_at, f_end, f_base, f_early, f_first, f_late, f_row_end = fetch(
                k_ring.index(free), v_ring.index(free), keys, values,
                f_unit, stop, f_at, f_end, f_base, f_early, f_first, f_late, f_row_end, n, d,
                r, lengths, grown, units, ends, start, sinks, recent, rows, window, D, BLOCK,
            )  # fmt: skip
            k = k_ring.index(slot).permute((0, 2, 1)).load(right)
            logits = mma_v2(operand, k, gl.zeros([PARTS, G_PAD, N], gl.float32, layout=mma)) * scale
            visible = (i + n_logit < end)[:, None, :]
            logits = gl.where(visible, base_two(logits, softcap, SOFTCAP), -float("inf"))
            lost, top, total, acc = raise_top(gl.max(logits, 2), top, total, acc)
            weights = gl.exp2(logits - lost[:, :, None])
            total += gl.sum(weights, 2)
            v = v_ring.index(slot).load(right)
            acc = mma_v2(gl.convert_layout(weights.to(OPERAND), left), v, acc)
            slot = gl.where(slot == STAGES - 1, 0, slot + 1)

        if HALVED:  # queries 8 .. 16 are padding, and need not be merged
            top, total, acc = lower_half(top, M), lower_half(total, M), lower_half(acc, M)
        top = gl.convert_layout(top, gl.SliceLayout(2, merged))
        total = gl.convert_layout(total, gl.SliceLayout(2, merged))
        acc = gl.convert_layout(acc, merged)
        top_all = gl.max(top, 0)
        lost = gl.where(top_all == -float("inf"), 0.0, top_all)
        shrink = gl.exp2(top - lost[None, :])
        total = gl.convert_layout(gl.sum(total * shrink, 0), rows_of)
        top = gl.convert_layout(top_all, rows_of)
        acc = gl.sum(acc * shrink[:, :, None], 0)
        if APPEND:  # noqa: SIM102
            if new:  # from where it was made, then into the pools
                target = base + entries - 1
                gl.store(keys + target * D + d_rest, new_key)
                gl.store(values + target * D + d_rest, new_value)
                gl.store(positions + target, gl.load(seen).to(gl.int32))
                logit = gl.sum(asked.to(gl.float32) * new_key.to(gl.float32)[None, :], 1) * scale
                logit = base_two(logit, softcap, SOFTCAP)
                top, total, acc = add_entry(logit, new_value.to(gl.float32)[None, :], top, total, acc)

        at = (program + row) * G + g
        weight = gl.where(total > 0, total, 1.0)
        gl.store(lse + at, gl.where(total > 0, top + gl.log2(weight), -float("inf")), mask=g < G)
        gl.store(partial + at[:, None] * D + d_rest[None, :], acc / weight[:, None], mask=real)
        unit = segment_end
        if unit < stop:
            unit, row, row_begin, row_end, base, entries, grows, first, early, late, begin, end = segment_at(
                unit, stop, r, lengths, grown, units, ends, start, sinks, recent, rows, window
            )
    async_copy.wait_group(0)
