"""Entries in 8 or 4 bits as `headkv.cache.quantised` specifies them: rotated, and rounded to steps of a scale a vector.

A rotation leaves products as they are, so that attention happens among rotated vectors. Queries are rotated once, and
meet codes; a key's scale multiplies the logit, a value's the weight; outputs are rotated back at the very end.
A pool's dtype says its bits, int8 or uint8; keys need not have those of values.

Codes travel as numbers of 16 bits, two or four neighbours each: hardware turns blocks of such numbers around on their
way out of shared memory, but none of 8 bits. So a block of entries comes `apart`, as every other channel or every
fourth.
"""

import triton
import triton.language as tl

from headkv_kernels.rows import INTERPRETED
from headkv_kernels.softmax import LIFT, base_two, load_entries, raise_top

ASSEMBLED = tl.constexpr(not INTERPRETED)


@triton.jit
def butterflies(x, FIRST: tl.constexpr, LAST: tl.constexpr):
    """`x` `[M, D_PAD]` after some steps of the product with a Hadamard matrix: of channels that are `FIRST` apart, then
    twice that, and so on before `LAST`, the sums and differences."""
    M: tl.constexpr = x.shape[0]
    D_PAD: tl.constexpr = x.shape[1]
    for bit in tl.static_range(9):  # D is at most 512
        if (1 << bit) >= FIRST and (1 << bit) < LAST:
            pairs = tl.reshape(x, [M * D_PAD // (2 << bit), 2, 1 << bit])
            left, right = tl.split(tl.permute(pairs, (0, 2, 1)))
            x = tl.permute(tl.join(left + right, left - right), (0, 2, 1))
    return tl.reshape(x, [M, D_PAD])


@triton.jit
def rotated(x, D: tl.constexpr):
    """`x` `[M, D_PAD]` float32, 0 beyond D, times the Hadamard matrix of as many channels as the largest power of two
    that divides D: orthonormal, and its own inverse. The order of sums is the specification's, and so are the bits."""
    WIDTH: tl.constexpr = D & -D
    return butterflies(x, 1, WIDTH) * WIDTH**-0.5


@triton.jit
def turned_from(x, D: tl.constexpr):
    """New vectors `[M, D_PAD]`, whatever is beyond D, as float32 and rotated."""
    d = tl.arange(0, x.shape[1])[None, :]
    return rotated(tl.where(d < D, x, 0.0).to(tl.float32), D)


@triton.jit
def in_steps(turned, DTYPE: tl.constexpr, most):
    """Rotated vectors `[M, D_PAD]` in steps of scales `[M]` of `DTYPE`: `most` of them, one number or `[M]`, are the
    largest channel; and the scales."""
    TINY: tl.constexpr = 2.0**-14 if DTYPE == tl.float16 else 2.0**-126  # noqa: SIM300
    # Bits of numbers that are not negative are in their order, with what is no number above all.
    largest = tl.max(tl.abs(turned).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, most).to(DTYPE).to(tl.float32)
    scale = tl.where(scale < TINY, TINY, scale).to(DTYPE)
    return tl.div_rn(turned, tl.broadcast_to(scale.to(tl.float32)[:, None], turned.shape)), scale


@triton.jit
def nearest(steps, LARGEST: tl.constexpr):
    """The code nearest to each: whole numbers up to 127, odd ones where `LARGEST` is 16."""
    MAGIC: tl.constexpr = 1.5 * 2.0**23
    # MAGIC rounds to the nearest, and to even: float32 has no more digits there.
    if LARGEST == 16:
        halved = tl.where(steps == steps, tl.clamp(steps * 0.5 + 7.5, 0.0, 15.0), 0.0)
        return ((halved + MAGIC) - MAGIC) * 2.0 - 15.0
    steps = tl.where(steps == steps, tl.clamp(steps, -LARGEST, LARGEST), 0.0)
    return (steps + MAGIC) - MAGIC


@triton.jit
def quantised(turned, DTYPE: tl.constexpr, LARGEST: tl.constexpr):
    """Rotated vectors `[M, D_PAD]` as codes `[M, D_PAD]` in float32 and scales `[M]` of `DTYPE`. The largest channel is
    `LARGEST` scales. Codes are whole numbers where that is 127, odd ones where it is 16."""
    steps, scale = in_steps(turned, DTYPE, LARGEST * 1.0)
    return nearest(steps, LARGEST), scale


@triton.jit
def store_codes(turned, pool, scales, slots, here, D: tl.constexpr):
    """New keys or values, rotated, `[M, D_PAD]` into the pool's slots `[M]` that are `here`; returns what their codes
    stand for, in float32 and rotated. `scales` points at this side's scale of slot 0."""
    PACKED: tl.constexpr = pool.dtype.element_ty == tl.uint8
    WIDTH: tl.constexpr = D // 2 if PACKED else D
    codes, scale = quantised(turned, scales.dtype.element_ty, 16 if PACKED else 127)
    tl.store(scales + slots * 2, scale, mask=here)
    if PACKED:
        low, high = halves(((codes + 15.0) * 0.5).to(tl.uint8))
        bits = low | (high << 4)
    else:
        bits = codes.to(tl.int8)
    w = tl.arange(0, bits.shape[1])[None, :]
    tl.store(pool + slots[:, None] * WIDTH + w, bits, mask=here[:, None] & (w < WIDTH))
    return codes * scale.to(tl.float32)[:, None]


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
def apart(x, pool):
    """`x` `[M, D_PAD]` as `load_apart` has the pool's codes."""
    even, odd = halves(x)
    if pool.dtype.element_ty == tl.uint8:
        first, third = halves(even)
        second, fourth = halves(odd)
        return first, second, third, fourth
    else:
        return even, odd


@triton.jit
def joined(parts):
    """What was `apart`, `[M, D_PAD]`."""
    if len(parts) == 4:
        parts = joined((parts[0], parts[2])), joined((parts[1], parts[3]))
    return tl.reshape(tl.join(parts[0], parts[1]), [parts[0].shape[0], parts[0].shape[1] * 2])


@triton.jit
def load_apart(pool, slots, here, D: tl.constexpr, D_PAD: tl.constexpr, OPERAND: tl.constexpr):
    """Codes in the pool's slots `[N]`: of the even and of the odd channels, `[N, D_PAD // 2]` each; in 4 bits of the
    channels 0, 4 and so on, of 1, 5, of 2, 6 and of 3, 7, `[N, D_PAD // 4]` each. 0 where not `here` and beyond D, in 4
    bits -15, which is for scales, weights and queries of 0 to undo."""
    PACKED: tl.constexpr = pool.dtype.element_ty == tl.uint8
    WIDTH: tl.constexpr = D // 2 if PACKED else D
    w = tl.arange(0, D_PAD // 4 if PACKED else D_PAD // 2)[None, :]
    real = here[:, None] & (w < (WIDTH + 1) // 2)
    if WIDTH % 2 == 0:
        words = pool.to(tl.pointer_type(tl.int16)) + slots[:, None] * (WIDTH // 2) + w
        words = tl.load(words, mask=real, other=0)
    else:
        low = pool + slots[:, None] * WIDTH + 2 * w
        high = tl.load(low + 1, mask=real & (2 * w + 1 < WIDTH), other=0).to(tl.int16) << 8
        words = (tl.load(low, mask=real, other=0).to(tl.int16) & 255) | high
    if PACKED:
        return widened_from_4(words, OPERAND)
    else:
        return widened(words, OPERAND)


@triton.jit
def load_vectors(pool, slots, here, D: tl.constexpr, D_PAD: tl.constexpr, OPERAND: tl.constexpr):
    """`[N, D_PAD]`: `load_entries`, where the pool has vectors or codes of any bits."""
    if pool.dtype.element_ty.is_int():
        return joined(load_apart(pool, slots, here, D, D_PAD, OPERAND))
    else:
        return load_entries(pool, slots, here, D, D_PAD, OPERAND)


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
def widened_from_4(words, OPERAND: tl.constexpr):
    """The four codes in each number of 16 bits, from its lowest bits on, as `OPERAND`.

    Put together as in `widened`. A code is 2 n - 15 of its bits n. In bfloat16 n stands one bit up, where 128 makes it
    128 + 2 n, and 143 is taken off. In float16 there is room for two of them in one shift: two bits up, 1024 + 4 n, and
    six, 1024 + 64 n; a factor makes both 2 n and what is taken off.
    """
    if OPERAND == tl.bfloat16 and ASSEMBLED:  # noqa: SIM300
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 bits, one, less;
            mov.b32 one, 0x3f803f80;
            mov.b32 less, 0xc30fc30f;
            shl.b32 bits, $4, 1;
            lop3.b32 bits, bits, 0x001e001e, 0x43004300, 0xea;
            fma.rn.bf16x2 $0, bits, one, less;
            shr.u32 bits, $4, 3;
            lop3.b32 bits, bits, 0x001e001e, 0x43004300, 0xea;
            fma.rn.bf16x2 $1, bits, one, less;
            shr.u32 bits, $4, 7;
            lop3.b32 bits, bits, 0x001e001e, 0x43004300, 0xea;
            fma.rn.bf16x2 $2, bits, one, less;
            shr.u32 bits, $4, 11;
            lop3.b32 bits, bits, 0x001e001e, 0x43004300, 0xea;
            fma.rn.bf16x2 $3, bits, one, less;
            }""",
            "=&r,=&r,=&r,=r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    if OPERAND == tl.float16 and ASSEMBLED:  # noqa: SIM300
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 bits, both, half, less, small, little;
            mov.b32 half, 0x38003800;
            mov.b32 less, 0xe01ee01e;
            mov.b32 small, 0x28002800;
            mov.b32 little, 0xd1e0d1e0;
            shl.b32 both, $4, 2;
            lop3.b32 bits, both, 0x003c003c, 0x64006400, 0xea;
            fma.rn.f16x2 $0, bits, half, less;
            lop3.b32 bits, both, 0x03c003c0, 0x64006400, 0xea;
            fma.rn.f16x2 $1, bits, small, little;
            shr.u32 both, $4, 6;
            lop3.b32 bits, both, 0x003c003c, 0x64006400, 0xea;
            fma.rn.f16x2 $2, bits, half, less;
            lop3.b32 bits, both, 0x03c003c0, 0x64006400, 0xea;
            fma.rn.f16x2 $3, bits, small, little;
            }""",
            "=&r,=&r,=&r,=r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    first, second = (words & 15) * 2 - 15, ((words >> 4) & 15) * 2 - 15
    third, fourth = ((words >> 8) & 15) * 2 - 15, ((words >> 12) & 15) * 2 - 15
    return first.to(OPERAND), second.to(OPERAND), third.to(OPERAND), fourth.to(OPERAND)


@triton.jit
def add_codes(
    query, pools, slots, here, visible, rule, top, total, acc,
    D: tl.constexpr, D_PAD: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """`softmax.add_block` of the slots `[N]` that are `here`, as far as `visible`; of `query` and `acc`, rotated, what
    is `apart` as the keys' codes and as the values' are."""
    keys = load_apart(pools.key, slots, here, D, D_PAD, OPERAND)
    values = load_apart(pools.value, slots, here, D, D_PAD, OPERAND)
    key_scales, value_scales = load_scales(pools, slots, here)
    logits = tl.dot(query[0], tl.trans(keys[0]), input_precision="ieee")
    for i in tl.static_range(1, len(keys)):
        logits = tl.dot(query[i], tl.trans(keys[i]), logits, input_precision="ieee")
    logits = base_two(logits * (key_scales * rule.scale)[None, :], rule)
    logits = tl.where(visible[None, :], logits, -float("inf"))
    base, top, total, shrink = raise_top(tl.max(logits, 1), top, total, 1.0)
    weights = tl.exp2(logits - base[:, None])
    total += tl.sum(weights, 1)
    if OPERAND == tl.float16:  # noqa: SIM300
        value_scales *= LIFT
    shares = (weights * value_scales[None, :]).to(OPERAND)
    for i in tl.static_range(len(values)):
        part = acc[0] * shrink
        if OPERAND == tl.float16:  # noqa: SIM300
            part += tl.dot(shares, values[i]) * (1.0 / LIFT)
        else:
            part = tl.dot(shares, values[i], part, input_precision="ieee")
        acc = acc[1:] + (part,)  # in the end each is in its place again
    return top, total, acc


@triton.jit
def load_sum(sums, row, pools, D: tl.constexpr, D_PAD: tl.constexpr):
    """`[D_PAD]` float32: the row's sum of what it dropped, rotated where its entries are."""
    d = tl.arange(0, D_PAD)
    total = tl.load(sums + row * D + d, mask=d < D, other=0.0)
    if pools.scale is not None:
        total = tl.reshape(rotated(total[None, :], D), [D_PAD])
    return total
