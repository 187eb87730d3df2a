"""Keys that are like the average key say little (KeyDiff)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from headkv import _checks
from headkv.prefill import Prefill


@dataclass(frozen=True)
class KeyDiffScorer:
    """Minus the cosine between a key and the mean of all normalised keys of its head: KeyDiff, arXiv 2504.15364.

    No query is needed. The paper's form goes through the prompt in blocks; here the whole prompt is ranked at once.

    Attributes:
        window: last entries that are always kept and do not compete; the paper has none.

    By hand: the anchor of keys (1, 0), (1, 0), (0, 1) is (2/3, 1/3), so that the third is the most unlike it.

    >>> keys = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    >>> prefill = Prefill(keys[:, :0], keys, keys, layer_idx=0, num_layers=1, scale=1.0)
    >>> [round(x, 3) for x in KeyDiffScorer().score(prefill)[0].tolist()]
    [-0.894, -0.894, -0.447]
    """

    window: int = 0
    by_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.whole("window", self.window)

    @property
    def observed_queries(self) -> int:
        """No queries."""
        return 0

    def score(self, prefill: Prefill) -> Tensor:
        """Scores `[H, n - window]` float32, in [-1, 1]."""
        keys = functional.normalize(prefill.keys.float(), dim=-1)
        scores = -functional.cosine_similarity(keys, keys.mean(1, keepdim=True), dim=-1)
        return scores[:, : max(0, prefill.length - self.window)]
