"""What kind of head is this: profiles (files of scores) and the profilers that measure them on a model."""

from __future__ import annotations

from headkv.heads.profile import KINDS, HeadProfile
from headkv.heads.ranks import RankLoads, balanced_order
from headkv.heads.readers import read_duo_attention, read_headkv

__all__ = ["KINDS", "HeadProfile", "RankLoads", "balanced_order", "read_duo_attention", "read_headkv"]
