"""The second launch of a decode step: a row's output from its segments, and the lengths that have grown."""

import triton
import triton.language as tl

from headkv_kernels.quantised import rotated
from headkv_kernels.shares import plan_rows, share_of
from headkv_kernels.softmax import sink_of


@triton.jit
def combine_segments(
    rows, rule, gap, programs, ticket, partial, out,
    PAD: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    EARLY: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Some columns of one query head's output: its segments, each weighted by 2**lse; 0 without any entry. `ROTATED`
    segments are rotated back, which takes all columns.

    With `EARLY` it starts while `decode_shares` runs, and finds out meanwhile which programs serve its row.
    """
    row, g = tl.program_id(0) // G, tl.program_id(0) % G
    n = tl.arange(0, BLOCK)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    lse = partial + (programs + rows.number) * G * D
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    plan = plan_rows(tl.arange(0, PAD), rows, rule, gap)
    _, _, share = share_of(0, programs, plan.ends)
    own = plan.r == row
    end = tl.sum(tl.where(own, plan.ends, 0))
    first, last = (end - tl.sum(tl.where(own, plan.units, 0))) // share, tl.cdiv(end, share)
    if ticket is not None:
        tl.debug_barrier()  # all threads of this program have read the lengths, so it counts without a fence
        arrived = tl.atomic_add(ticket, 1, sem="relaxed")
    if EARLY:
        tl.extra.cuda.gdc_wait()
    if ticket is not None:  # noqa: SIM102 (known to the compiler)
        if arrived == tl.num_programs(0) * tl.num_programs(1) - 1:  # every program has read the lengths
            tl.store(rows.length + plan.r, plan.lengths, mask=plan.r < rows.number)
            if rows.residual is not None:
                tl.store(rows.residual + plan.r, plan.held.to(tl.int64), mask=plan.r < rows.number)
            tl.store(ticket, 0)

    top, total, acc = -float("inf"), 0.0, tl.zeros([COLUMNS], tl.float32)
    if rule.sink_logits is not None:  # as many as there are query heads
        top, total = sink_of(rule.sink_logits + tl.program_id(0) % (rows.heads * G), True), 1.0
    for program in range(first, last, BLOCK):
        here = program + n < last
        segment = (program + n + row) * G + g
        real = here[:, None] & (d < D)[None, :]
        # Not from the L1 cache, which need not know what other multiprocessors wrote while this waited.
        parts = tl.load(
            partial + segment[:, None] * D + d[None, :], mask=real, other=0.0, cache_modifier=".cg"
        )
        part_lse = tl.load(lse + segment, mask=here, other=-float("inf"), cache_modifier=".cg")
        top_now = tl.maximum(top, tl.max(part_lse, 0))
        base = tl.where(top_now == -float("inf"), 0.0, top_now)
        weight, shrink = tl.exp2(part_lse - base), tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink + tl.sum(parts * weight[:, None], 0)
        top = top_now
    result = acc / tl.where(total > 0, total, 1.0)
    if ROTATED:
        result = tl.reshape(rotated(result[None, :], D), [COLUMNS])
    tl.store(out + tl.program_id(0).to(tl.int64) * D + d, result.to(out.dtype.element_ty), mask=d < D)
