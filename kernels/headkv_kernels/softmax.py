"""Device functions that decode and extend share: logits, and a softmax that grows block by block.

A running softmax is three float32 tensors: `top` `[M]`, a query's largest logit so far; `total` `[M]`, the
sum of its weights 2**(logit - top); `acc` `[M, D]`, the sum of values times weights (online softmax, arXiv
1805.02867). Logits are in units of ln 2: weights are then powers of two, which the hardware computes
directly.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LIFT = tl.constexpr(64.0)  # the greatest scale of float16, 516, times this is finite there


@triton.jit
def base_two(logit, rule):
    """A scaled logit, capped, in units of ln 2."""
    if rule.softcap is not None:  # tanh(x) = 1 - 2 / (1 + e^2x), right at both ends of float32
        logit = rule.softcap * (1.0 - 2.0 / (1.0 + tl.exp2(logit * (2.0 * LOG2E / rule.softcap))))
    return logit * LOG2E


@triton.jit
def start_softmax(M: tl.constexpr, D_PAD: tl.constexpr):
    """A running softmax over no entry at all."""
    top = tl.full([M], -float("inf"), tl.float32)
    return top, tl.zeros([M], tl.float32), tl.zeros([M, D_PAD], tl.float32)


@triton.jit
def sink_of(pointers, here):
    """The logit that a softmax begins with in place of nothing, its weight 1: a query head's sink, -inf where not
    `here`. It has no value, and where it is -inf it is gone with the first entry."""
    sink = tl.load(pointers, mask=here, other=-float("inf")).to(tl.float32)
    return tl.where(sink > 2e38, 2e38, sink) * LOG2E  # finite in units of ln 2, too


@triton.jit
def raise_top(logit, top, total, acc):
    """Measure weights from a new largest `logit`; returns what logits lose, and the softmax."""
    top_now = tl.maximum(top, logit)
    base = tl.where(top_now == -float("inf"), 0.0, top_now)  # nothing visible yet: -inf - -inf would be NaN
    shrink = tl.exp2(top - base)
    return base, top_now, total * shrink, acc * tl.expand_dims(shrink, -1)


@triton.jit
def add_block(logits, values, top, total, acc, factor=1.0, scales=None):
    """Take in N entries: `logits * factor` `[M, N]`, -inf where not visible, and `values` `[N, D]`. Weights meet
    the values in the dtype of these, as they do in PyTorch's own attention. `factor` is positive. Where values are
    codes, weights are times their `scales` `[N]`."""
    base, top, total, acc = raise_top(tl.max(logits, -1) * factor, top, total, acc)
    weights = tl.exp2(logits * factor - tl.expand_dims(base, -1))
    if scales is None:
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
    elif values.dtype == tl.float16:  # small values' scales would leave a small weight few digits, or none
        shares = weights * tl.expand_dims(scales * LIFT, 0)
        acc += tl.dot(shares.to(values.dtype), values) * (1.0 / LIFT)
    else:
        shares = weights * tl.expand_dims(scales, 0)
        acc = tl.dot(shares.to(values.dtype), values, acc, input_precision="ieee")
    return top, total + tl.sum(weights, -1), acc


@triton.jit
def add_entry(logit, value, top, total, acc):
    """Take in one entry a query: `logit` `[M]` and `value` `[M, D]` or `[1, D]` float32."""
    base, top, total, acc = raise_top(logit, top, total, acc)
    weight = tl.exp2(logit - base)
    return top, total + weight, acc + weight[:, None] * value


@triton.jit
def load_entries(pool, slots, here, D: tl.constexpr, D_PAD: tl.constexpr, OPERAND: tl.constexpr):
    """`[N, D_PAD]`: the pool's slots `[N]` int64, 0 where not `here` and beyond D."""
    d = tl.arange(0, D_PAD)[None, :]
    return tl.load(pool + slots[:, None] * D + d, mask=here[:, None] & (d < D), other=0.0).to(OPERAND)


@triton.jit
def spans(first, length, sinks, recent):
    """Which of the entries `first .. length` a windowed row (`recent > 0`) shows: `front` from `first` on
    (what is left of the sinks), then `back .. length`. An ordinary row: all of them, from `back` on."""
    sinks = tl.minimum(sinks, length)
    back = tl.where(recent > 0, tl.maximum(first, tl.maximum(sinks, length - recent)), first)
    front = tl.where(recent > 0, tl.maximum(sinks - first, 0), 0)
    return front, back
