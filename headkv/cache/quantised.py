"""Entries in 8 bits, or in 4: a rotation that spreads what few channels hold over all of them, one scale a vector,
rounding.

Keys have channels that are ten times as large as the others, and one scale for a whole vector would leave those others
few of its steps. A Hadamard rotation turns each vector so that all channels are about as large (QuaRot, arXiv
2404.00456). It is orthonormal: products of queries and keys stay as they are, and it is its own inverse. So a vector is
quantised once, by itself, when it is stored; whatever moves it later (eviction, a new pool, a file) copies codes and
scale as they are, and nothing is ever rounded twice.

Codes of 8 bits are the 255 whole numbers from -127 to 127, those of 4 the 16 odd ones from -15 to 15: 0 is none of
them, and both ends are used. Two of them share a byte, the even channel's in its lower half, as (code + 15) / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headkv.cache.rows import Pools

LARGEST = {8: 127, 4: 15}  # by the bits of a code
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


def quantised_pools(pools: Pools) -> Pools:
    """Pools of float entries in 8 bits; `scales` `[slots, 2]` are those of the keys, and of the values."""
    slots, head_dim = pools.keys.shape
    codes = [torch.empty(slots, head_dim, dtype=torch.int8, device=pools.keys.device) for _ in range(2)]
    scales = pools.keys.new_empty(slots, 2)
    for side, (vectors, target) in enumerate(zip((pools.keys, pools.values), codes, strict=True)):
        for begin in range(0, slots, PART):
            part = slice(begin, begin + PART)
            target[part], scales[part, side] = quantised(vectors[part])
    keys, values = codes
    return Pools(keys, values, pools.positions, scales)


def entries(pools: Pools, slots: Tensor | slice) -> tuple[Tensor, Tensor]:
    """Keys and values at `slots`, `[m, D]` each: as they are stored, or float32 where they are in 8 bits."""
    keys, values = pools.keys[slots], pools.values[slots]
    if pools.scales is None:
        return keys, values
    scales = pools.scales[slots]
    return restored(keys, scales[:, 0]), restored(values, scales[:, 1])
