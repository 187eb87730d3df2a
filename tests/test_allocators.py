"""Allocators: the docstrings' examples by hand, exact totals, and what they refuse."""

from __future__ import annotations

import doctest
import importlib
import itertools
import pkgutil
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefills import profile
from torch import Tensor

import headkv.allocators
import headkv.methods
import headkv.scorers
from headkv.allocators import (
    AdaptiveAllocator,
    FixedAllocator,
    ProfileAllocator,
    PyramidAllocator,
    UniformAllocator,
    largest_remainder,
    water_fill,
)

PATIENT = settings(deadline=None)  # time says nothing where other work shares the machine
MODULES = [
    f"{package.__name__}.{module.name}"
    for package in (headkv.allocators, headkv.methods, headkv.scorers)
    for module in pkgutil.iter_modules(package.__path__)
]
EXAMPLES = {"adaptive", "fixed", "profile", "pyramid", "rounding", "uniform", "windows"}


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch})
    assert failed == 0
    assert tried > 0 or name.split(".")[-1] not in EXAMPLES


def allocate(allocator: Any, scores: Tensor, budget: int, layer_idx: int = 0, num_layers: int = 1) -> Tensor:
    """The budgets, checked against the protocol."""
    found = allocator.allocate(scores, budget, layer_idx=layer_idx, num_layers=num_layers)
    assert found.dtype == torch.int64 and found.shape == scores.shape[:1]
    assert bool(((found >= 0) & (found <= scores.shape[1])).all())
    return found


