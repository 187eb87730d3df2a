"""Device functions that decode and extend share: logits, and a softmax that grows block by block.

A running softmax is three float32 tensors: `top` `[M]`, a query's largest logit so far; `total` `[M]`, the
sum of its weights 2**(logit - top); `acc` `[M, D]`, the sum of values times weights (online softmax, arXiv
1805.02867). Logits are in units of ln 2: weights are then powers of two, which the hardware computes
directly.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def base_two(logit, softcap, SOFTCAP: tl.constexpr):
    """A scaled logit, capped, in units of ln 2."""
    if SOFTCAP:  # tanh(x) = 1 - 2 / (1 + e^2x), right at both ends of float32
        logit = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(logit * (2.0 * LOG2E / softcap))))
    return logit * LOG2E


@triton.jit
def start_softmax(M: tl.constexpr, D_PAD: tl.constexpr):
    """A running softmax over no entry at all."""
    top = tl.full([M], -float("inf"), tl.float32)
    return top, tl.zeros([M], tl.float32), tl.zeros([M, D_PAD], tl.float32)


@triton.jit
def raise_top(logit, top, total, acc):
    """Measure weights from a new largest `logit` `[M]`; returns what logits lose, and the softmax."""
    top_now = tl.maximum(top, logit)
    base = tl.where(top_now == -float("inf"), 0.0, top_now)  # nothing visible yet: -inf - -inf would be NaN
    shrink = tl.exp2(top - base)
    return base, top_now, total * shrink, acc * shrink[:, None]


@triton.jit
def add_block(logits, values, top, total, acc):
    """Take in N entries: `logits` `[M, N]`, -inf where not visible, and `values` `[N, D]`."""
    base, top, total, acc = raise_top(tl.max(logits, 1), top, total, acc)
    weights = tl.exp2(logits - base[:, None])
    return top, total + tl.sum(weights, 1), add_product(weights, values, acc)


@triton.jit
def add_entry(logit, value, top, total, acc):
    """Take in one entry a query: `logit` `[M]` and `value` `[M, D]` or `[1, D]` float32."""
    base, top, total, acc = raise_top(logit, top, total, acc)
    weight = tl.exp2(logit - base)
    return top, total + weight, acc + weight[:, None] * value


@triton.jit
def add_product(weights, values, acc):
    """`acc + weights @ values` as if in float32: 16-bit values meet the weights in two 16-bit parts, as one
    part alone would leave a bfloat16 weight only 8 bits."""
    if values.dtype == tl.float32:
        acc = tl.dot(weights, values, acc, input_precision="ieee")
    else:
        large = weights.to(values.dtype)
        small = (weights - large.to(tl.float32)).to(values.dtype)
        acc = tl.dot(small, values, tl.dot(large, values, acc))
    return acc


@triton.jit
def load_entries(pool, slots, here, D: tl.constexpr, D_PAD: tl.constexpr, OPERAND: tl.constexpr):
    """`[N, D_PAD]`: the pool's slots `[N]` int64, 0 where not `here` and beyond D."""
    d = tl.arange(0, D_PAD)
    pointers = pool + slots[:, None] * D + d[None, :]
    return tl.load(pointers, mask=here[:, None] & (d < D)[None, :], other=0.0).to(OPERAND)


@triton.jit
def spans(first, length, sinks, recent):
    """Which of the entries `first .. length` a windowed row (`recent > 0`) shows: `early` from `first` on
    (what is left of the sinks), then `late .. length`. An ordinary row: all of them, as `late`."""
    sinks = tl.minimum(sinks, length)
    late = tl.where(recent > 0, tl.maximum(first, tl.maximum(sinks, length - recent)), first)
    early = tl.where(recent > 0, tl.maximum(sinks - first, 0), 0)
    return early, late
