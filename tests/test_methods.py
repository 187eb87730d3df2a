"""Methods: what they keep, the share that results, and what they refuse."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefills import prefill, profile
from torch import Tensor

import headkv
from headkv.allocators import AdaptiveAllocator, FixedAllocator, UniformAllocator
from headkv.methods import (
    AdaKV,
    DuoAttention,
    FullCache,
    HeadKV,
    Keep,
    Prefill,
    PyramidKV,
    RandomHeads,
    RazorAttention,
    SnapKV,
    StreamingLLM,
    budget_entries,
    plan_by_scores,
    select,
)
from headkv.scorers import KeyNormScorer, SnapKVScorer, StreamingScorer

PATIENT = settings(deadline=None)  # time says nothing where other work shares the machine
SCORER = SnapKVScorer(window=8, kernel_size=3)
GATES = profile("gate", heads=3, per="kv")
ECHO, INDUCTION = profile("echo", seed=1), profile("induction", seed=2)


def kept(method: Any, n: int, **shape: Any) -> Tensor:
    """Entries a head in each of 4 layers, `[4, H]`; every answer is checked against the protocol."""
    counts = []
    for layer in range(4):
        p = prefill(n, layer_idx=layer, queries=method.observed_queries, **shape)
        plan = method.plan(p)
        assert plan.mask.shape == (3, n) and plan.mask.dtype == torch.bool
        counts.append(plan.mask.sum(1))
    assert bool((torch.stack(counts) > 0).all()), "every head keeps something"
    return torch.stack(counts)


BY_BUDGET = {
    "snap": lambda budget: SnapKV(budget, SCORER),
    "ada": lambda budget: AdaKV(budget, SCORER),
    "ada-0": lambda budget: AdaKV(budget, SCORER, safeguard=0),
    "ada-pyramid": lambda budget: AdaKV(budget, SCORER, pyramid=True),
    "ada-key-norm": lambda budget: AdaKV(budget, KeyNormScorer(window=0), safeguard=0),
    "pyramid": lambda budget: PyramidKV(budget, scorer=SCORER),
    "head": lambda budget: HeadKV(budget, profile(), scorer=SCORER),
    "head-pooled": lambda budget: HeadKV(budget, profile(), beta=1, scorer=SCORER),
    "streaming": lambda budget: StreamingLLM(budget),
}


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 40, 101], ids=lambda n: f"n={n}")
@pytest.mark.parametrize("budget", [1, 3, 8, 9, 12, 39, 40, 500, 0.01, 0.2, 0.5, 1.0], ids=lambda b: f"{b}")
@pytest.mark.parametrize("name", BY_BUDGET)
def test_totals_are_the_budget(name: str, budget: int | float, n: int) -> None:
    """Over all layers and heads, whatever the method: exactly the budget, or the prompt if that is less."""
    entries = min(n, budget if isinstance(budget, int) else max(1, round(budget * n)))
    assert int(kept(BY_BUDGET[name](budget), n).sum()) == 4 * 3 * entries


@pytest.mark.parametrize("name", [name for name in BY_BUDGET if name not in {"streaming", "ada-key-norm"}])
def test_window_is_kept_and_counts(name: str) -> None:
    method = BY_BUDGET[name](20)
    plan = method.plan(prefill(40, queries=8))
    assert bool(plan.mask[:, -8:].all())
    small = BY_BUDGET[name](5).plan(prefill(40, queries=8))
    assert small.mask.int().argmax(1).tolist() == [35] * 3, (
        "a budget within the window keeps the last entries"
    )


@pytest.mark.parametrize("name", [name for name in BY_BUDGET if name != "streaming"])
@pytest.mark.parametrize("seed", [0, 1])
def test_kept_entries_are_the_best_of_their_head(name: str, seed: int) -> None:
    method = BY_BUDGET[name](20)
    p = prefill(60, seed=seed)
    scores = method.scorer.score(p)
    mask = method.plan(p).mask[:, : scores.shape[1]]
    for row, chosen in zip(scores, mask, strict=True):
        assert float(row[chosen].min()) >= float(row[~chosen].max())


def test_a_row_that_would_starve_keeps_one_entry() -> None:
    # Keys of head 0 are tiny, so all scores of head 0 come before any other; 3 heads of 4 entries make 12.
    p = prefill(12, heads=3)
    p = replace(p, keys=p.keys * torch.tensor([0.001, 1, 1])[:, None, None])
    plan = AdaKV(4, KeyNormScorer(window=0), safeguard=0).plan(p)
    assert plan.mask.sum(1).tolist() == [10, 1, 1]


@PATIENT
@given(st.integers(9, 60), st.integers(1, 70), st.integers(0, 3))
def test_one_extreme_is_the_other_method(n: int, budget: int, seed: int) -> None:
    """Ada-KV with a full safeguard, and HeadKV with infinite beta, are SnapKV; a pyramid of beta 1 too."""
    p = prefill(n, seed=seed)
    want = SnapKV(budget, SCORER).plan(p).mask
    for method in (
        AdaKV(budget, SCORER, safeguard=1),
        HeadKV(budget, profile(), beta=float("inf"), scorer=SCORER),
        PyramidKV(budget, beta=1, scorer=SCORER),
        AdaKV(budget, SCORER, safeguard=1, pyramid=True, beta=1),
    ):
        assert torch.equal(method.plan(p).mask, want), method


@PATIENT
@given(st.permutations(range(3)), st.integers(9, 50))
def test_permuting_heads_permutes_what_is_kept(order: list[int], budget: int) -> None:
    p = prefill(50)
    q = p.queries.view(3, 2, *p.queries.shape[1:])[list(order)].flatten(0, 1)
    permuted = replace(p, queries=q, keys=p.keys[list(order)], values=p.values[list(order)])
    for safeguard in (0.0, 1.0):
        method = AdaKV(budget, SnapKVScorer(8, 1), safeguard=safeguard)
        assert torch.equal(method.plan(permuted).mask, method.plan(p).mask[list(order)])


def test_any_scorer_and_allocator_compose() -> None:
    p = prefill(30)
    plan = plan_by_scores(p, StreamingScorer(sinks=2), FixedAllocator([3, 1, 30]), 10)
    assert [row.nonzero()[:, 0].tolist() for row in plan.mask] == [[0, 1, 29], [0], list(range(30))]


def test_profile_methods_read_their_layer() -> None:
    loud = torch.full((4, 3), 0.01)
    loud[2, 1] = 1.0
    one = replace(GATES, kind="retrieval", scores=loud)
    counts = kept(HeadKV(0.25, one, beta=1, scorer=SCORER), 80)
    assert counts.argmax() == 2 * 3 + 1 and int(counts[2, 1]) == 80
    duo = kept(DuoAttention(one, sparsity=11 / 12, sinks=2, recent=3), 80)
    assert int(duo[2, 1]) == 80 and int(duo.sum()) == 80 + 11 * 5


@pytest.mark.parametrize("reduce", ["sum", "max", "mean"])
def test_head_kv_groups_query_heads(reduce: str) -> None:
    scores = torch.zeros(4, 6)
    scores[0, :2], scores[1, 4] = torch.tensor([3.0, 3.0]), 5.0  # group sums 6 and 5, maxima 3 and 5
    counts = kept(HeadKV(0.2, replace(profile(), scores=scores), beta=1.2, scorer=SCORER, reduce=reduce), 400)
    assert (counts[0, 0] > counts[1, 2]) == (reduce != "max")


# Windowed rows.


def windows(plan: Keep) -> list[tuple[int, int]]:
    assert plan.sinks is not None and plan.recent is not None
    return list(zip(plan.sinks.tolist(), plan.recent.tolist(), strict=True))


@pytest.mark.parametrize(
    "budget, sinks, n, row, want",
    [
        pytest.param(5, 2, 12, (2, 3), [0, 1, 9, 10, 11], id="plain"),
        pytest.param(5, 0, 12, (0, 5), [7, 8, 9, 10, 11], id="no-sinks"),
        pytest.param(4, 4, 12, (3, 1), [0, 1, 2, 11], id="no-room-but-for-one-recent"),
        pytest.param(1, 4, 12, (0, 1), [11], id="one-entry"),
        pytest.param(0.25, 2, 12, (2, 1), [0, 1, 11], id="share"),
        pytest.param(20, 2, 5, (2, 18), [0, 1, 2, 3, 4], id="short-prompt-fills-up-later"),
    ],
)
def test_streaming_llm(budget: Any, sinks: int, n: int, row: tuple[int, int], want: list[int]) -> None:
    plan = StreamingLLM(budget, sinks).plan(prefill(n, queries=0))
    assert windows(plan) == [row] * 3 and plan.compensate is None
    assert plan.mask[1].nonzero()[:, 0].tolist() == want


@pytest.mark.parametrize("n", [3, 5, 6, 40], ids=lambda n: f"n={n}")
@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.75, 1.0], ids=lambda s: f"sparsity={s}")
def test_duo_attention(sparsity: float, n: int) -> None:
    method = DuoAttention(GATES, sparsity, sinks=2, recent=3)
    full = GATES.scores >= GATES.scores.flatten().sort(descending=True).values[round(12 * (1 - sparsity)) - 1]
    full = full if round(12 * (1 - sparsity)) else torch.zeros_like(full)
    assert int(full.sum()) == round(12 * (1 - sparsity))
    for layer in range(4):
        plan = method.plan(prefill(n, layer_idx=layer, queries=0))
        rows = [(0, 0) if whole else (2, 3) for whole in full[layer].tolist()]
        assert windows(plan) == rows if (2, 3) in rows else plan.recent is None
        for whole, row in zip(full[layer].tolist(), plan.mask, strict=True):
            want = range(n) if whole else sorted({0, 1, *range(n - 3, n)} & set(range(n)))
            assert row.nonzero()[:, 0].tolist() == list(want)
    assert int(kept(method, n).sum()) / (12 * n) == pytest.approx(
        replace(method, sparsity=1 - float(full.double().mean())).stored_share(n)
    )


@pytest.mark.parametrize("n", [6, 7, 8, 100], ids=lambda n: f"n={n}")
def test_razor_attention(n: int) -> None:
    method = RazorAttention(ECHO, INDUCTION, 0.1, 0.25, sinks=2, min_recent=5, window_share=0.1)
    # 10% of 12 heads is one echo head, 25% three induction heads; a KV head scores its best query head.
    echo, induction = (p.scores.view(4, 3, 2).max(2).values for p in (ECHO, INDUCTION))
    full = (echo == echo.max()) | (induction >= induction.flatten().sort().values[-3])
    recent = 10 if n == 100 else 5
    for layer in range(4):
        plan = method.plan(prefill(n, layer_idx=layer, queries=0))
        if bool(full[layer].all()):
            assert plan.recent is None and plan.compensate is None and bool(plan.mask.all())
            continue
        assert windows(plan) == [(0, 0) if whole else (2, recent) for whole in full[layer].tolist()]
        assert plan.compensate is not None and plan.compensate.tolist() == (~full[layer]).tolist()
    entries = int(kept(method, n).sum()) + int((~full).sum()) * (n > 2 + recent)
    assert entries / (12 * n) == pytest.approx(method.stored_share(n, 3))


def test_razor_attention_without_compensation() -> None:
    method = RazorAttention(ECHO, INDUCTION, sinks=1, min_recent=4, window_share=0, compensation=False)
    assert all(method.plan(prefill(50, layer_idx=i)).compensate is None for i in range(4))
    plain = RazorAttention(ECHO, INDUCTION, sinks=1, min_recent=4, window_share=0)
    assert plain.plan(prefill(50, sliding_window=20)).compensate is None, "a sliding layer forgets by itself"
    assert plain.stored_share(50, 3) > method.stored_share(50, 3)


def test_razor_share_of_the_paper() -> None:
    """With the published numbers a third is stored of a long prompt, and all of a short one."""
    many = [profile(kind, layers=32, heads=32, seed=seed) for seed, kind in enumerate(("echo", "induction"))]
    method = RazorAttention(*many)
    assert method.stored_share(10**6, 32) == pytest.approx(0.32, abs=0.01)
    assert method.stored_share(4000, 32) == 1


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.9, 1.0], ids=lambda s: f"share={s}")
@pytest.mark.parametrize("n", [50, 870, 4000, 100_000], ids=lambda n: f"n={n}")
def test_for_share(share: float, n: int) -> None:
    gates = profile("gate", layers=30, heads=3, per="kv")
    for method in (DuoAttention.for_share(share, n, gates), RandomHeads.for_share(share, n)):
        assert method.stored_share(n) == pytest.approx(share, abs=2 / n)
        assert method.recent >= method.sinks or share * n < 8


@pytest.mark.parametrize("n", [870, 4000], ids=lambda n: f"n={n}")
def test_razor_for_share(n: int) -> None:
    echo, induction = (profile(kind, layers=30, heads=9) for kind in ("echo", "induction"))
    method = RazorAttention.for_share(0.2, n, echo, induction, num_kv_heads=3)
    assert method.stored_share(n, 3) == pytest.approx(0.2, abs=1 / n)
    with pytest.raises(ValueError, match=r"share must be at least 0\.\d+ for these profiles .* got 0.05"):
        RazorAttention.for_share(0.05, n, echo, induction, num_kv_heads=3)


def test_random_heads_are_as_many_and_of_the_seed_alone() -> None:
    state = torch.get_rng_state()
    heads = RandomHeads(0.4, seed=1).retrieval_heads(30, 3)
    assert int(heads.sum()) == 36
    torch.rand(3)
    assert torch.equal(heads, RandomHeads(0.4, seed=1).retrieval_heads(30, 3))
    assert not torch.equal(heads, RandomHeads(0.4, seed=2).retrieval_heads(30, 3))
    counts = kept(RandomHeads(0.5, sinks=1, recent=4), 20)
    assert sorted(counts.flatten().tolist()) == [5] * 6 + [20] * 6
    torch.set_rng_state(state)


def test_full_cache_keeps_all() -> None:
    assert kept(FullCache(), 33).unique().tolist() == [33]


# Bad input.

BAD_BUDGETS = [
    (0, ValueError),
    (-1, ValueError),
    (0.0, ValueError),
    (-0.5, ValueError),
    (1.5, ValueError),
    (float("nan"), ValueError),
    (float("inf"), ValueError),
    (True, TypeError),
    ("x", TypeError),
    (None, TypeError),
    ([1], TypeError),
    (1j, TypeError),
]


@pytest.mark.parametrize("budget, error", BAD_BUDGETS, ids=lambda x: getattr(x, "__name__", repr(x)))
@pytest.mark.parametrize("name", BY_BUDGET)
def test_bad_budget(name: str, budget: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"budget must be a positive int or a share in \(0, 1\], got "):
        BY_BUDGET[name](budget)


@pytest.mark.parametrize(
    "budget, entries",
    [(7, 7), (0.2, 20), (1, 1), (1.0, 100), (0.001, 1), (0.115, 12), (Fraction(1, 4), 25), (np.int64(5), 5),
     (np.float32(0.5), 50), (1000, 1000)],
)  # fmt: skip
def test_budget_entries(budget: Any, entries: int) -> None:
    assert budget_entries(budget, 100) == entries


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: SnapKV(0.2, scorer=None), TypeError, "scorer must be an object with window, .* got None"),
        (lambda: SnapKV(0.2, scorer=SnapKVScorer), TypeError, "scorer must be an object"),
        (lambda: AdaKV(0.2, safeguard=2), ValueError, r"safeguard must be a number in \[0, 1\], got 2"),
        (lambda: AdaKV(0.2, beta=0), ValueError, "beta must be a number of at least 1, got 0"),
        (lambda: PyramidKV(0.2, beta=0.5), ValueError, "beta must be a number of at least 1, got 0.5"),
        (
            lambda: HeadKV(0.2, profile(), beta=0.9),
            ValueError,
            "beta must be a number of at least 1, got 0.9",
        ),
        (
            lambda: HeadKV(0.2, profile(), reduce="min"),
            ValueError,
            "reduce must be one of 'sum', 'max', 'mean'",
        ),
        (lambda: HeadKV(0.2, "smollm2"), TypeError, "profile must be an object with scores, kv_scores"),
        (
            lambda: DuoAttention(GATES, sparsity=1.1),
            ValueError,
            r"sparsity must be a number in \[0, 1\], got 1.1",
        ),
        (lambda: DuoAttention(GATES, recent=0), ValueError, "recent must be an int of at least 1, got 0"),
        (lambda: DuoAttention(GATES, sinks=-1), ValueError, "sinks must be an int of at least 0, got -1"),
        (lambda: DuoAttention(None), TypeError, "profile must be an object"),
        (
            lambda: RazorAttention(INDUCTION, ECHO),
            ValueError,
            "echo must be a profile of kind 'echo', got 'induction'",
        ),
        (lambda: RazorAttention(ECHO, ECHO), ValueError, "induction must be a profile of kind 'induction'"),
        (
            lambda: RazorAttention(ECHO, INDUCTION, min_recent=0),
            ValueError,
            "min_recent must be an int of at least 1",
        ),
        (
            lambda: RazorAttention(ECHO, INDUCTION, 2),
            ValueError,
            r"echo_share must be a number in \[0, 1\], got 2",
        ),
        (lambda: StreamingLLM(5, sinks=1.0), TypeError, "sinks must be an int of at least 0, got 1.0"),
        (lambda: RandomHeads(float("nan")), ValueError, r"share must be a number in \[0, 1\], got nan"),
        (lambda: RandomHeads(seed=None), TypeError, "seed must be an int of at least 0, got None"),
    ],
)
def test_bad_parameters(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@dataclass(frozen=True)
class Given:
    """Scores given by the test; as a method's scorer."""

    scores: Tensor
    window: int = 0
    observed_queries: int = 0

    def score(self, prefill: Prefill) -> Tensor:
        return self.scores

    def __repr__(self) -> str:
        return "Given()"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_name_scorer_and_layer(bad: float) -> None:
    scores = torch.rand(3, 20)
    scores[1, 5] = bad
    p = prefill(20, layer_idx=2)
    with pytest.raises(ValueError, match=r"scores of Given in layer 2 must be finite, but 1 of 60"):
        AdaKV(5, Given(scores)).plan(p)
    with pytest.raises(ValueError, match="scores of select must be finite"):
        select(scores, torch.tensor([1, 1, 1]))


