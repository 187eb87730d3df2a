"""What a method is asked (`Prefill`), what it answers (`Keep`), how scorer and allocator compose."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from headkv import _checks
from headkv.allocators.rounding import largest_remainder

if TYPE_CHECKING:
    from headkv.allocators import Allocator
    from headkv.scorers import Scorer


@dataclass(frozen=True, eq=False)
class Prefill:
    """One layer of one prompt, padding already removed: all that a method may look at.

    Attributes:
        queries: `[HQ, w, D]`, after RoPE, of the last `w <= n` tokens; `w` is what the method asked for.
        keys: `[H, n, D]`, after RoPE.
        values: `[H, n, D]`.
        layer_idx: this layer, from 0.
        num_layers: layers of the model.
        scale: what logits are multiplied with.
        sliding_window: how many keys back a query of this layer sees, itself included; None for all.
        softcap: c where the model's logits are `c * tanh(logit / c)` (Gemma 2); None: they are as they are.

    Raises:
        ValueError: shapes that do not belong together, an empty prompt, a layer outside the model, or a window or
            cap that is not positive.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    layer_idx: int
    num_layers: int
    scale: float
    sliding_window: int | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.keys.ndim != 3 or 0 in self.keys.shape:
            raise ValueError(
                f"keys must have shape [H, n, D] with at least one token, got {list(self.keys.shape)}"
            )
        heads, n, dim = self.keys.shape
        if self.values.ndim != 3 or self.values.shape[:2] != self.keys.shape[:2]:
            raise ValueError(f"values must have shape [{heads}, {n}, D], got {list(self.values.shape)}")
        q = self.queries
        if q.ndim != 3 or q.shape[0] % heads or q.shape[0] == 0 or q.shape[1] > n or q.shape[2] != dim:
            allowed = f"[HQ, w, {dim}] with HQ a multiple of {heads} and w <= {n}"
            raise ValueError(f"queries must have shape {allowed}, got {list(q.shape)}")
        _checks.whole("num_layers", self.num_layers, 1)
        if not 0 <= self.layer_idx < self.num_layers:
            raise ValueError(f"layer_idx must lie in [0, {self.num_layers}), got {self.layer_idx}")
        if self.sliding_window is not None:
            _checks.whole("sliding_window", self.sliding_window, 1)
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be None or positive, got {self.softcap}")

    @property
    def length(self) -> int:
        """Tokens of the prompt, n."""
        return self.keys.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """KV heads, H."""
        return self.keys.shape[0]


@dataclass(frozen=True, eq=False)
class Keep:
    """What a method answers for one layer of one prompt.

    Attributes:
        mask: `[H, n]` bool, the entries to keep; at least one True a head.
        sinks: `[H]` int64, or None without windowed rows: first entries that a windowed row always sees.
        recent: `[H]` int64, or None: last entries that a windowed row sees; 0 for an ordinary row.
        compensate: `[H]` bool, or None: rows that stand one mean entry in for all that they dropped.

    Raises:
        ValueError: a head that keeps nothing, or shapes that do not belong together.
    """

    mask: Tensor
    sinks: Tensor | None = None
    recent: Tensor | None = None
    compensate: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mask.ndim != 2 or self.mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool [H, n], got {self.mask.dtype} {list(self.mask.shape)}")
        if not bool(self.mask.any(1).all()):
            empty = (~self.mask.any(1)).nonzero()[:, 0].tolist()
            raise ValueError(f"mask must keep at least one entry a head, but heads {empty} keep none")
        if (self.sinks is None) != (self.recent is None):
            raise ValueError("sinks and recent must be given together, or neither")
        for name in ("sinks", "recent", "compensate"):
            given = getattr(self, name)
            if given is not None and given.shape != self.mask.shape[:1]:
                raise ValueError(f"{name} must have shape [{self.mask.shape[0]}], got {list(given.shape)}")

    @classmethod
    def all(cls, prefill: Prefill) -> Keep:
        """Keep every entry."""
        shape = (prefill.num_kv_heads, prefill.length)
        return cls(torch.ones(shape, dtype=torch.bool, device=prefill.keys.device))


