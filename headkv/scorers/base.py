"""What a scorer is: how much each entry of each row matters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from headkv.methods.base import Prefill


class Scorer(Protocol):
    """Ranks the entries of each row; also says which last entries are kept without competing."""

    @property
    def window(self) -> int:
        """The last `window` entries are always kept and are not scored."""

    @property
    def observed_queries(self) -> int | None:
        """How many of the last queries `score` needs; None for all of them, 0 for none."""

    def score(self, prefill: Prefill) -> Tensor:
        """Scores `[H, n - window]` float32, finite; higher is kept first."""