def test_keys_that_are_not_finite_are_found() -> None:
    p = prefill(40)
    p.keys[1, 3, 0] = float("nan")
    with pytest.raises(ValueError, match=r"scores of SnapKVScorer in layer 0 must be finite"):
        AdaKV(20, SCORER).plan(p)


@pytest.mark.parametrize(
    "scores, budgets, error, message",
    [
        (
            torch.rand(3, 19),
            None,
            ValueError,
            r"scores of Given in layer 0 must have shape \[3, 20\], got \[3, 19\]",
        ),
        (torch.ones(3, 20).long(), None, TypeError, "must be floating, got torch.int64"),
        (torch.rand(3, 20), torch.tensor([1, 2, 21]), ValueError, r"must lie in \[0, 20\], got \[1, 2, 21\]"),
        (torch.rand(3, 20), torch.tensor([1, 2, -1]), ValueError, r"must lie in \[0, 20\]"),
        (torch.rand(3, 20), torch.tensor([1.0, 2, 3]), ValueError, r"must be int64 \[3\], got torch.float32"),
        (torch.rand(3, 20), torch.tensor([1, 2]), ValueError, r"must be int64 \[3\], got torch.int64 \[2\]"),
    ],
)
def test_broken_protocols(
    scores: Tensor, budgets: Tensor | None, error: type[Exception], message: str
) -> None:
    class Says:
        def allocate(self, *args: Any, **kwargs: Any) -> Tensor:
            assert budgets is not None
            return budgets

    allocator = UniformAllocator() if budgets is None else Says()
    with pytest.raises(error, match=message):
        plan_by_scores(prefill(20), Given(scores), allocator, 5)


