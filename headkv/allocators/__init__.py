"""How many entries may this row keep? One file an answer; each sees scores and a budget only."""

from headkv.allocators.adaptive import AdaptiveAllocator
from headkv.allocators.base import Allocator
from headkv.allocators.fixed import FixedAllocator
from headkv.allocators.profile import ProfileAllocator
from headkv.allocators.pyramid import PyramidAllocator
from headkv.allocators.rounding import largest_remainder, water_fill
from headkv.allocators.uniform import UniformAllocator

__all__ = [
    "AdaptiveAllocator",
    "Allocator",
    "FixedAllocator",
    "ProfileAllocator",
    "PyramidAllocator",
    "UniformAllocator",
    "largest_remainder",
    "water_fill",
]
