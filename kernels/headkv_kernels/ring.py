"""The shares of `shares.py` once more, for Hopper, in Triton's Gluon dialect, which says where data lies.

The keys and values of a share pass through a ring of blocks in shared memory. A cursor of its own fetches
them, on across the ends of rows, and begins before the launch before this one has ended. Each warp computes
on entries of its own, with a block's values as the left operand of the second product, so that only a
group's queries need padding, to 8. For 16-bit rows without compensation and sliding window.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from headkv_kernels.shares import plan_rows, segment_at, share_of
from headkv_kernels.softmax import base_two

copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
WIDE = gl.constexpr(8)  # numbers of 2 bytes in an access of 16


@gluon.jit
def block_at(at, segment):
    """Entries of the block at entry `at` of a segment: up to the end of its span."""
    return gl.where(at < segment.front, gl.minimum(segment.front.to(gl.int32), segment.end), segment.end) - at


@gluon.jit
def next_block(segment, at, stop, plan, rows, rule):
    """The block at the cursor, which is a segment and an entry `at` in it: both, or those behind the segment's end; how
    many entries are left from there to the end of the span, and their first slot. The segment's `unit` is not below
    `stop` once nothing is left."""
    while (at >= segment.end) & (segment.unit < stop):
        segment = segment_at(segment.unit_end, stop, plan, rows, rule)
        at = segment.begin
    number = gl.where(segment.unit < stop, block_at(at, segment), 0)
    entry = gl.where(at < segment.front, segment.first + at, segment.back + at - segment.front)
    return segment, at, number, segment.base + entry


@gluon.jit
def fetch(
    k_slot, v_slot, segment, at, stop, n, offsets, plan, rows, pools, rule, D: gl.constexpr, BLOCK: gl.constexpr
):  # fmt: skip
    """Begin to copy the block at the cursor, zeros behind its end; returns the cursor behind it."""
    segment, at, number, slot = next_block(segment, at, stop, plan, rows, rule)
    begin = slot * D
    real = (n < number)[:, :, None]
    copy(k_slot, pools.key + begin + offsets, mask=real)
    copy(v_slot, pools.value + begin + offsets, mask=real)
    async_copy.commit_group()
    return segment, at + gl.minimum(number, BLOCK)


@gluon.constexpr_function
def copied_layout(warps, numbers, wide):
    """Of a block's entries `[WARPS, N, numbers]`: each warp copies its own, `wide` numbers, 16 bytes, a thread."""
    lanes = numbers // wide  # that copy one entry
    return gl.BlockedLayout([1, 1, wide], [1, 32 // lanes, lanes], [warps, 1, 1], [2, 1, 0])


@gluon.jit
def offsets_of(LAYOUT: gl.constexpr, WARPS: gl.constexpr, N: gl.constexpr, NUMBERS: gl.constexpr):
    """A block's entries `[WARPS, N]`, and where each number of these `[WARPS, N, NUMBERS]` lies behind the first."""
    pairs: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    part = gl.arange(0, WARPS, layout=gl.SliceLayout(1, pairs))[:, None]
    n = part * N + gl.arange(0, N, layout=gl.SliceLayout(0, pairs))[None, :]
    d = gl.arange(0, NUMBERS, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    return n, n[:, :, None] * NUMBERS + d[None, None, :]


@gluon.jit
def halves(x):
    """The first and the second half of dimension 1 of `[WARPS, M, N]`: stays in registers."""
    return gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2, x.shape[2]]), (0, 2, 3, 1)))


