"""How much does this entry matter? One file an answer; each sees the tensors of one layer only."""

from headkv.scorers.base import PromptScorer, Scorer
from headkv.scorers.defensive import DefensiveScorer
from headkv.scorers.expected import ExpectedAttentionScorer
from headkv.scorers.key_diff import KeyDiffScorer
from headkv.scorers.key_norm import KeyNormScorer
from headkv.scorers.kvzip import KVzipScorer
from headkv.scorers.observed import ObservedAttentionScorer
from headkv.scorers.random import RandomScorer
from headkv.scorers.snapkv import SnapKVScorer
from headkv.scorers.streaming import StreamingScorer

__all__ = [
    "DefensiveScorer",
    "ExpectedAttentionScorer",
    "KeyDiffScorer",
    "KeyNormScorer",
    "KVzipScorer",
    "ObservedAttentionScorer",
    "PromptScorer",
    "RandomScorer",
    "Scorer",
    "SnapKVScorer",
    "StreamingScorer",
]
