"""Ada-KV: heads whose attention is spread keep more, heads whose attention is narrow keep less."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from headkv.allocators import AdaptiveAllocator, PyramidAllocator, UniformAllocator
from headkv.methods.scored import Scored, ScoredMethod
from headkv.scorers import Scorer, SnapKVScorer


@dataclass(frozen=True)
class AdaKV(Scored):
    """Ada-KV, arXiv 2407.11550: a layer's slots go to the highest scores of any head, above a safeguard.

    Attributes:
        budget: entries a KV head on average (int), or the share of the prompt (float in (0, 1]); the window
            is included.
        scorer: scores that are comparable across the heads of a layer, as attention weights are.
        safeguard: share of an equal budget that every head keeps, in [0, 1]; 1 is `SnapKV`.
        pyramid: layers get `PyramidKV`'s budgets (Ada-Pyramid) in place of equal ones (Ada-SnapKV).
        beta: the pyramid's steepness, at least 1.
        scope: "layer", as in the paper, or "model": the slots of all layers go to the highest scores of any head of
            any layer. That is decided once the prompt is read, so that the whole cache is stored until then.
    """

    budget: int | float
    scorer: Scorer = SnapKVScorer()
    safeguard: float = 0.2
    pyramid: bool = False
    beta: float = 20
    scope: str = "layer"

    def __post_init__(self) -> None:
        PyramidAllocator(self.beta)
        if self.pyramid and self.scope == "model":
            raise ValueError("pyramid must be False with scope='model', where layers compete, got True")
        super().__post_init__()

    def allocator(self) -> AdaptiveAllocator:
        """What splits the budget."""
        base = PyramidAllocator(self.beta) if self.pyramid else UniformAllocator()
        return AdaptiveAllocator(self.safeguard, base)

    @cached_property
    def composed(self) -> ScoredMethod:
        """The scorer, and as many entries a head as its scores say."""
        return ScoredMethod(self.budget, self.scorer, self.allocator(), self.scope)
