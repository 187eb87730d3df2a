"""Attention over a ragged layer: one specification, several equal backends."""

from headkv.attention.api import ragged_decode, ragged_extend, ragged_step

__all__ = ["ragged_decode", "ragged_extend", "ragged_step"]
