"""Entries in 8 bits, as `headkv.cache.quantised` specifies them: rotated, and rounded to steps of a scale a vector.

A rotation leaves products as they are, so that attention happens among rotated vectors. Queries are rotated once, and
meet codes; a key's scale multiplies the logit, a value's the weight; outputs are rotated back at the very end.
"""

import triton
import triton.language as tl

from headkv_kernels.rows import INTERPRETED
from headkv_kernels.softmax import LIFT, base_two, raise_top

ASSEMBLED = tl.constexpr(not INTERPRETED)
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
    """Vectors `x` `[M, D_PAD]`, whatever is beyond D, as codes `[M, D_PAD]` int8 and scales `[M]` in their dtype."""
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
def halves(x):
    """Even and odd channels of `[M, D_PAD]`, `[M, D_PAD // 2]` each."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def joined(even, odd):
    """What `halves` took apart."""
    return tl.reshape(tl.join(even, odd), [even.shape[0], even.shape[1] * 2])


@triton.jit
def load_halves(pool, slots, here, D: tl.constexpr, D_PAD: tl.constexpr, OPERAND: tl.constexpr):
    """Codes of the even and of the odd channels in the pool's slots `[N]`, `[N, D_PAD // 2]` each; as `load_entries`.

    Two neighbours are one number of 16 bits. As such they pass through shared memory, where hardware turns blocks of
    numbers of that size around, but none of 8.
    """
    d = tl.arange(0, D_PAD // 2)[None, :]
    real = here[:, None] & (d < (D + 1) // 2)
    if D % 2 == 0:
        pairs = pool.to(tl.pointer_type(tl.int16)) + slots[:, None] * (D // 2) + d
        return widened(tl.load(pairs, mask=real, other=0), OPERAND)
    even = pool + slots[:, None] * D + 2 * d
    odd = tl.load(even + 1, mask=real & (2 * d + 1 < D), other=0)
    return tl.load(even, mask=real, other=0).to(OPERAND), odd.to(OPERAND)


@triton.jit
def widened(pairs, OPERAND: tl.constexpr):
    """The low and the high byte of each number of 16 bits, as `OPERAND`.

    Conversions run at an eighth of the speed of other instructions; so 16-bit floats are put together, two at a time.
    In bfloat16 0x4300 is 128, and the last bit counts 1: a code is 128 and its low 7 bits, less 128, or 256 if its sign
    is set. In float16 0x6400 is 1024: a code is 1024 and the code plus 128, less 1152.
    """
    if OPERAND == tl.bfloat16 and ASSEMBLED:  # noqa: SIM300
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 bits, less, high;
            lop3.b32 bits, $2, 0x007f007f, 0x43004300, 0xea;
            lop3.b32 less, $2, 0x00800080, 0x43004300, 0xea;
            fma.rn.bf16x2 $0, less, $3, bits;
            shr.u32 high, $2, 8;
            lop3.b32 bits, high, 0x007f007f, 0x43004300, 0xea;
            lop3.b32 less, high, 0x00800080, 0x43004300, 0xea;
            fma.rn.bf16x2 $1, less, $3, bits;
            }""",
            "=&r,=r,r,r",
            [pairs, tl.full(pairs.shape, -0x4080, tl.int16)],  # the bits of -1
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    if OPERAND == tl.float16 and ASSEMBLED:  # noqa: SIM300
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 bits, high;
            lop3.b32 bits, $2, 0x00ff00ff, $3, 0x6a;
            sub.f16x2 $0, bits, $3;
            shr.u32 high, $2, 8;
            lop3.b32 bits, high, 0x00ff00ff, $3, 0x6a;
            sub.f16x2 $1, bits, $3;
            }""",
            "=&r,=r,r,r",
            [pairs, tl.full(pairs.shape, 0x6480, tl.int16)],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return ((pairs << 8) >> 8).to(OPERAND), (pairs >> 8).to(OPERAND)


@triton.jit
def add_codes(
    query, pools, slots, here, visible, rule, top, total, acc,
    D: tl.constexpr, D_PAD: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """`softmax.add_block` of the slots `[N]` that are `here`, as far as `visible`; of `query` and `acc`, rotated, the
    `halves`."""
    k_even, k_odd = load_halves(pools.key, slots, here, D, D_PAD, OPERAND)
    v_even, v_odd = load_halves(pools.value, slots, here, D, D_PAD, OPERAND)
    key_scales, value_scales = load_scales(pools, slots, here)
    logits = tl.dot(query[0], tl.trans(k_even), input_precision="ieee")
    logits = tl.dot(query[1], tl.trans(k_odd), logits, input_precision="ieee")
    logits = base_two(logits * (key_scales * rule.scale)[None, :], rule)
    logits = tl.where(visible[None, :], logits, -float("inf"))
    base, top_now, total, even = raise_top(tl.max(logits, 1), top, total, acc[0])
    odd = acc[1] * tl.exp2(top - base)[:, None]
    weights = tl.exp2(logits - base[:, None])
    total += tl.sum(weights, 1)
    if OPERAND == tl.float16:  # noqa: SIM300
        shares = (weights * (value_scales * LIFT)[None, :]).to(OPERAND)
        even += tl.dot(shares, v_even) * (1.0 / LIFT)
        odd += tl.dot(shares, v_odd) * (1.0 / LIFT)
    else:
        shares = (weights * value_scales[None, :]).to(OPERAND)
        even = tl.dot(shares, v_even, even, input_precision="ieee")
        odd = tl.dot(shares, v_odd, odd, input_precision="ieee")
    return top_now, total, (even, odd)


@triton.jit
def load_sum(sums, row, pools, D: tl.constexpr, D_PAD: tl.constexpr):
    """`[D_PAD]` float32: the row's sum of what it dropped, rotated where its entries are."""
    d = tl.arange(0, D_PAD)
    total = tl.load(sums + row * D + d, mask=d < D, other=0.0)
    if pools.scale is not None:
        total = tl.reshape(rotated(total[None, :], D), [D_PAD])
    return total
