"""From scores and a budget to what each row keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import TypeVar

import torch
from torch import Tensor

from headkv import _checks
from headkv.allocators import Allocator
from headkv.allocators.rounding import largest_remainder
from headkv.methods.base import Keep
from headkv.prefill import Prefill, Prompt
from headkv.scorers import Scorer
from headkv.scorers.base import PromptScorer

S = TypeVar("S")


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


def budget_entries(budget: int | float, length: int) -> int:
    """Entries that a KV head may keep of `length` tokens, the observation window included: at least 1.

    >>> budget_entries(0.2, 1000), budget_entries(300, 1000), budget_entries(0.001, 10)
    (200, 300, 1)
    """
    check_budget(budget)
    return int(budget) if isinstance(budget, Integral) else max(1, round(float(budget) * length))


def stored_share(budget: int | float, length: int) -> float:
    """Share stored of a prompt of `length` tokens under a budget.

    >>> stored_share(0.2, 1000), stored_share(300, 1000), stored_share(300, 100)
    (0.2, 0.3, 1.0)
    """
    _checks.whole("length", length, 1)
    return min(1.0, budget_entries(budget, length) / length)


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


def plan_by_scores(
    prefill: Prefill,
    scorer: Scorer,
    allocator: Allocator,
    budget: int | float,
    second_look: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Keep:
    """Keep the last `scorer.window` entries, and of the others the best: as many a row as `allocator` says.

    A budget that reaches the whole prompt keeps all; one that does not exceed the window keeps the last
    entries only.

    Args:
        prefill: of one layer.
        scorer, allocator, budget: as of `ScoredMethod`.
        second_look: from scores `[H, m]` and budgets `[H]` to other scores, by which the budgets are filled.

    Raises:
        ValueError: scores or budgets that break the contract of their protocol.
    """
    n, window = prefill.length, scorer.window
    entries = budget_entries(budget, n)
    if not scores_matter(entries, window, n):
        return by_age(prefill, entries)
    scores = scores_of(prefill, for_budget(scorer, entries))
    where = {"layer_idx": prefill.layer_idx, "num_layers": prefill.num_layers}
    budgets = allocator.allocate(scores, entries - window, **where)
    if second_look is not None:
        scores = second_look(scores, budgets)
    return best(scores, budgets, n, f"{type(allocator).__name__} in layer {prefill.layer_idx}")


def scores_matter(entries: int, window: int, n: int) -> bool:
    """Whether rows that may keep so many `entries` of `n`, the last `window` among them, have to choose."""
    return window < entries < n


def for_budget(scorer: S, entries: int) -> S:
    """A scorer that wants to know how many entries a KV head keeps, the window not counted, told so."""
    if not hasattr(scorer, "for_budget"):
        return scorer
    told: S = scorer.for_budget(entries - scorer.window)  # type: ignore[attr-defined]
    return told


def by_age(prefill: Prefill, entries: int) -> Keep:
    """The last ones of each row, so many `entries`: all of them, or what fits where the window takes everything."""
    n = prefill.length
    mask = torch.ones(prefill.num_kv_heads, n, dtype=torch.bool, device=prefill.keys.device)
    mask[:, : max(0, n - entries)] = False
    return Keep(mask)


def scores_of(prefill: Prefill, scorer: Scorer) -> Tensor:
    """Scores `[H, n - window]` of one layer, checked."""
    scores = scorer.score(prefill)
    shape = (prefill.num_kv_heads, prefill.length - scorer.window)
    check_scores(scores, shape, f"{type(scorer).__name__} in layer {prefill.layer_idx}")
    return scores


def prompt_scores(prompt: Prompt, scorer: Scorer | PromptScorer) -> Sequence[Tensor]:
    """Scores `[H, n - window]` of all layers, from a scorer of either kind."""
    if isinstance(scorer, PromptScorer):
        return scorer.score_prompt(prompt)
    return [scores_of(prompt.layer(i), scorer) for i in range(prompt.num_layers)]


def best(scores: Tensor, budgets: Tensor, n: int, source: str) -> Keep:
    """Of `n` entries the last ones, which are not scored, and the `budgets[h]` best of the others.

    Args:
        scores: `[H, m]`, checked.
        budgets: `[H]` int64.
        source: whose budgets these are, for the error.
    """
    heads, m = scores.shape
    budgets = budgets.cpu()
    check_budgets(budgets, (heads, m), source)
    if m == n:
        budgets = at_least_one(budgets, m)
    mask = torch.ones(heads, n, dtype=torch.bool, device=scores.device)
    mask[:, :m] = _best(scores, budgets)
    return Keep(mask)


def joint_budgets(scores: Sequence[Tensor], allocator: Allocator, budget: int, least: int) -> list[Tensor]:
    """Budgets `[H]` of every layer where the rows of all layers share one total, as if they were one layer's.

    Args:
        scores: `[H, m]` a layer.
        allocator: splits a layer's budget by its scores, e.g. `AdaptiveAllocator`.
        budget: entries a KV head on average.
        least: 1 where a row would be left empty otherwise, else 0.
    """
    # Layers of a model that is spread lie on several devices.
    rows = torch.cat([layer.to(scores[0].device, torch.float32) for layer in scores])
    together = allocator.allocate(rows, budget, layer_idx=0, num_layers=1).cpu()
    if least:
        together = at_least_one(together, rows.shape[1])
    return list(together.split([len(layer) for layer in scores]))