@dataclass(frozen=True, eq=False)
class Windows:
    """Which heads of a layer stream while a prompt is read, and what they see.

    Attributes:
        sinks: `[H]` int64, first entries that a streaming head sees.
        recent: `[H]` int64, last entries that it sees; 0 for a head that sees, and keeps, all.
        compensate: `[H]` bool, or None: heads that see one mean entry in place of all others.

    Raises:
        ValueError: shapes that do not belong together, or numbers below 0.
    """

    sinks: Tensor
    recent: Tensor
    compensate: Tensor | None = None

    def __post_init__(self) -> None:
        if self.recent.ndim != 1:
            raise ValueError(f"recent must have shape [H], got {list(self.recent.shape)}")
        for name in ("sinks", "compensate"):
            given = getattr(self, name)
            if given is not None and given.shape != self.recent.shape:
                raise ValueError(f"{name} must have shape {list(self.recent.shape)}, got {list(given.shape)}")
        for name in ("sinks", "recent"):
            if bool((getattr(self, name) < 0).any()):
                raise ValueError(f"{name} must be at least 0 everywhere, got {getattr(self, name).tolist()}")


class Method(Protocol):
    """Which entries each row keeps of a prompt."""

    @property
    def observed_queries(self) -> int | None:
        """How many of the last queries `plan` needs; None for all of them, 0 for none."""

    def plan(self, prefill: Prefill) -> Keep:
        """Decide one layer of one prompt."""


class StreamingMethod(Method, Protocol):
    """A method that may also ask, ahead of a prompt, that heads stream while it is read. No method has to."""

    def prefill_windows(
        self, *, layer_idx: int, num_layers: int, num_kv_heads: int, length: int | None
    ) -> Windows | None:
        """The windows of one layer, those that `plan` answers too; None: every head sees the whole prompt.

        Args:
            layer_idx, num_layers, num_kv_heads: the layer.
            length: tokens of the prompt; None when it comes in chunks, so that nobody knows. The windows then are all
                that is decided: `plan` is not asked, and heads that do not stream keep all.

        Raises:
            ValueError: the windows depend on a length that is not known.
        """


def check_budget(budget: int | float) -> None:
    """A budget: entries a KV head on average (int), or a share of the prompt (float).

    Raises:
        TypeError: neither int nor float (a bool is neither).
        ValueError: an int below 1, or a float outside (0, 1].
    """
    allowed = f"budget must be a positive int or a share in (0, 1], got {budget!r}"
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise TypeError(allowed)
    if budget < 1 if isinstance(budget, Integral) else not 0 < budget <= 1:
        raise ValueError(allowed)


def budget_capacity(budget: int | float, length: int) -> int:
    """Entries that a KV head may keep of `length` tokens, the observation window included: at least 1.

    >>> budget_capacity(0.2, 1000), budget_capacity(300, 1000), budget_capacity(0.001, 10)
    (200, 300, 1)
    """
    check_budget(budget)
    return int(budget) if isinstance(budget, Integral) else max(1, round(float(budget) * length))


def check_scores(scores: Tensor, shape: tuple[int, int], source: str) -> None:
    """Scores `[H, m]`, floating and finite; `source` says whose they are."""
    if tuple(scores.shape) != shape:
        raise ValueError(f"scores of {source} must have shape {list(shape)}, got {list(scores.shape)}")
    if not scores.dtype.is_floating_point:
        raise TypeError(f"scores of {source} must be floating, got {scores.dtype}")
    if not bool(torch.isfinite(scores).all()):
        bad = int((~torch.isfinite(scores)).sum())
        raise ValueError(
            f"scores of {source} must be finite, but {bad} of {scores.numel()} are NaN or infinite"
        )


