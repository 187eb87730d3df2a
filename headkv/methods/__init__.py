"""Methods: a scorer, an allocator and, for some, a head profile, composed. One file a paper."""

from headkv.methods.ada_kv import AdaKV
from headkv.methods.base import Keep, Method, Prefill, budget_capacity, plan_by_scores, select
from headkv.methods.full_cache import FullCache
from headkv.methods.pyramid_kv import PyramidKV
from headkv.methods.snap_kv import SnapKV

__all__ = [
    "AdaKV",
    "FullCache",
    "Keep",
    "Method",
    "Prefill",
    "PyramidKV",
    "SnapKV",
    "budget_capacity",
    "plan_by_scores",
    "select",
]
