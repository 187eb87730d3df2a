"""headkv: every attention head keeps only the KV entries that it needs, and the cache really stores only those.

`import headkv` needs torch alone; what needs transformers, anywidget or a compiled backend is loaded when first used.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headkv._version import find_version

if TYPE_CHECKING:
    from headkv import widgets as widgets
    from headkv.attention import ragged_decode as ragged_decode
    from headkv.attention import ragged_extend as ragged_extend
    from headkv.attention import ragged_step as ragged_step
    from headkv.cache import RaggedLayer as RaggedLayer
    from headkv.heads import HeadProfile as HeadProfile
    from headkv.heads import HeadStorage as HeadStorage
    from headkv.integrations.cache import RaggedCache as RaggedCache
    from headkv.integrations.graph import DecodeGraph as DecodeGraph
    from headkv.integrations.pipeline import pipeline as pipeline
    from headkv.integrations.scoring import score as score
    from headkv.integrations.session import compress as compress
    from headkv.methods import AdaKV as AdaKV
    from headkv.methods import CriticalKV as CriticalKV
    from headkv.methods import DefensiveKV as DefensiveKV
    from headkv.methods import DuoAttention as DuoAttention
    from headkv.methods import FullCache as FullCache
    from headkv.methods import HeadKV as HeadKV
    from headkv.methods import KVzip as KVzip
    from headkv.methods import PyramidKV as PyramidKV
    from headkv.methods import RandomHeads as RandomHeads
    from headkv.methods import RazorAttention as RazorAttention
    from headkv.methods import ScoredMethod as ScoredMethod
    from headkv.methods import SnapKV as SnapKV
    from headkv.methods import StreamingLLM as StreamingLLM
    from headkv.models import load_smollm2 as load_smollm2
    from headkv.scorers import SnapKVScorer as SnapKVScorer

_HOME = {
    **dict.fromkeys(("ragged_decode", "ragged_extend", "ragged_step"), "headkv.attention"),
    "RaggedLayer": "headkv.cache",
    **dict.fromkeys(("HeadProfile", "HeadStorage"), "headkv.heads"),
    "RaggedCache": "headkv.integrations.cache",
    "pipeline": "headkv.integrations.pipeline",
    "compress": "headkv.integrations.session",
    "score": "headkv.integrations.scoring",
    "DecodeGraph": "headkv.integrations.graph",
    **dict.fromkeys(
        ("AdaKV", "CriticalKV", "DefensiveKV", "DuoAttention", "FullCache", "HeadKV", "KVzip", "PyramidKV"),
        "headkv.methods",
    ),
    **dict.fromkeys(
        ("RandomHeads", "RazorAttention", "ScoredMethod", "SnapKV", "StreamingLLM"), "headkv.methods"
    ),
    "load_smollm2": "headkv.models",
    "SnapKVScorer": "headkv.scorers",
}
__version__ = find_version(Path(__file__).parent)
__all__ = sorted([*_HOME, "__version__", "widgets"])


def __getattr__(name: str) -> Any:
    if name == "widgets":
        return importlib.import_module("headkv.widgets")
    if name not in _HOME:
        raise AttributeError(f"module 'headkv' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
