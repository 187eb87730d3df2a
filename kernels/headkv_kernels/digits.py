"""Whole numbers as bytes, of which tensor cores take products, for `ring_codes.py`.

A number x is n steps, a step the largest |x| over 32,512 = 127 * 256, and n two bytes with signs, 256 * high + low.
What is below half a step counts as 0: of a query's channels, and of a block's weights times their values' scales,
where N of them are less than N / 65,024 of the largest. A product sums over four bytes that lie side by side in a
thread: of keys these are four channels, as they are stored; of values they must be four entries, so that `transposed`
turns 4 x 4 bytes around.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from headkv_kernels.quantised import butterflies

MOST_STEPS = gl.constexpr(32512.0)  # 127 * 256
MAGIC = gl.constexpr(1.5 * 2.0**23)  # added to a small number, the sum's low bits are that number, rounded
MAGIC_BITS = gl.constexpr(0x4B400000)
QUERIES = gl.constexpr(4)  # a row has at most
# Of what is rotated: the queries, and the new key and value twice. Of zeros in their place, what has no use would wait
# for divisions: those by tiny numbers take long.
ROWS = gl.constexpr(8)


@gluon.constexpr_function
def value_layout(warps, entries, width):
    """Of values `[WARPS, N, BYTES]`: a thread has words of four entries, 0, 1, 8 and 9 more than some other, one behind
    another, and of these as many as lie side by side in an eighth of an entry."""
    high = width.bit_length() - 4
    registers = [[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 8, 0]]
    registers += [[0, 0, 1 << bit] for bit in range(2, high)]
    registers += [[0, 1 << bit, 0] for bit in range(4, entries.bit_length() - 1)]
    lanes = [[0, 2, 0], [0, 4, 0]] + [[0, 0, 1 << bit] for bit in range(high, high + 3)]
    over = [[1 << bit, 0, 0] for bit in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, over, [], [warps, entries, width])


# The low four bits of each byte, and the high four, or 16 * (high four - 8), a byte with a sign: that saves a shift.
NIBBLES = gl.constexpr("and.b32 $0, $2, 0x0f0f0f0f; shr.u32 $1, $2, 4; and.b32 $1, $1, 0x0f0f0f0f;")
SIGNED_NIBBLES = gl.constexpr("and.b32 $0, $2, 0x0f0f0f0f; lop3.b32 $1, $2, 0xf0f0f0f0, 0x80808080, 0x6a;")


@gluon.jit
def halves_of_bytes(x, NIBBLES: gl.constexpr):
    """Two numbers of each byte, by the instructions `NIBBLES` or `SIGNED_NIBBLES`."""
    return gl.inline_asm_elementwise(NIBBLES, "=&r,=r,r", [x], dtype=(gl.int8, gl.int8), is_pure=True, pack=4)


@gluon.jit
def transposed(x):
    """Of every four words of four bytes: word i has byte i of each."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d;
        prmt.b32 a, $4, $5, 0x5140;
        prmt.b32 b, $6, $7, 0x5140;
        prmt.b32 c, $4, $5, 0x7362;
        prmt.b32 d, $6, $7, 0x7362;
        prmt.b32 $0, a, b, 0x5410;
        prmt.b32 $1, a, b, 0x7632;
        prmt.b32 $2, c, d, 0x5410;
        prmt.b32 $3, c, d, 0x7632;
        }""",
        "=&r,=&r,=r,=r,r,r,r,r",
        [x],
        dtype=gl.int8,
        is_pure=True,
        pack=16,
    )


@gluon.jit
def channels_first(x):
    """Values `[WARPS, N, BYTES]` with their bytes turned around, as `[WARPS, BYTES, N]`, both in another order.

    From its lowest bit on, an entry's number is made of bits 0, 3, 1, 2, 4 and 5 of what it was, as `entries_first` has
    it; a byte's of bits 4, 5 and 6 (of 128), then 0, 1, 2 and 3. Then each thread has what the product wants of it.
    """
    WARPS: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    BYTES: gl.constexpr = x.shape[2]
    x = gl.reshape(x, [WARPS, N // 32, 2, 2, 4, 2, 8, BYTES // 32, 2, 2])
    return gl.reshape(gl.permute(x, (0, 7, 3, 5, 6, 1, 2, 4, 8, 9)), [WARPS, BYTES, N])


@gluon.jit
def in_order(x):
    """`[WARPS, BYTES, M]`, bytes as `channels_first` has them, in their own order."""
    WARPS: gl.constexpr = x.shape[0]
    BYTES: gl.constexpr = x.shape[1]
    M: gl.constexpr = x.shape[2]
    x = gl.reshape(x, [WARPS, BYTES // 32, 2, 2, 8, M])
    return gl.reshape(gl.permute(x, (0, 4, 1, 2, 3, 5)), [WARPS, BYTES, M])


@gluon.jit
def entries_first(x):
    """Of `[WARPS, M, N]`, the entries as `channels_first` has them: `[WARPS, N, M]`."""
    WARPS: gl.constexpr = x.shape[0]
    M: gl.constexpr = x.shape[1]
    N: gl.constexpr = x.shape[2]
    x = gl.permute(gl.reshape(x, [WARPS, M, N // 16, 2, 4, 2]), (0, 2, 4, 3, 5, 1))
    return gl.reshape(x, [WARPS, N, M])


@gluon.jit
def rotated_in_warps(x, d, LAYOUT: gl.constexpr):
    """`quantised.rotated` of `[ROWS, D]`, where a thread has neighbouring channels `d` and a warp all of a row."""
    D: gl.constexpr = x.shape[1]
    x = gl.convert_layout(butterflies(x, 1, D // 32), LAYOUT)
    for bit in gl.static_range(5):
        lanes = gl.full([ROWS, D], 1 << bit, gl.int32, layout=LAYOUT)
        other = gl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;",
            "=r,r,r",
            [x, lanes],
            dtype=gl.float32,
            is_pure=False,
            pack=1,
        )
        x = x * gl.where((d >> bit) // (D // 32) % 2 == 0, 1.0, -1.0) + other
    return x * D**-0.5


@gluon.jit
def largest_of(x, axis: gl.constexpr):
    """The largest of numbers that are not negative, or what is no number: its bits are the greatest. (Scales are not
    negative: `quantised` makes them of largest magnitudes.)"""
    return gl.max(x.to(gl.int32, bitcast=True), axis).to(gl.float32, bitcast=True)


@gluon.jit
def whole_numbers(x, largest):
    """`x` `[..., N]` in steps of its `largest` over `MOST_STEPS`, in the low bits of what is returned."""
    some = largest > 1e-30  # what is less counts as 0
    inverse = gl.where(some, MOST_STEPS / gl.where(some, largest, 1.0), 0.0)
    return (x * gl.expand_dims(inverse, -1) + MAGIC).to(gl.int32, bitcast=True)


@gluon.jit
def for_each_warp(x, WARPS: gl.constexpr):
    """The same `[M, K]` for each warp."""
    return tl.broadcast_to(x[None, :, :], [WARPS, x.shape[0], x.shape[1]])


@gluon.jit
def scale_of(pair, DTYPE: gl.constexpr, which: gl.constexpr):
    """Of two scales of 16 bits in one number, one as float32."""
    return (pair >> (16 * which)).to(gl.int16).to(DTYPE, bitcast=True).to(gl.float32)


@gluon.jit
def halves_of_rows(x):
    """The first and the second half of `[ROWS, D]`: stays in registers."""
    return gl.split(gl.permute(gl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), (1, 2, 0)))


@gluon.jit
def one_of_two(x):
    """Of what each query has twice, `[2 * QUERIES]`, one each."""
    return gl.max(gl.reshape(x, [2, QUERIES]), 0)