@st.composite
def scores_and_budget(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Scores `[H, m]` with many ties, and a budget from 0 to beyond m."""
    heads, m = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    values = draw(st.lists(st.integers(0, 6), min_size=heads * m, max_size=heads * m))
    return torch.tensor(values, dtype=torch.float32).view(heads, m) / 7, draw(st.integers(0, m + 3))


def test_ada_kv_by_hand_keeps_more_mass() -> None:
    scores = torch.tensor([[0.60, 0.20, 0.10, 0.05, 0.03, 0.02], [0.25, 0.20, 0.20, 0.15, 0.10, 0.10]])
    mass = {}
    for name, allocator in (("uniform", UniformAllocator()), ("adaptive", AdaptiveAllocator(safeguard=0))):
        budgets = allocate(allocator, scores, 3)
        mass[name] = sum(float(row[:b].sum()) for row, b in zip(scores, budgets.tolist(), strict=True))
    assert mass == pytest.approx({"uniform": 0.90 + 0.65, "adaptive": 0.80 + 0.80})


@PATIENT
@given(scores_and_budget(), st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_adaptive_totals_are_exact_and_safeguarded(case: tuple[Tensor, int], safeguard: float) -> None:
    scores, budget = case
    average = min(budget, scores.shape[1])
    found = allocate(AdaptiveAllocator(safeguard), scores, budget)
    assert int(found.sum()) == len(scores) * average
    assert int(found.min()) >= int(safeguard * average + 1e-9)


@PATIENT
@given(scores_and_budget())
def test_adaptive_takes_the_highest_scores_of_any_head(case: tuple[Tensor, int]) -> None:
    """Without a safeguard, no choice of as many entries has a larger sum."""
    scores, budget = case
    found = allocate(AdaptiveAllocator(0), scores, budget)
    ranked = scores.double().sort(1, descending=True).values
    kept = sum(float(row[:b].sum()) for row, b in zip(ranked, found.tolist(), strict=True))
    best = float(scores.double().flatten().sort(descending=True).values[: int(found.sum())].sum())
    assert kept == pytest.approx(best)


@PATIENT
@given(scores_and_budget(), st.randoms(use_true_random=False))
def test_permuting_heads_permutes_budgets(case: tuple[Tensor, int], random: Any) -> None:
    """Exactly, where no two heads are equal; of equal remainders the first head gets the odd entry."""
    scores, budget = case
    scores = scores + torch.linspace(0, 0.01, scores.numel()).view_as(scores)  # no ties
    order = list(range(len(scores)))
    random.shuffle(order)
    for allocator in (UniformAllocator(), AdaptiveAllocator(0), AdaptiveAllocator(1)):
        plain = allocate(allocator, scores, budget)
        assert allocate(allocator, scores[order], budget).tolist() == plain[order].tolist()


@PATIENT
@given(scores_and_budget())
def test_full_safeguard_is_the_base(case: tuple[Tensor, int]) -> None:
    scores, budget = case
    for base in (UniformAllocator(), PyramidAllocator(3)):
        for layer in range(3):
            want = allocate(base, scores, budget, layer, 3)
            assert torch.equal(allocate(AdaptiveAllocator(1, base), scores, budget, layer, 3), want)


@PATIENT
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 40), st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_equal_scores_are_uniform(heads: int, m: int, budget: int, safeguard: float) -> None:
    found = allocate(AdaptiveAllocator(safeguard), torch.full((heads, m), 0.3), budget)
    assert found.tolist() == [min(budget, m)] * heads


def test_ties_at_the_threshold_are_shared() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.0]])
    # Four slots: one for .9, and three for six equal scores, three of them in each head: 1 + 1.5 and 1.5.
    assert allocate(AdaptiveAllocator(0), scores, 2).tolist() == [3, 1]
    assert headkv.allocators.adaptive.global_top_counts(scores, 4).tolist() == [2.5, 1.5]


def exact_ada_kv(scores: Tensor, average: int, safeguard: str) -> list[int]:
    """Ada-KV's budgets in rational numbers: counts, ties in proportion, safeguard, largest remainder, first wins."""
    rows, total = scores.tolist(), len(scores) * average
    least = sorted((x for row in rows for x in row), reverse=True)[total - 1]
    above = [sum(x > least for x in row) for row in rows]
    level = [sum(x == least for x in row) for row in rows]
    share = Fraction(safeguard)
    rest = total - sum(above)
    counts = [a + Fraction(rest * at, sum(level)) for a, at in zip(above, level, strict=True)]
    targets = [(1 - share) * count + share * average for count in counts]
    found = [int(target) for target in targets]
    order = sorted(range(len(rows)), key=lambda row: (found[row] - targets[row], row))
    for row in order[: total - sum(found)]:
        found[row] += 1
    return found


@PATIENT
@given(st.data())
def test_adaptive_is_exact(data: st.DataObject) -> None:
    """No rounding decides who gets the odd entry: heads that are equal in rational numbers are equal here."""
    heads, m = data.draw(st.integers(1, 8)), data.draw(st.integers(2, 60))
    seed, levels = data.draw(st.integers(0, 10**6)), data.draw(st.sampled_from([3, 10**6]))
    safeguard = data.draw(st.sampled_from(["0.05", "0.1", "0.2", "0.35", "0.7"]))
    generator = torch.Generator().manual_seed(seed)
    skew = torch.rand(heads, 1, generator=generator)
    scores = (torch.rand(heads, m, generator=generator) * skew * levels).round()
    average = data.draw(st.integers(1, m))
    found = allocate(AdaptiveAllocator(float(safeguard)), scores, average)
    assert found.tolist() == exact_ada_kv(scores, average, safeguard)


@pytest.mark.parametrize("safeguard", ["0.2", "0.35"])
@pytest.mark.parametrize("average", [3, 5, 6])
def test_the_odd_entry_goes_to_the_first_of_equals(average: int, safeguard: str) -> None:
    """All ways in which three heads win the slots: 1, 2 and 6 of nine make 1.4, 2.2 and 5.4 with a fifth of 3 each."""
    total, wrong = 3 * average, []
    for one, two in itertools.product(range(total + 1), repeat=2):
        if one + two <= total:
            wins = torch.tensor([one, two, total - one - two])
            scores = (torch.arange(total) < wins[:, None]).float()
            found = allocate(AdaptiveAllocator(float(safeguard)), scores, average).tolist()
            if found != exact_ada_kv(scores, average, safeguard):
                wrong.append((wins.tolist(), found))
    assert not wrong


@pytest.mark.parametrize("beta", [1, 2, 4.5, 20, float("inf")], ids=lambda b: f"beta={b}")
@pytest.mark.parametrize(
    "budget, m, num_layers",
    [(10, 100, 4), (7, 9, 5), (9, 9, 3), (50, 9, 3), (1, 9, 30), (0, 9, 2), (5, 9, 1)],
)
def test_pyramid_totals(budget: int, m: int, num_layers: int, beta: float) -> None:
    layers = [
        int(allocate(PyramidAllocator(beta), torch.zeros(2, m), budget, i, num_layers)[0])
        for i in range(num_layers)
    ]
    assert sum(layers) == num_layers * min(budget, m)
    assert layers == sorted(layers, reverse=True)


def test_pyramid_in_a_short_prompt_by_hand() -> None:
    # Average 6, beta 20: 0 .. 12 does not fit in 8 entries, so 8 .. 4.
    assert PyramidAllocator().layers(6, 8, 3).tolist() == [8, 6, 4]


def test_ada_pyramid_takes_its_layers_from_the_pyramid() -> None:
    scores = torch.rand(2, 30, generator=torch.Generator().manual_seed(0))
    totals = [
        int(allocate(AdaptiveAllocator(0.2, PyramidAllocator(4)), scores, 8, i, 3).sum()) for i in range(3)
    ]
    assert totals == [28, 16, 4]


@PATIENT
@given(
    st.lists(st.floats(0, 1, width=32), min_size=6, max_size=6).filter(any),
    st.integers(0, 30),
    st.integers(1, 25),
    st.sampled_from([1, 1.005, 1.5, 2, 10, float("inf")]),
    st.sampled_from([0, 0.5, 1, 3]),
)
def test_profile_totals_are_exact(
    values: list[float], budget: int, m: int, beta: float, temperature: float
) -> None:
    allocator = ProfileAllocator(torch.tensor(values).view(2, 3), beta, temperature)
    found = torch.stack([allocate(allocator, torch.zeros(3, m), budget, i, 2) for i in range(2)])
    average = min(budget, m)
    assert int(found.sum()) == 6 * average
    assert int(found.min()) >= average - average // beta
    if temperature:  # who scores more never gets less, but for the odd entry of a remainder
        by_score = found.flatten()[torch.tensor(values).argsort()].tolist()
        assert all(low <= high + 1 for i, low in enumerate(by_score) for high in by_score[i:])


@PATIENT
@given(st.integers(0, 40), st.integers(1, 30))
def test_profile_with_infinite_beta_is_uniform(budget: int, m: int) -> None:
    allocator = ProfileAllocator(profile().kv_scores(3), beta=float("inf"))
    assert allocator.budgets(budget, m).tolist() == [[min(budget, m)] * 3] * 4


def test_profile_scores_on_any_scale() -> None:
    scores = torch.tensor([[1.0, 2, 4]])
    for scale in (1e-30, 1, 1e30):
        assert ProfileAllocator(scores * scale, 1, 2).budgets(7, 50).tolist() == [[1, 4, 16]]


def test_head_without_score_keeps_the_floor() -> None:
    # 9 entries, beta 2: 4 are pooled, 5 stay.
    assert ProfileAllocator(torch.tensor([[1.0, 0.0]]), 2).budgets(9, 100).tolist() == [[13, 5]]


def test_fixed_clips_and_repeats() -> None:
    same = FixedAllocator([5, 1])
    assert [allocate(same, torch.zeros(2, 3), 1, i, 4).tolist() for i in range(4)] == [[3, 1]] * 4
    each = FixedAllocator(torch.tensor([[5, 1], [0, 2]]))
    assert [allocate(each, torch.zeros(2, 9), 1, i, 2).tolist() for i in range(2)] == [[5, 1], [0, 2]]
    assert hash(same) == hash(FixedAllocator((5, 1)))


@PATIENT
@given(st.data())
def test_largest_remainder(data: st.DataObject) -> None:
    """The total is exact, no cap is passed, and where no cap binds no row is off by one or more."""
    targets = data.draw(st.lists(st.floats(0, 50), min_size=1, max_size=8))
    total = round(sum(targets))
    caps = [data.draw(st.integers(int(t) + 1, int(t) + 20)) for t in targets]
    found = largest_remainder(torch.tensor(targets, dtype=torch.float64), total, torch.tensor(caps))
    assert int(found.sum()) == total
    assert all(0 <= f <= c for f, c in zip(found.tolist(), caps, strict=True))
    assert all(abs(f - t) <= 1 + 1e-6 for f, t in zip(found.tolist(), targets, strict=True))


@pytest.mark.parametrize(
    "targets, total, caps, want",
    [
        pytest.param([1.5, 1.5, 1.0], 4, [9, 9, 9], [2, 1, 1], id="tie-goes-to-the-first"),
        pytest.param([2.9, 2.1], 5, [2, 9], [2, 3], id="past-a-full-row"),
        pytest.param([3.0, 3.0], 4, [9, 9], [2, 2], id="less-than-the-targets"),
        pytest.param([0.0, 0.0], 5, [3, 3], [3, 2], id="more-than-the-targets"),
        pytest.param([0.1 + 0.2, 2.7], 3, [9, 9], [0, 3], id="float-noise"),
        pytest.param([0.3, 0.1 + 0.2, 2.4], 4, [9, 9, 9], [1, 0, 3], id="a-tie-under-float-noise"),
        pytest.param([2.9999999999999996, 1.0], 4, [9, 9], [3, 1], id="almost-whole"),
        pytest.param([0.4], 0, [0], [0], id="nothing"),
    ],
)
def test_largest_remainder_table(targets: list[float], total: int, caps: list[int], want: list[int]) -> None:
    found = largest_remainder(torch.tensor(targets, dtype=torch.float64), total, torch.tensor(caps))
    assert found.tolist() == want


@PATIENT
@given(st.data())
def test_water_fill(data: st.DataObject) -> None:
    """Nothing is lost, no cap is passed, and no row falls below what it had, but for its cap."""
    rows = data.draw(st.integers(1, 8))
    numbers = st.lists(st.floats(0, 100), min_size=rows, max_size=rows)
    targets, weights = (torch.tensor(data.draw(numbers), dtype=torch.float64) for _ in range(2))
    caps = torch.tensor(data.draw(st.lists(st.integers(0, 60), min_size=rows, max_size=rows)))
    found = water_fill(targets, weights, caps)
    assert float(found.sum()) == pytest.approx(min(float(targets.sum()), float(caps.sum())), abs=1e-6)
    assert bool((found <= caps + 1e-9).all())
    assert bool((found >= torch.minimum(targets, caps.double()) - 1e-9).all())


def test_profile_that_can_not_share_a_budget_says_why() -> None:
    for scores, message in (
        (torch.tensor([[0.5, -0.1]]), "must be finite and at least 0, got -0.1"),
        (torch.tensor([[0.5, float("nan")]]), "must be finite and at least 0, got nan"),
        (torch.tensor([[0.5, float("inf")]]), "must be finite and at least 0"),
        (torch.zeros(2, 2), "must not all be 0"),
        (torch.zeros(2), r"must be a tensor \[L, H\]"),
        ([[0.5]], r"must be a tensor \[L, H\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ProfileAllocator(scores)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: AdaptiveAllocator(-0.1), ValueError, r"safeguard must be a number in \[0, 1\], got -0.1"),
        (lambda: AdaptiveAllocator(1.1), ValueError, r"safeguard must be a number in \[0, 1\], got 1.1"),
        (lambda: AdaptiveAllocator(float("nan")), ValueError, "safeguard must be .* got nan"),
        (lambda: AdaptiveAllocator("x"), TypeError, "safeguard must be .* got 'x'"),
        (lambda: AdaptiveAllocator(0.2, None), TypeError, "base must be an object with allocate, got None"),
        (lambda: AdaptiveAllocator(0.2, UniformAllocator), TypeError, "base must be an object with allocate"),
        (lambda: PyramidAllocator(0.5), ValueError, "beta must be a number of at least 1, got 0.5"),
        (lambda: PyramidAllocator(float("nan")), ValueError, "beta must be .* got nan"),
        (lambda: ProfileAllocator(torch.ones(1, 1), 0.99), ValueError, "beta must be a number of at least 1"),
        (
            lambda: ProfileAllocator(torch.ones(1, 1), 2, -1),
            ValueError,
            "temperature must be a number of at least 0",
        ),
        (lambda: FixedAllocator([]), ValueError, "budgets must hold an int a KV head"),
        (lambda: FixedAllocator([[1], [1, 2]]), ValueError, "budgets must hold an int a KV head, as many"),
        (lambda: FixedAllocator([1, -2]), ValueError, "budgets must be an int of at least 0, got -2"),
        (lambda: FixedAllocator([1.5]), TypeError, "budgets must be an int of at least 0, got 1.5"),
        (
            lambda: largest_remainder(torch.ones(2), 5, torch.tensor([2, 2])),
            ValueError,
            r"total must lie in \[0, 4\]",
        ),
        (
            lambda: largest_remainder(-torch.ones(2), 1, torch.tensor([2, 2])),
            ValueError,
            "targets must be finite",
        ),
    ],
)
def test_bad_parameters(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "allocator, message",
    [
        (ProfileAllocator(torch.ones(2, 3)), r"must have shape \[4, 2\] for this model, got \[2, 3\]"),
        (
            FixedAllocator([1, 2, 3]),
            r"budgets must have shape \[2\] or \[4, 2\] for this model, got \[1, 3\]",
        ),
        (
            FixedAllocator([[1, 2]] * 3),
            r"budgets must have shape \[2\] or \[4, 2\] for this model, got \[3, 2\]",
        ),
    ],
)
def test_another_model(allocator: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocator.allocate(torch.zeros(2, 9), 3, layer_idx=0, num_layers=4)
