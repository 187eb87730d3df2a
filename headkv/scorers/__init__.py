"""How much does this entry matter? One file an answer; each sees the tensors of one layer only."""

from headkv.scorers.base import Scorer
from headkv.scorers.snapkv import SnapKVScorer

__all__ = ["Scorer", "SnapKVScorer"]
