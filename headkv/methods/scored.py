"""A scorer and an allocator, composed: what most methods are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from headkv import _checks
from headkv.allocators import Allocator, UniformAllocator
from headkv.methods.base import Keep
from headkv.methods.explanation import Explained
from headkv.methods.selection import (
    at_least_one,
    best,
    budget_entries,
    by_age,
    check_budget,
    for_budget,
    joint_budgets,
    plan_by_scores,
    prompt_scores,
    scores_matter,
    stored_share,
)
from headkv.prefill import Prefill, Prompt
from headkv.scorers import Scorer, SnapKVScorer
from headkv.scorers.base import PromptScorer

SCOPES = ("layer", "model")
Self = TypeVar("Self", bound="Scored")


@dataclass(frozen=True)
class ScoredMethod(Explained):
    """Each row keeps its best entries, by any scorer, as many as any allocator gives it.

    The methods of the papers are made of it: `SnapKV(0.2)` is
    `ScoredMethod(0.2, SnapKVScorer(), UniformAllocator())`.

    Attributes:
        budget: entries a KV head on average (int), or the share of the prompt (float in (0, 1]); the scorer's window
            is included.
        scorer: which entries are the best.
        allocator: splits the budget.
        scope: who shares a budget. "layer": each layer is decided by itself, while it is prefilled. "model": all rows
            of all layers compete; decided once the prompt is read, see `PromptMethod` for what that takes.
    """

    budget: int | float
    scorer: Scorer | PromptScorer = SnapKVScorer()
    allocator: Allocator = UniformAllocator()
    scope: str = "layer"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        _checks.has("scorer", self.scorer, "window", "observed_queries")
        if not hasattr(self.scorer, "score_prompt"):
            _checks.has("scorer", self.scorer, "score")
        _checks.has("allocator", self.allocator, "allocate")
        _checks.one_of("scope", self.scope, SCOPES)

    @classmethod
    def for_share(cls, share: float, length: int, *args: Any, **options: Any) -> ScoredMethod:
        """The method with which `share` of a prompt of `length` tokens is stored; other arguments as in the class."""
        _checks.whole("length", length, 1)
        return cls(share, *args, **options)

    @property
    def observed_queries(self) -> int | None:
        """What the scorer needs."""
        return self.scorer.observed_queries

    @property
    def observes_hidden(self) -> bool:
        """Whether the scorer wants to see what the attention was given, see `Prefill.hidden`."""
        return bool(getattr(self.scorer, "observes_hidden", False))

    @property
    def whole_prompt(self) -> bool:
        """Whether the method decides once the whole prompt is read: for its scope, or because its scorer does."""
        return self.scope == "model" or hasattr(self.scorer, "score_prompt")

    def plan(self, prefill: Prefill) -> Keep:
        """Keep the best entries of one layer."""
        return plan_by_scores(prefill, self.scorer, self.allocator, self.budget)  # type: ignore[arg-type]

    def plan_prompt(self, prompt: Prompt) -> list[Keep]:
        """Keep the best entries of all layers."""
        n, window, layers = prompt.length, self.scorer.window, range(prompt.num_layers)
        entries = budget_entries(self.budget, n)
        if not scores_matter(entries, window, n):
            return [by_age(prompt.layer(i), entries) for i in layers]
        scores = prompt_scores(prompt, for_budget(self.scorer, entries))
        budgets = self._budgets(scores, entries - window)
        source = type(self.allocator).__name__
        return [best(scores[i], budgets[i], n, f"{source} in layer {i}") for i in layers]

    def _budgets(self, scores: Sequence[Tensor], budget: int) -> list[Tensor]:
        if self.scope == "model":
            return joint_budgets(scores, self.allocator, budget, least=int(self.scorer.window == 0))
        allocate, num_layers = self.allocator.allocate, len(scores)
        return [allocate(x, budget, layer_idx=i, num_layers=num_layers) for i, x in enumerate(scores)]

    def budgets_ahead(self, layers: Sequence[Prefill]) -> list[Tensor] | None:
        """The allocator's budgets with the window; None where the allocator needs scores. See `Explained`."""
        n, window, m = layers[0].length, self.scorer.window, layers[0].length - self.scorer.window
        entries = budget_entries(self.budget, n)
        if not scores_matter(entries, window, n):
            kept = [torch.full((x.num_kv_heads,), min(entries, n)) for x in layers]
        elif getattr(self.allocator, "needs_scores", True):
            return None
        else:
            blank = [torch.zeros(1).expand(x.num_kv_heads, m) for x in layers]
            split = [budgets.cpu() for budgets in self._budgets(blank, entries - window)]
            kept = [x + window if window else at_least_one(x, n) for x in split]
        return [
            x if layer.sliding_window is None else x.clamp(max=max(1, layer.sliding_window - 1))
            for x, layer in zip(kept, layers, strict=True)
        ]

    def stored_share(self, length: int) -> float:
        """Share stored of a prompt of `length` tokens."""
        return stored_share(self.budget, length)


class Scored(Explained):
    """What a `ScoredMethod` does, under the name and with the parameters of a paper: a subclass says which it is."""

    budget: int | float

    @cached_property
    def composed(self) -> ScoredMethod:
        """The scorer and the allocator that this method is made of."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        _ = self.composed  # checks all parameters

    @classmethod
    def for_share(cls: type[Self], share: float, length: int, *args: Any, **options: Any) -> Self:
        """The method with which `share` of a prompt of `length` tokens is stored; other arguments as in the class."""
        _checks.whole("length", length, 1)
        return cls(share, *args, **options)  # type: ignore[call-arg]

    @property
    def observed_queries(self) -> int | None:
        """What the scorer needs."""
        return self.composed.observed_queries

    @property
    def observes_hidden(self) -> bool:
        """Whether the scorer wants to see what the attention was given."""
        return self.composed.observes_hidden

    @property
    def whole_prompt(self) -> bool:
        """Whether the method decides once the whole prompt is read."""
        return self.composed.whole_prompt

    def plan(self, prefill: Prefill) -> Keep:
        """Keep the best entries of one layer."""
        return self.composed.plan(prefill)

    def plan_prompt(self, prompt: Prompt) -> Sequence[Keep]:
        """Keep the best entries of all layers."""
        return self.composed.plan_prompt(prompt)

    def budgets_ahead(self, layers: Sequence[Prefill]) -> list[Tensor] | None:
        """As many entries as the allocator says, where it needs no scores."""
        return self.composed.budgets_ahead(layers)

    def stored_share(self, length: int) -> float:
        """Share stored of a prompt of `length` tokens."""
        return self.composed.stored_share(length)
