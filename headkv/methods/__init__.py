"""Methods: a scorer, an allocator and, for some, a head profile, composed. One file a paper."""

from headkv.methods.ada_kv import AdaKV
from headkv.methods.base import Keep, Method, PromptMethod, StreamingMethod, Windows
from headkv.methods.critical_kv import CriticalKV
from headkv.methods.defensive_kv import DefensiveKV
from headkv.methods.duo_attention import DuoAttention
from headkv.methods.explanation import Explained, Explanation
from headkv.methods.full_cache import FullCache
from headkv.methods.head_kv import HeadKV
from headkv.methods.kvzip import KVzip
from headkv.methods.pyramid_kv import PyramidKV
from headkv.methods.random_heads import RandomHeads
from headkv.methods.razor_attention import RazorAttention
from headkv.methods.scored import ScoredMethod
from headkv.methods.selection import budget_entries, plan_by_scores, select
from headkv.methods.snap_kv import SnapKV
from headkv.methods.streaming_llm import StreamingLLM
from headkv.prefill import Prefill, Prompt

__all__ = [
    "AdaKV",
    "CriticalKV",
    "DefensiveKV",
    "DuoAttention",
    "Explained",
    "Explanation",
    "FullCache",
    "HeadKV",
    "KVzip",
    "Keep",
    "Method",
    "Prefill",
    "Prompt",
    "PromptMethod",
    "PyramidKV",
    "RandomHeads",
    "RazorAttention",
    "ScoredMethod",
    "SnapKV",
    "StreamingLLM",
    "StreamingMethod",
    "Windows",
    "budget_entries",
    "plan_by_scores",
    "select",
]
