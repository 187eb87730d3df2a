"""What a scorer is: how much each entry of each row matters."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from headkv.prefill import Prefill, Prompt


class Scorer(Protocol):
    """Ranks the entries of each row; also says which last entries are kept without competing.

    One that ranks each head by itself may say so by `by_head = True`: where ranks share a model's heads (tensor
    parallelism), each then scores its own; others are given those of all ranks.
    """

    @property
    def window(self) -> int:
        """The last `window` entries are always kept and are not scored."""

    @property
    def observed_queries(self) -> int | None:
        """How many of the last queries `score` needs: 0 for none, `headkv.prefill.ALL` (None) for all of them."""

    def score(self, prefill: Prefill) -> Tensor:
        """Scores `[H, n - window]` float32, finite; higher is kept first."""


@runtime_checkable
class PromptScorer(Protocol):
    """A scorer that looks at all layers of a prompt at once, or reads its text again; `by_head` as in `Scorer`."""

    @property
    def window(self) -> int:
        """As in `Scorer`."""

    @property
    def observed_queries(self) -> int | None:
        """As in `Scorer`."""

    def score_prompt(self, prompt: Prompt) -> list[Tensor]:
        """Scores `[H, n - window]` float32, finite, of every layer; higher is kept first."""