@gluon.jit
def ring_shares(
    q, query_positions, rows, pools, new, rule, gap, partial,
    PAD: gl.constexpr, G: gl.constexpr, G_PAD: gl.constexpr, D: gl.constexpr, D_PAD: gl.constexpr,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, OPERAND: gl.constexpr, EARLY: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """`shares.decode_shares`, whose arguments these are, with a ring of `STAGES` blocks."""
    WARPS: gl.constexpr = gl.num_warps()
    N: gl.constexpr = BLOCK // WARPS
    M: gl.constexpr = G_PAD // 2 if G <= G_PAD // 2 else G_PAD
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    copied: gl.constexpr = copied_layout(WARPS, D, WIDE)
    ring: gl.constexpr = gl.SwizzledSharedLayout(WIDE, 1, 8, [2, 1, 0])
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    by_query: gl.constexpr = gl.SliceLayout(1, mma)  # [WARPS, M] of [WARPS, D, M]
    # A thread holds all parts of a number: sums over parts stay inside of it.
    merged: gl.constexpr = gl.BlockedLayout([WARPS, 4, 1], [1, D // 4, 128 // D], [1, 1, WARPS], [1, 2, 0])
    rest: gl.constexpr = gl.SliceLayout(0, merged)  # [D, M]
    if D > 128:
        gl.static_assert(False, "D must be 64 or 128")

    program, programs = gl.program_id(0), gl.num_programs(0)
    lse = partial + (programs + rows.number) * G * D
    k_ring = gl.allocate_shared_memory(OPERAND, [STAGES, WARPS, N, D], ring)
    v_ring = gl.allocate_shared_memory(OPERAND, [STAGES, WARPS, N, D], ring)
    if EARLY and not AHEAD:
        tl.extra.cuda.gdc_wait()
    plan = plan_rows(gl.arange(0, PAD, layout=flat), rows, rule, gap)
    unit, stop, share = share_of(program, programs, plan.ends)
    segment = segment_at(unit, stop, plan, rows, rule)
    unit = segment.unit

    n, offsets = offsets_of(copied, WARPS, N, D)
    cursor, cursor_at = segment, segment.begin
    for ahead in range(STAGES - 1):
        cursor, cursor_at = fetch(
            k_ring.index(ahead), v_ring.index(ahead), cursor, cursor_at, stop, n, offsets,
            plan, rows, pools, rule, D, BLOCK,
        )  # fmt: skip

    part_q = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, left)))[:, None, None] * 0
    g_q = gl.arange(0, G_PAD, layout=gl.SliceLayout(0, gl.SliceLayout(2, left)))[None, :][:, :, None]
    d_q = gl.arange(0, D, layout=gl.SliceLayout(0, gl.SliceLayout(1, left)))[None, None, :]
    part_l = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(1, mma)))[:, None]
    n_logit = part_l * N + gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(1, mma)))[None, :]
    g = gl.arange(0, M, layout=gl.SliceLayout(0, rest))
    d_rest = gl.arange(0, D, layout=gl.SliceLayout(1, rest))
    real = (g < G)[None, :]
    slot = 0
    if AHEAD:
        tl.extra.cuda.gdc_wait()
    while unit < stop:
        batch, head = (segment.row // rows.heads).to(gl.int64), segment.row % rows.heads
        query = q.data + batch * q.batch + head * G * q.head
        operand = gl.load(
            query + (part_q + g_q * q.head + d_q), mask=(part_q + g_q < G) & (d_q < D), other=0.0
        )
        if new is not None:  # asked for before the loop, so that nothing waits for them behind it
            grows = (segment.unit_end == segment.row_end) & (segment.grows > 0)
            asked = gl.load(query + g[None, :] * q.head + d_rest[:, None], mask=real & grows, other=0.0)
            new_key = new.key.data + batch * new.key.batch + head * new.key.head + d_rest
            new_key = gl.load(new_key, mask=grows, other=0.0)
            new_value = new.value.data + batch * new.value.batch + head * new.value.head + d_rest
            new_value = gl.load(new_value, mask=grows, other=0.0)
        acc = gl.zeros([WARPS, D, M], gl.float32, layout=mma)
        logits = gl.zeros([WARPS, G_PAD, N], gl.float32, layout=mma)
        if M < G_PAD:
            logits = halves(logits)[0]
        top = gl.max(logits, 2) - float("inf")
        total = gl.zeros_like(top)
        at = segment.begin
        while at < segment.end:
            async_copy.wait_group(STAGES - 2)  # this block has come
            barrier()  # to all warps, and all have done with the block before it, whose place is next
            free = gl.where(slot == 0, STAGES - 1, slot - 1)
            cursor, cursor_at = fetch(
                k_ring.index(free), v_ring.index(free), cursor, cursor_at, stop, n, offsets,
                plan, rows, pools, rule, D, BLOCK,
            )  # fmt: skip
            if EARLY:  # noqa: SIM102
                if cursor.unit >= stop:  # all is asked for: the next launches may begin
                    tl.extra.cuda.gdc_launch_dependents()
            number = gl.minimum(block_at(at, segment), BLOCK)
            k = k_ring.index(slot).permute((0, 2, 1)).load(right)
            logits = mma_v2(operand, k, gl.zeros([WARPS, G_PAD, N], gl.float32, layout=mma)) * rule.scale
            logits = base_two(logits, rule)
            logits = gl.where((n_logit < number)[:, None, :], logits, -float("inf"))
            if M < G_PAD:  # the other queries are padding
                logits = halves(logits)[0]
            top_now = gl.maximum(top, gl.max(logits, 2))
            lost = gl.where(top_now == -float("inf"), 0.0, top_now)
            shrink = gl.exp2(top - lost)
            weights = gl.exp2(logits - lost[:, :, None])
            total, top = total * shrink + gl.sum(weights, 2), top_now
            weights = gl.convert_layout(gl.permute(weights.to(OPERAND), (0, 2, 1)), right)  # [WARPS, N, M]
            v = v_ring.index(slot).permute((0, 2, 1)).load(left)  # [WARPS, D, N]
            acc = mma_v2(v, weights, acc * gl.convert_layout(shrink, by_query)[:, None, :])
            slot = gl.where(slot == STAGES - 1, 0, slot + 1)
            at += number

        # One softmax out of all parts, in base two like every part.
        acc = gl.convert_layout(acc, merged)
        top = gl.convert_layout(top, gl.SliceLayout(1, merged))
        total = gl.convert_layout(total, gl.SliceLayout(1, merged))
        top_all = gl.max(top, 0)
        if new is not None:
            logit = gl.sum(asked.to(gl.float32) * new_key.to(gl.float32)[:, None], 0) * rule.scale
            logit = gl.where(grows, base_two(logit, rule), -float("inf"))
            logit = gl.convert_layout(logit, gl.SliceLayout(0, gl.SliceLayout(1, merged)))
            top_all = gl.maximum(top_all, logit)
        lost = gl.where(top_all == -float("inf"), 0.0, top_all)
        shrink = gl.exp2(top - lost[None, :])
        total = gl.sum(total * shrink, 0)
        acc = gl.sum(acc * shrink[:, None, :], 0)  # [D, M]
        if new is not None:
            weight = gl.exp2(logit - lost)
            total += weight
            weight = gl.convert_layout(weight, gl.SliceLayout(0, rest))
            acc += new_value.to(gl.float32)[:, None] * weight[None, :]
            if grows:  # and into the pools
                target = segment.base + segment.entries - 1
                gl.store(pools.key + target * D + d_rest, new_key)
                gl.store(pools.value + target * D + d_rest, new_value)
                gl.store(pools.position + target, gl.load(new.seen).to(gl.int32))

        place = (program + segment.row) * G + g
        total = gl.convert_layout(total, gl.SliceLayout(0, rest))
        top_all = gl.convert_layout(top_all, gl.SliceLayout(0, rest))
        weight = gl.where(total > 0, total, 1.0)
        gl.store(lse + place, gl.where(total > 0, top_all + gl.log2(weight), -float("inf")), mask=g < G)
        gl.store(partial + place[None, :] * D + d_rest[:, None], acc / weight[None, :], mask=real)
        unit = segment.unit_end
        if unit < stop:
            segment = segment_at(unit, stop, plan, rows, rule)
            unit = segment.unit
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    async_copy.wait_group(0)
