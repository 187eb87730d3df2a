"""How much does this entry matter? One file an answer; each sees the tensors of one layer only."""

from headkv.scorers.base import PromptScorer, Scorer
from headkv.scorers.key_norm import KeyNormScorer
from headkv.scorers.kvzip import KVzipScorer
from headkv.scorers.observed import ObservedAttentionScorer
from headkv.scorers.random import RandomScorer
from headkv.scorers.snapkv import SnapKVScorer
from headkv.scorers.streaming import StreamingScorer

__all__ = [
    "KeyNormScorer",
    "KVzipScorer",
    "ObservedAttentionScorer",
    "PromptScorer",
    "RandomScorer",
    "Scorer",
    "SnapKVScorer",
    "StreamingScorer",
]