def check_budgets(budgets: Tensor, shape: tuple[int, int], source: str) -> None:
    """Budgets `[H]` int64 in `[0, m]` for scores of `shape` `[H, m]`; `source` says whose they are."""
    if budgets.dtype != torch.int64 or tuple(budgets.shape) != shape[:1]:
        got = f"{budgets.dtype} {list(budgets.shape)}"
        raise ValueError(f"budgets of {source} must be int64 [{shape[0]}], got {got}")
    if bool(((budgets < 0) | (budgets > shape[1])).any()):
        raise ValueError(f"budgets of {source} must lie in [0, {shape[1]}], got {budgets.tolist()}")


def select(scores: Tensor, budgets: Tensor, *, source: str = "select") -> Tensor:
    """The `budgets[h]` highest scores of each head; of equal scores the earlier position wins.

    Args:
        scores: `[H, m]` floating, finite; ranked in float32.
        budgets: `[H]` int64, each in `[0, m]`.
        source: whose scores these are, for the error.

    Returns:
        `[H, m]` bool with exactly `budgets[h]` True in row h.

    Raises:
        ValueError: scores that are not finite, or a budget outside `[0, m]`.

    >>> select(torch.tensor([[0.5, 0.9, 0.5]]), torch.tensor([2])).tolist()
    [[True, True, False]]
    """
    shape = (scores.shape[0], scores.shape[-1])
    check_scores(scores, shape, source)
    check_budgets(budgets, shape, source)
    return _best(scores, budgets)


def _best(scores: Tensor, budgets: Tensor) -> Tensor:
    """`select` without its checks, each of which would wait for the device once more."""
    order = torch.sort(scores.float(), dim=1, descending=True, stable=True).indices
    budgets = budgets.to(scores.device, non_blocking=True)
    chosen = torch.arange(scores.shape[1], device=scores.device) < budgets[:, None]
    return torch.zeros_like(chosen).scatter(1, order, chosen)


def at_least_one(budgets: Tensor, most: int) -> Tensor:
    """Budgets `[H]` with no row at 0: larger rows give, so that the total stays where it reaches H."""
    if not bool((budgets == 0).any()):
        return budgets
    total = max(int(budgets.sum()), len(budgets)) - len(budgets)
    spare = (budgets.cpu().clamp(min=1) - 1).double()
    target = spare * total / spare.sum() if total else spare * 0
    more = largest_remainder(target, total, torch.full_like(spare, most - 1, dtype=torch.int64))
    return 1 + more.to(budgets.device)


def plan_by_scores(prefill: Prefill, scorer: Scorer, allocator: Allocator, budget: int | float) -> Keep:
    """Keep the last `scorer.window` entries, and of the others the best: as many a row as `allocator` says.

    A budget that reaches the whole prompt keeps all; one that does not exceed the window keeps the last
    entries only.

    Raises:
        ValueError: scores or budgets that break the contract of their protocol.
    """
    n, heads, device = prefill.length, prefill.num_kv_heads, prefill.keys.device
    capacity = budget_capacity(budget, n)
    if capacity >= n:
        return Keep.all(prefill)
    window = min(scorer.window, capacity)
    mask = torch.ones(heads, n, dtype=torch.bool, device=device)
    if window == capacity:
        mask[:, : n - window] = False
        return Keep(mask)
    shape = (heads, n - window)
    scores = scorer.score(prefill)
    check_scores(scores, shape, f"{type(scorer).__name__} in layer {prefill.layer_idx}")
    budgets = allocator.allocate(
        scores, capacity - window, layer_idx=prefill.layer_idx, num_layers=prefill.num_layers
    ).cpu()
    check_budgets(budgets, shape, f"{type(allocator).__name__} in layer {prefill.layer_idx}")
    if window == 0:
        budgets = at_least_one(budgets, shape[1])
    mask[:, : n - window] = _best(scores, budgets)
    return Keep(mask)
