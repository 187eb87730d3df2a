"""Entries in 8 bits, or in 4: a rotation that spreads what few channels hold over all of them, one scale a vector,
rounding.

Keys have channels that are ten times as large as the others, and one scale for a whole vector would leave those others
few of its steps. A Hadamard rotation turns each vector so that all channels are about as large (QuaRot, arXiv
2404.00456). It is orthonormal: products of queries and keys stay as they are, and it is its own inverse. So a vector is
quantised once, by itself, when it is stored; whatever moves it later (eviction, a new pool, a file) copies codes and
scale as they are, and nothing is ever rounded twice.

Codes of 8 bits are the 255 whole numbers from -127 to 127, those of 4 the 16 odd ones from -15 to 15: the middles of 16
equal cells, of which the largest channel touches the outer end. Two of them share a byte, the even channel's in its
lower half, as (code + 15) / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headkv.cache.rows import Pools

# Of each storage but "model": the bits of a key's codes, and of a value's.
BITS = {"int8": (8, 8), "k8v4": (8, 4), "int4": (4, 4)}
DTYPES = {8: torch.int8, 4: torch.uint8}  # of pools, by the bits of a code
LARGEST = {8: 127, 4: 16}  # what the largest channel is in scales, by the bits of a code
PART = 1 << 14  # vectors quantised at a time, which bounds the float32 copies


def rotation_width(head_dim: int) -> int:
    """Channels that are rotated together: the largest power of two that divides D.

    >>> [rotation_width(d) for d in (64, 128, 96, 80, 5)]
    [64, 128, 32, 16, 1]
    """
    return head_dim & -head_dim


def rotated(x: Tensor) -> Tensor:
    """`x` `[..., D]` times the Hadamard matrix of each `rotation_width` channels, orthonormal and its own inverse.

    By butterflies, in a fixed order of sums: the compiled backend gives the same bits.

    >>> rotated(torch.tensor([8.0, 0.0, 0.0, 0.0])).tolist()
    [4.0, 4.0, 4.0, 4.0]
    >>> rotated(rotated(torch.tensor([1.0, 2.0, 3.0, 4.0]))).tolist()
    [1.0, 2.0, 3.0, 4.0]
    """
    width, step = rotation_width(x.shape[-1]), 1
    while step < width:
        left, right = x.unflatten(-1, (-1, 2, step)).unbind(-2)
        x = torch.stack([left + right, left - right], -2).flatten(-3)
        step *= 2
    return x * width**-0.5


def quantised(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Vectors `[..., D]` as codes, `[..., D]` int8 or `[..., D // 2]` uint8, and scales `[...]` in the dtype of `x`.

    A rotated channel is off by at most half a scale in 8 bits, and by a scale in 4. A vector with an element that is no
    number has such a scale. 4 bits take an even D.
    """
    turned = rotated(x.float())
    largest = turned.abs().amax(-1)
    # By a tensor: CUDA divides by a number as it multiplies by its inverse.
    scale = (largest / torch.full_like(largest, LARGEST[bits])).to(x.dtype)
    scale = scale.clamp(min=torch.finfo(x.dtype).tiny)
    steps = turned / scale.float()[..., None]
    if bits == 8:
        return steps.round().clamp(-127, 127).nan_to_num(0.0).to(torch.int8), scale
    halves = (steps * 0.5 + 7.5).round().clamp(0, 15).nan_to_num(0.0).to(torch.uint8)
    return halves[..., ::2] | halves[..., 1::2] << 4, scale


def restored(codes: Tensor, scale: Tensor) -> Tensor:
    """The vectors that `quantised` made codes and scales `[...]` of, as far as these tell, `[..., D]` float32.

    >>> x = torch.tensor([[3.0, -1.0, 0.5, 0.25]])
    >>> [float((restored(*quantised(x, bits)) - x).abs().max()) < error for bits, error in ((8, 0.02), (4, 0.3))]
    [True, True]
    """
    if codes.dtype == torch.uint8:
        codes = 2 * torch.stack([codes & 15, codes >> 4], -1).flatten(-2).to(torch.int8) - 15
    return rotated(codes.float() * scale.float()[..., None])


def empty_codes(vectors: Tensor, bits: int) -> Tensor:
    """Room for the codes of vectors `[..., D]`, `[..., D]` int8 or `[..., D // 2]` uint8."""
    return vectors.new_empty(*vectors.shape[:-1], vectors.shape[-1] * bits // 8, dtype=DTYPES[bits])


def bits_of(pools: Pools) -> tuple[int, int]:
    """Bits of the codes of keys, and of values."""
    by_dtype = {dtype: bits for bits, dtype in DTYPES.items()}
    return by_dtype[pools.keys.dtype], by_dtype[pools.values.dtype]


def storage_of(pools: Pools) -> str:
    """The name of how these entries are stored: "model" where they are no codes."""
    return "model" if pools.scales is None else {bits: name for name, bits in BITS.items()}[bits_of(pools)]


def quantised_pools(pools: Pools, bits: tuple[int, int]) -> Pools:
    """Pools of float entries in so many bits a key's and a value's channel; `scales` `[slots, 2]` are theirs."""
    sides = pools.keys, pools.values
    keys, values = (empty_codes(vectors, one) for vectors, one in zip(sides, bits, strict=True))
    scales = pools.keys.new_empty(pools.keys.shape[0], 2)
    for side, (vectors, codes, one) in enumerate(zip(sides, (keys, values), bits, strict=True)):
        for begin in range(0, scales.shape[0], PART):
            part = slice(begin, begin + PART)
            codes[part], scales[part, side] = quantised(vectors[part], one)
    return Pools(keys, values, pools.positions, scales)


def entries(pools: Pools, slots: Tensor | slice) -> tuple[Tensor, Tensor]:
    """Keys and values at `slots`, `[m, D]` each: as they are stored, or float32 where that is as codes."""
    keys, values = pools.keys[slots], pools.values[slots]
    if pools.scales is None:
        return keys, values
    scales = pools.scales[slots]
    return restored(keys, scales[:, 0]), restored(values, scales[:, 1])
