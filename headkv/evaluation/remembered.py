"""Scorers that look once, however many methods and budgets ask: for many methods over one reading of a text."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from torch import Tensor

from headkv.prefill import Prefill, Prompt
from headkv.scorers import PromptScorer, Scorer


@dataclass(frozen=True, eq=False)
class Remembered:
    """A scorer of whole prompts that reads each prompt once.

    Args:
        scorer: the scorer.
    """

    scorer: PromptScorer
    _known: weakref.WeakKeyDictionary[Prompt, list[Tensor]] = field(
        default_factory=weakref.WeakKeyDictionary, repr=False
    )

    @property
    def window(self) -> int:
        """The scorer's window."""
        return self.scorer.window

    @property
    def observed_queries(self) -> int | None:
        """What the scorer needs."""
        return self.scorer.observed_queries

    def score_prompt(self, prompt: Prompt) -> list[Tensor]:
        """The scorer's scores, as long as the prompt is there without asking again."""
        if prompt not in self._known:
            self._known[prompt] = self.scorer.score_prompt(prompt)
        return self._known[prompt]


@dataclass(frozen=True, eq=False, repr=False)
class RememberedLayers:
    """A scorer of one layer that looks at each `Prefill` once. Shown, it is that scorer.

    Args:
        scorer: one whose scores do not depend on the budget: without `for_budget`.
    """

    scorer: Scorer
    _known: weakref.WeakKeyDictionary[Prefill, Tensor] = field(default_factory=weakref.WeakKeyDictionary)

    def __repr__(self) -> str:
        return repr(self.scorer)

    @property
    def stands_for(self) -> Scorer:
        """What it is shown as."""
        return self.scorer

    @property
    def window(self) -> int:
        """The scorer's window."""
        return self.scorer.window

    @property
    def observed_queries(self) -> int | None:
        """What the scorer needs."""
        return self.scorer.observed_queries

    def score(self, prefill: Prefill) -> Tensor:
        """The scorer's scores `[H, n - window]`, as long as `prefill` is there without asking again."""
        if prefill not in self._known:
            self._known[prefill] = self.scorer.score(prefill)
        return self._known[prefill]
