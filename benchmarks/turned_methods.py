"""Methods that are made to be compared with a published one: wider, turned around, or with one part more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn import functional

from headkv.allocators import AdaptiveAllocator, Allocator
from headkv.methods import CriticalKV
from headkv.methods.base import Keep
from headkv.methods.selection import best, budget_entries, joint_budgets, prompt_scores
from headkv.prefill import Prefill, Prompt
from headkv.scorers.defensive import DefensiveScorer


@dataclass(frozen=True)
class Together:
    """Ada-KV where the heads of some layers in a row share a budget, as if they were one layer of more heads.

    Attributes:
        budget, scorer, allocator: as of `ScoredMethod`.
        layers: that share one; a divisor of the model's.
    """

    budget: float
    scorer: Any
    layers: int
    allocator: Allocator = AdaptiveAllocator()
    whole_prompt = True

    @property
    def observed_queries(self) -> int | None:
        return self.scorer.observed_queries  # type: ignore[no-any-return]

    def plan_prompt(self, prompt: Prompt) -> list[Keep]:
        """Keep the best entries of all layers."""
        entries = budget_entries(self.budget, prompt.length) - self.scorer.window
        scores = prompt_scores(prompt, self.scorer)
        parts = [scores[i : i + self.layers] for i in range(0, len(scores), self.layers)]
        budgets = [x for part in parts for x in joint_budgets(part, self.allocator, entries, least=0)]
        return [best(*row, prompt.length, "Together") for row in zip(scores, budgets, strict=True)]


@dataclass(frozen=True)
class LeastNorms(CriticalKV):
    """CriticalKV turned around: the second look prefers what would change the layer's output the least."""

    def second_look(self, scores: Tensor, norms: Tensor, budgets: Tensor) -> Tensor:
        return super().second_look(scores, 1 / norms.clamp(min=1e-6), budgets)


@dataclass(frozen=True)
class Pooled:
    """A scorer's scores, neighbours sharing their highest."""

    scorer: Any
    kernel_size: int = 21

    @property
    def window(self) -> int:
        return self.scorer.window  # type: ignore[no-any-return]

    @property
    def observed_queries(self) -> int | None:
        return self.scorer.observed_queries  # type: ignore[no-any-return]

    def score(self, prefill: Prefill) -> Tensor:
        scores = self.scorer.score(prefill)
        return functional.max_pool1d(scores[None], self.kernel_size, 1, self.kernel_size // 2)[0]


@dataclass(frozen=True)
class Earlier:
    """A scorer that observes with the queries before the last `skipped`, whose entries stay all the same."""

    scorer: DefensiveScorer
    skipped: int

    @property
    def window(self) -> int:
        return self.scorer.window + self.skipped

    @property
    def observed_queries(self) -> int:
        return self.window

    def for_budget(self, budget: int) -> Earlier:
        return replace(self, scorer=self.scorer.for_budget(budget))

    def score(self, prefill: Prefill) -> Tensor:
        n = prefill.length - self.skipped
        cut = {"queries": prefill.queries[:, : -self.skipped]}
        cut |= {"keys": prefill.keys[:, :n], "values": prefill.values[:, :n]}
        return self.scorer.score(replace(prefill, **cut))
