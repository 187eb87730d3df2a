"""What kind of head is this: profiles (files of scores), the profilers that measure them, and what heads then get."""

from __future__ import annotations

from headkv.heads.profile import KINDS, HeadProfile
from headkv.heads.ranks import RankLoads, balanced_order
from headkv.heads.readers import read_duo_attention, read_headkv
from headkv.heads.storage import HeadStorage

__all__ = [
    "KINDS",
    "HeadProfile",
    "HeadStorage",
    "RankLoads",
    "balanced_order",
    "read_duo_attention",
    "read_headkv",
]
