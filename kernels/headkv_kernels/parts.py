"""How an extension's rows are cut into parts, and what puts the parts' results together."""

from typing import NamedTuple

import triton
import triton.language as tl

from headkv_kernels.quantised import rotated
from headkv_kernels.softmax import add_entry, start_softmax

TRIED = tl.constexpr(8)  # sizes of parts
VARYING = ["tokens", "blocks", "cuts", "queries"]  # Triton would compile anew for 1 and for multiples of 16


class Parts(NamedTuple):
    """`[PAD]` each: the row `r`, into how many parts it is cut, and the running sum of that."""

    r: tl.tensor
    number: tl.tensor
    ends: tl.tensor


@triton.jit
def plan_parts(rows, cuts, PAD: tl.constexpr):
    """How the rows are cut: into at most as many parts as there are rows, and `cuts` more. These have as few entries
    as that allows, by some sizes that are tried."""
    r, most = tl.arange(0, PAD), rows.number + cuts
    entries = tl.load(rows.length + r, mask=r < rows.number, other=0)
    low, high = tl.cdiv(tl.sum(entries), most), tl.cdiv(tl.sum(entries), cuts)
    # With `low` there are enough parts if all are full; with `high` even if each row ends with an almost empty one.
    tried = tl.maximum(low + (high - low) * tl.arange(0, TRIED) // (TRIED - 1), 1)
    number = parts_needed(entries[None, :], tried[:, None])
    fits = tl.sum(tl.where((r < rows.number)[None, :], number, 0), 1) <= most
    size = tl.min(tl.where(fits, tried, tl.maximum(high, 1)))
    number = tl.where(r < rows.number, parts_needed(entries, size), 0)
    return Parts(r, number, tl.cumsum(number, 0))


@triton.jit
def parts_needed(entries, size):
    """Parts of a row: one even without entries, so that someone writes its output."""
    return tl.maximum(tl.cdiv(entries.to(tl.int32), size.to(tl.int32)), 1)


@triton.jit
def parts_of(plan, row):
    """A row's first part, and the one after its last."""
    own = plan.r == row
    last = tl.sum(tl.where(own, plan.ends, 0))
    return last - tl.sum(tl.where(own, plan.number, 0)), last


@triton.jit(do_not_specialize=VARYING)
def merge_rows(
    parts, lse, out, rows, cuts, queries, D: tl.constexpr, D_PAD: tl.constexpr,
    QUERIES: tl.constexpr, AT_ONCE: tl.constexpr, PAD: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Some of a row's `queries`: their outputs from all of its parts, each weighted by 2**lse; 0 without any entry.
    `ROTATED` parts are rotated back."""
    blocks = tl.cdiv(queries, QUERIES)
    row, query = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * QUERIES + tl.arange(0, QUERIES)
    query = query.to(tl.int64)
    d = tl.arange(0, D_PAD)
    first, last = parts_of(plan_parts(rows, cuts, PAD), row)
    real = (query < queries)[:, None] & (d < D)[None, :]
    top, total, acc = start_softmax(QUERIES, D_PAD)
    for begin in range(first, last, AT_ONCE):
        for i in tl.static_range(AT_ONCE):  # the loads of all are on their way together
            at = query + (begin + i) * queries
            here = (query < queries) & (at < last * queries)
            logit = tl.load(lse + at, mask=here, other=-float("inf"))
            value = tl.load(
                parts + at[:, None] * D + d[None, :], mask=here[:, None] & (d < D)[None, :], other=0.0
            )
            top, total, acc = add_entry(logit, value, top, total, acc)
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    if ROTATED:
        result = rotated(result, D)
    result = result.to(out.dtype.element_ty)
    tl.store(out + (row * queries + query)[:, None] * D + d[None, :], result, mask=real)
