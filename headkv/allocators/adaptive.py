"""The next slot goes to the highest score of any head (Ada-KV)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headkv import _checks
from headkv.allocators.base import Allocator
from headkv.allocators.rounding import largest_remainder
from headkv.allocators.uniform import UniformAllocator


@dataclass(frozen=True)
class AdaptiveAllocator:
    """Ada-KV, arXiv 2407.11550: a layer's slots go to its highest scores, in whichever head (Algorithm 1).

    With `c_h` how many of the layer's highest scores lie in head h, and `b_h` what `base` gives it, the
    budget is `(1 - safeguard) * c_h + safeguard * b_h`, rounded by largest remainder. Published code rounds
    each head by itself, so that its totals drift; its alpha is `safeguard`, the paper's 1 - `safeguard`.
    Heads that hold equally many of equal scores at the threshold get equally many.

    Attributes:
        safeguard: in [0, 1]; 1 is `base` itself, 0 may starve a head.
        base: gives the layer its total, and the safeguard its share: uniform, or a pyramid for Ada-Pyramid.

    By hand, 3 slots a head: the highest 6 scores are .60 .25 .20 .20 .20 .15, two of head A and four of
    head B; safeguard 0.2 makes 0.8 * 2 + 0.2 * 3 = 2.2 and 0.8 * 4 + 0.2 * 3 = 3.8.

    >>> scores = torch.tensor([[.60, .20, .10, .05, .03, .02], [.25, .20, .20, .15, .10, .10]])
    >>> AdaptiveAllocator(safeguard=0.2).allocate(scores, 3, layer_idx=0, num_layers=1).tolist()
    [2, 4]
    """

    safeguard: float = 0.2
    base: Allocator = UniformAllocator()

    def __post_init__(self) -> None:
        _checks.between("safeguard", self.safeguard, 0, 1)
        _checks.has("base", self.base, "allocate")

    @property
    def needs_scores(self) -> bool:
        """Whether the budgets follow the prompt: not where `base` decides alone."""
        return self.safeguard < 1 or getattr(self.base, "needs_scores", True)

    def allocate(self, scores: Tensor, budget: int, *, layer_idx: int, num_layers: int) -> Tensor:
        """Budgets `[H]` of one layer for scores `[H, m]`: see `Allocator.allocate`."""
        base = self.base.allocate(scores, budget, layer_idx=layer_idx, num_layers=num_layers).cpu()
        total = int(base.sum())
        counts = global_top_counts(scores, total)
        # torch multiplies a number and whole numbers in float32, hence the double.
        targets = (1 - self.safeguard) * counts + self.safeguard * base.double()
        return largest_remainder(targets, total, torch.full_like(base, scores.shape[1]))


def global_top_counts(scores: Tensor, k: int) -> Tensor:
    """How many of the `k` highest of all scores `[H, m]` lie in each head, `[H]` float64 on the CPU.

    Scores equal to the k-th highest share the slots that are left in proportion, so that a count may be a
    fraction.
    """
    if k == 0:
        return torch.zeros(scores.shape[0], dtype=torch.float64, device="cpu")
    ranked = scores.float()
    # On a GPU far faster than kthvalue.
    threshold = ranked.flatten().topk(k, sorted=False).values.min()
    # Counted where the scores are (no float64 there, perhaps).
    counts = [(ranked > threshold).sum(1), (ranked == threshold).sum(1)]
    above, level = torch.stack(counts).cpu().double()
    return above + (k - above.sum()) * level / level.sum()
