"""Entries in 8 bits, as `headkv.cache.quantised` specifies them: rotated, and rounded to steps of a scale a vector.

A rotation leaves products as they are, so that attention happens among rotated vectors. Queries are rotated once, and
meet codes; a key's scale multiplies the logit, a value's the weight; outputs are rotated back at the very end.
"""

import triton
import triton.language as tl

from headkv_kernels.softmax import load_entries

STEPS = tl.constexpr(127)  # codes lie in [-127, 127]


@triton.jit
def rotated(x, D: tl.constexpr):
    """`x` `[M, D_PAD]` float32, 0 beyond D, times the Hadamard matrix of as many channels as the largest power of two
    that divides D: orthonormal, and its own inverse. The order of sums is the specification's, and so are the bits."""
    M: tl.constexpr = x.shape[0]
    D_PAD: tl.constexpr = x.shape[1]
    WIDTH: tl.constexpr = D & -D
    for bit in tl.static_range(9):  # D is at most 512
        if (1 << bit) < WIDTH:
            pairs = tl.reshape(x, [M * D_PAD // (2 << bit), 2, 1 << bit])
            left, right = tl.split(tl.permute(pairs, (0, 2, 1)))
            x = tl.permute(tl.join(left + right, left - right), (0, 2, 1))
    return tl.reshape(x, [M, D_PAD]) * WIDTH**-0.5


@triton.jit
def quantised(x, D: tl.constexpr):
    """Vectors `x` `[M, D_PAD]`, whatever they hold beyond D, as codes `[M, D_PAD]` int8 and scales `[M]` in their dtype."""
    TINY: tl.constexpr = 2.0**-14 if x.dtype == tl.float16 else 2.0**-126
    d = tl.arange(0, x.shape[1])[None, :]
    turned = rotated(tl.where(d < D, x, 0.0).to(tl.float32), D)
    # Bits of numbers that are not negative are in their order, with what is no number above all.
    largest = tl.max(tl.abs(turned).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, tl.full(largest.shape, STEPS, tl.float32)).to(x.dtype)
    scale = tl.where(scale.to(tl.float32) < TINY, tl.full(scale.shape, TINY, tl.float32).to(x.dtype), scale)
    steps = tl.div_rn(turned, tl.broadcast_to(scale.to(tl.float32)[:, None], turned.shape))
    steps = tl.where(steps == steps, tl.clamp(steps, -STEPS, STEPS), 0.0)
    # Rounds to the nearest, and to even: float32 has no more digits there.
    return ((steps + 1.5 * 2.0**23) - 1.5 * 2.0**23).to(tl.int8), scale


@triton.jit
def quantised_entry(x, pools, slot, side, D: tl.constexpr):
    """A new key (`side` 0) or value (1) `[D_PAD]` as codes, and as the rotated float32 vector that they stand for, once
    its scale is in the slot."""
    D_PAD: tl.constexpr = x.shape[0]
    codes, scale = quantised(x[None, :], D)
    tl.store(pools.scale + slot * 2 + side + tl.arange(0, 1), scale)
    stands_for = codes.to(tl.float32) * scale.to(tl.float32)[:, None]
    return tl.reshape(codes, [D_PAD]), tl.reshape(stands_for, [D_PAD])


@triton.jit
def load_scales(pools, slots, here):
    """`[N]` float32 twice: the scales of the keys and of the values in the slots `[N]`, 0 where not `here`."""
    both = pools.scale + slots[:, None] * 2 + tl.arange(0, 2)[None, :]
    return tl.split(tl.load(both, mask=here[:, None], other=0.0).to(tl.float32))


@triton.jit
def load_sum(sums, row, pools, D: tl.constexpr, D_PAD: tl.constexpr):
    """`[D_PAD]` float32: the row's sum of what it dropped, rotated where its entries are."""
    d = tl.arange(0, D_PAD)
    total = tl.load(sums + row * D + d, mask=d < D, other=0.0)
    if pools.scale is not None:
        total = tl.reshape(rotated(total[None, :], D), [D_PAD])
    return total