def test_profile_of_another_model() -> None:
    p = prefill(400, queries=32, num_layers=5)
    for method in (HeadKV(0.2, profile()), DuoAttention(GATES), RazorAttention(ECHO, INDUCTION)):
        with pytest.raises(
            ValueError, match=r"\[5, 3\] for this model, got \[4, 6\]|5 layers like the model, got 4"
        ):
            method.plan(p)
    with pytest.raises(ValueError, match=r"must have shape \[4, 5\] for this model, got \[4, 6\]"):
        HeadKV(0.2, profile()).plan(prefill(400, heads=5))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"keys": torch.zeros(3, 0, 16)}, "keys must have shape .* at least one token"),
        ({"values": torch.zeros(3, 9, 16)}, r"values must have shape \[3, 10, D\]"),
        ({"queries": torch.zeros(4, 2, 16)}, "HQ a multiple of 3"),
        ({"queries": torch.zeros(6, 11, 16)}, "w <= 10"),
        ({"queries": torch.zeros(6, 2, 8)}, r"queries must have shape \[HQ, w, 16\]"),
        ({"layer_idx": 4}, r"layer_idx must lie in \[0, 4\), got 4"),
        ({"sliding_window": 0}, "sliding_window must be an int of at least 1, got 0"),
        ({"softcap": 0.0}, "softcap must be None or positive, got 0.0"),
        (
            {"sink_logits": torch.zeros(3)},
            r"sink_logits must have shape \[6\] like the heads of q, got \[3\]",
        ),
        ({"sink_logits": torch.full((6,), torch.nan)}, "sink_logits must be below infinity"),
    ],
)
def test_bad_prefill(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(prefill(10), **change)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Keep(torch.tensor([[True, False], [False, False]])), r"at least one entry a head, .* \[1\]"),
        (lambda: Keep(torch.ones(2, 3)), r"mask must be bool \[H, n\], got torch.float32"),
        (
            lambda: Keep(torch.ones(2, 3).bool(), sinks=torch.zeros(2)),
            "sinks and recent must be given together",
        ),
        (
            lambda: Keep(torch.ones(2, 3).bool(), compensate=torch.zeros(3)),
            r"compensate must have shape \[2\], got",
        ),
    ],
)
def test_bad_keep(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", BY_BUDGET)
def test_prompt_of_one_token(name: str) -> None:
    assert kept(BY_BUDGET[name](0.2), 1).unique().tolist() == [1]


def test_methods_are_values() -> None:
    assert AdaKV(0.2) == AdaKV(0.2) != AdaKV(0.3)
    assert AdaKV(0.2).allocator() == AdaptiveAllocator(0.2)
    assert "AdaKV(budget=0.2, scorer=SnapKVScorer(window=32" in repr(AdaKV(0.2))


SIZED = {
    "SnapKV": (SnapKV, ()),
    "AdaKV": (AdaKV, ()),
    "PyramidKV": (PyramidKV, ()),
    "HeadKV": (HeadKV, (profile(),)),
    "StreamingLLM": (StreamingLLM, ()),
    "ScoredMethod": (headkv.ScoredMethod, ()),
    "KVzip": (headkv.KVzip, ()),
    "DefensiveKV": (headkv.DefensiveKV, ()),
    "CriticalKV": (headkv.CriticalKV, ()),
    "DuoAttention": (DuoAttention, (GATES,)),
    "RandomHeads": (RandomHeads, ()),
}


@pytest.mark.parametrize("name", SIZED)
def test_every_method_is_sized_in_one_way(name: str) -> None:
    """`for_share(share, length, ...)` stores what `stored_share(length)` says."""
    make, arguments = SIZED[name]
    method = make.for_share(0.4, 1000, *arguments)
    assert method.stored_share(1000) == pytest.approx(0.4, abs=0.01)
    with pytest.raises(ValueError, match="length must be"):
        make.for_share(0.4, 0, *arguments)
    assert FullCache.for_share(0.4, 1000).stored_share(1000) == 1


def test_razor_attention_takes_a_profile_of_another_kind_for_both() -> None:
    """The heads that were found to matter keep all, however they were found."""
    found = replace(GATES, kind="ablation")
    method = RazorAttention(found, found, echo_share=0, induction_share=0.25, min_recent=5, window_share=0)
    kept = torch.stack([method.plan(prefill(40, layer_idx=i, queries=0)).mask.all(1) for i in range(4)])
    assert torch.equal(kept, method.retrieval_heads(found.kv_scores(3), found.kv_scores(3)))
    assert int(kept.sum()) == 3
    with pytest.raises(ValueError, match="echo must be a profile of kind 'echo', got 'ablation'"):
        RazorAttention(found, INDUCTION)
