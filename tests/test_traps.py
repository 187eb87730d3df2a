"""One test for each published bug in scores, budgets or the choice of heads, named after the bug."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from prefills import prefill, profile
from torch import Tensor

from headkv.allocators import AdaptiveAllocator, ProfileAllocator, PyramidAllocator, UniformAllocator
from headkv.methods import (
    AdaKV,
    DuoAttention,
    HeadKV,
    Prefill,
    PyramidKV,
    RandomHeads,
    RazorAttention,
    SnapKV,
    StreamingLLM,
)
from headkv.scorers import SnapKVScorer

SCORER = SnapKVScorer(window=8, kernel_size=3)


def with_weights(weights: list[list[float]], dtype: torch.dtype = torch.float32) -> Prefill:
    """One KV head, and query heads with one query each, of given weights; the last entry is the window."""
    heads = len(weights)
    keys = torch.tensor(weights).log().T[None].to(dtype)  # [1, n, heads]: key dimension g serves query head g
    return Prefill(torch.eye(heads)[:, None].to(dtype), keys, keys, 0, 1, 1.0)


def counts(method: object, n: int, layers: int = 4, **shape: int) -> list[int]:
    """Entries that each layer keeps."""
    return [
        int(method.plan(prefill(n, layer_idx=i, num_layers=layers, **shape)).mask.sum())  # type: ignore[attr-defined]
        for i in range(layers)
    ]


# Scores.


def test_group_is_reduced_before_pooling() -> None:
    """With max pooling, pooling each query head first gives .4 in place of .25."""
    p = with_weights([[0.4, 0.1, 0.1, 0.4], [0.1, 0.4, 0.1, 0.4]])
    assert SnapKVScorer(1, 3).score(p)[0].tolist() == pytest.approx([0.25, 0.25, 0.25])
    first = SnapKVScorer(1, 3, "max", "max").score(p)[0]
    assert first.tolist() == pytest.approx([0.4, 0.4, 0.4]), "max and max commute"


def test_ranking_is_not_done_in_bfloat16() -> None:
    """Two weights that bfloat16 rounds to one: .100 and .1001. The second must win."""
    p = with_weights([[0.1, 0.1001, 0.2, 0.5999]])
    scores = SnapKVScorer(1, 1).score(p)
    assert scores.bfloat16()[0, 0] == scores.bfloat16()[0, 1]
    assert SnapKV(3, SnapKVScorer(1, 1)).plan(p).mask.tolist() == [[False, True, True, True]]


def test_small_weights_do_not_underflow() -> None:
    """Weights below float16's smallest number still rank."""
    p = with_weights([[1e-12, 3e-12, 2e-12, 1.0]])
    assert SnapKV(2, SnapKVScorer(1, 1)).plan(p).mask.tolist() == [[False, True, False, True]]


def test_ties_keep_the_earlier_position() -> None:
    """An unstable top-k returns any of the equal entries."""
    p = with_weights([[0.1] * 200 + [0.5]])
    mask = SnapKV(51, SnapKVScorer(1, 1)).plan(p).mask[0]
    assert mask.nonzero()[:, 0].tolist() == [*range(50), 200]


def test_even_kernel_does_not_change_the_length() -> None:
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        SnapKVScorer(kernel_size=6)


def test_prompt_within_the_window_is_not_compressed() -> None:
    for n in (1, 8, 9):
        assert counts(AdaKV(9, SCORER), n) == [3 * n] * 4


def test_budget_of_all_that_compete_keeps_all() -> None:
    for allocator in (UniformAllocator(), AdaptiveAllocator(), PyramidAllocator()):
        for budget in (12, 13, 100):
            found = allocator.allocate(torch.rand(3, 12), budget, layer_idx=1, num_layers=3)
            assert found.tolist() == [12] * 3


# Budgets.


def test_pyramid_budgets_are_not_frozen_at_the_first_prompt() -> None:
    method = PyramidKV(40, scorer=SCORER)
    fresh = counts(PyramidKV(40, scorer=SCORER), 300)
    short = counts(method, 50)
    assert counts(method, 300) == fresh != short


def test_pyramid_total_does_not_drift_by_floor_division() -> None:
    for n in (60, 77, 500):
        assert sum(counts(PyramidKV(41, scorer=SCORER), n, layers=7)) == 7 * 3 * 41


def test_pyramid_does_not_invert_beyond_the_prompt() -> None:
    for budget in (5, 12, 30):
        layers = PyramidAllocator().layers(budget, 12, 6).tolist()
        assert layers == sorted(layers, reverse=True) and max(layers) <= 12


def test_pyramid_of_one_layer_does_not_divide_by_zero() -> None:
    assert PyramidAllocator().layers(9, 100, 1).tolist() == [9]


def test_pyramid_beta_is_not_ignored() -> None:
    assert counts(PyramidKV(40, beta=2, scorer=SCORER), 300) != counts(PyramidKV(40, scorer=SCORER), 300)
    steep, flat = (AdaKV(40, SCORER, pyramid=True, beta=beta) for beta in (20, 2))
    assert counts(steep, 300) != counts(flat, 300)


def test_adaptive_total_does_not_drift_by_rounding() -> None:
    """Rounding every head by itself and flooring the safeguard loses or adds some."""
    generator = torch.Generator().manual_seed(0)
    for budget in range(1, 40):
        found = AdaptiveAllocator(0.23).allocate(
            torch.rand(5, 40, generator=generator), budget, layer_idx=0, num_layers=1
        )
        assert int(found.sum()) == 5 * budget


def test_safeguard_is_a_blend_not_a_protected_set() -> None:
    """A protected set of 0.5 * 4 = 2 entries a head would leave the counts at 2 and 6."""
    scores = torch.tensor([[0.9, 0.8, 0.01, 0.01, 0.01, 0.01], [0.7, 0.6, 0.5, 0.4, 0.3, 0.2]])
    found = AdaptiveAllocator(0.5).allocate(scores, 4, layer_idx=0, num_layers=1)
    assert found.tolist() == [3, 5]


def test_window_does_not_eat_the_safeguard() -> None:
    """A head with no score at all keeps its window, and a fifth of an equal share besides."""
    p = prefill(100, heads=2, group=1)
    keys = p.keys.clone()
    queries = torch.zeros_like(p.queries)
    queries[..., 0] = 40.0
    keys[..., 0] = 0.0
    keys[0, 92:, 0] = 10.0  # head 0 looks at its window alone
    plan = AdaKV(28, SCORER, safeguard=0.2).plan(replace(p, queries=queries, keys=keys))
    assert plan.mask[:, 92:].all() and plan.mask[0, :92].sum() == 4 and plan.mask[1, :92].sum() == 36


def test_window_is_counted_once_by_every_method() -> None:
    """Published programs differ: some budgets include the window, one pooled it as if it did not."""
    for window in (1, 8, 30):
        scorer = SnapKVScorer(window, 3)
        for method in (
            SnapKV(50, scorer),
            AdaKV(50, scorer),
            PyramidKV(50, scorer=scorer),
            HeadKV(50, profile(), scorer=scorer),
        ):
            assert sum(counts(method, 400)) == 4 * 3 * 50, method


def test_head_kv_overflow_is_given_back() -> None:
    """One head with nearly all score would get more than the prompt; a slice must not swallow the rest."""
    scores = torch.full((4, 6), 0.001)
    scores[1, 2] = 5.0
    method = HeadKV(60, replace(profile(), scores=scores), beta=1.01, scorer=SCORER)
    assert sum(counts(method, 200)) == 4 * 3 * 60
    assert int(method.plan(prefill(200, layer_idx=1)).mask[1].sum()) == 200


def test_head_kv_larger_beta_pools_less() -> None:
    """A published README says the opposite."""
    scores = torch.tensor([[0.7, 0.1, 0.2, 0.0]])
    most = [int(ProfileAllocator(scores, beta).budgets(100, 1000).max()) for beta in (1, 1.5, 2, 10, 1000)]
    assert most == sorted(most, reverse=True) and len(set(most)) == 5
    assert ProfileAllocator(scores, 1).budgets(100, 1000).tolist() == [[280, 40, 80, 0]]


def test_head_kv_beta_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="beta must be a number of at least 1, got 0.5"):
        HeadKV(50, profile(), beta=0.5)


def test_share_does_not_leave_a_negative_budget() -> None:
    """A ratio below the window once gave negative budgets, and a negative slice kept nearly everything."""
    for share in (0.001, 0.01, 0.05):
        for method in (AdaKV(share, SCORER), HeadKV(share, profile(), scorer=SCORER)):
            assert sum(counts(method, 100)) == 12 * max(1, round(100 * share))


def test_profile_of_another_model_is_refused() -> None:
    other = profile(layers=32, heads=32)
    for method in (HeadKV(50, other, scorer=SCORER), DuoAttention(replace(other, kind="gate"))):
        with pytest.raises(ValueError, match="32"):
            method.plan(prefill(400))


def test_grouped_heads_are_stored_once() -> None:
    """Scores of a group are reduced to its KV head; budgets are entries of KV heads, not of query heads."""
    for group in (1, 2, 3):
        mask = AdaKV(20, SCORER).plan(prefill(50, group=group)).mask
        assert mask.shape == (3, 50) and int(mask.sum()) == 60


# Choice of heads.


def retrieval(method: object, n: int = 5000, layers: int = 4) -> Tensor:
    """The heads that keep all of a prompt, `[L, H]` bool."""
    return torch.stack(
        [
            method.plan(prefill(n, layer_idx=i, dim=1, queries=0, num_layers=layers)).mask.all(1)  # type: ignore[attr-defined]
            for i in range(layers)
        ]
    )


def test_gates_are_cut_by_a_quantile() -> None:
    """Nearly all gates of grouped-query models exceed one half: a threshold would compress nothing."""
    gates = replace(profile("gate", heads=3, per="kv"), scores=torch.linspace(0.9, 1, 12).view(4, 3))
    assert retrieval(DuoAttention(gates)).flatten().tolist() == [False] * 6 + [True] * 6


@pytest.mark.parametrize("sparsity, full", [(0, 12), (1, 0), (1 / 3, 8)])
def test_tied_gates_do_not_change_the_number_of_heads(sparsity: float, full: int) -> None:
    """All gates are 1, as clipped files have them; `>=` would make every head a retrieval head."""
    gates = replace(profile("gate", heads=3, per="kv"), scores=torch.ones(4, 3))
    assert retrieval(DuoAttention(gates, sparsity)).flatten().tolist() == [True] * full + [False] * (
        12 - full
    )


def test_tied_gates_need_no_noise() -> None:
    """No global random state, and the caller's scores stay."""
    scores = torch.ones(4, 3)
    gates = replace(profile("gate", heads=3, per="kv"), scores=scores)
    state = torch.get_rng_state()
    chosen = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        chosen.append(retrieval(DuoAttention(gates)))
        assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(state)
    assert torch.equal(chosen[0], chosen[1]) and torch.equal(scores, torch.ones(4, 3))


def test_layers_may_have_no_or_only_retrieval_heads() -> None:
    scores = torch.zeros(4, 3)
    scores[2] = 1
    gates = replace(profile("gate", heads=3, per="kv"), scores=scores)
    assert retrieval(DuoAttention(gates, 0.75)).sum(1).tolist() == [0, 0, 3, 0]


def test_streaming_window_slides() -> None:
    """A mask fixed at prefill would let streaming heads see every new token for ever."""
    gates = profile("gate", heads=3, per="kv")
    for method in (DuoAttention(gates, 1), RandomHeads(0), StreamingLLM(20)):
        for n in (10, 500):  # a prompt shorter than the window, too
            plan = method.plan(prefill(n, queries=0))
            assert plan.recent is not None and plan.recent.gt(0).all(), method


def test_short_prompt_does_not_give_a_negative_share() -> None:
    gates = profile("gate", heads=3, per="kv")
    for n in (1, 100, 320, 321):
        assert 0 < DuoAttention(gates).stored_share(n) <= 1
        assert 0 < RandomHeads().stored_share(n) <= 1


def echo_and_induction(layers: int, heads: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(layers, heads), torch.zeros(layers, heads)


def razor(echo: Tensor, induction: Tensor, echo_share: float, induction_share: float) -> RazorAttention:
    profiles = (replace(profile(kind), scores=x) for kind, x in (("echo", echo), ("induction", induction)))
    return RazorAttention(*profiles, echo_share, induction_share, min_recent=10, window_share=0)


def test_echo_heads_of_every_layer_are_merged() -> None:
    """A return inside a loop merged those of the first layer only."""
    echo, induction = echo_and_induction(4, 3)
    echo[0, 1] = echo[2, 0] = echo[3, 2] = 1.0
    induction[1, 1] = induction[3, 0] = 1.0
    found = retrieval(razor(echo, induction, 3 / 12, 2 / 12))
    assert found.nonzero().tolist() == [[0, 1], [1, 1], [2, 0], [3, 0], [3, 2]]


def test_tied_heads_do_not_exceed_the_quota() -> None:
    """Choosing by the value of the last chosen score takes all heads that share it."""
    echo, induction = echo_and_induction(4, 3)
    found = retrieval(razor(echo, induction + 0.5, 0.25, 0.5))
    assert int(found.sum()) == 6, "the 3 echo heads are the first, and so are the 6 induction heads"


def test_one_percent_of_few_heads_is_one() -> None:
    """1% of 12 rounds to 0: there would be no echo head in a small model."""
    echo, induction = echo_and_induction(4, 3)
    echo[3, 2], induction[0, 0] = 1.0, 1.0
    assert retrieval(razor(echo, induction, 0.01, 0.01)).nonzero().tolist() == [[0, 0], [3, 2]]


def test_kv_head_scores_its_best_query_head() -> None:
    """A mean would prefer three middling query heads to one strong one."""
    echo, induction = echo_and_induction(4, 6)
    induction[1, 2:4] = 0.6  # mean .6
    induction[2, 5] = 1.0  # mean .5, best 1
    echo[2, 5] = 1.0
    assert retrieval(razor(echo, induction, 0.01, 0.01)).nonzero().tolist() == [[2, 2]]


def test_swapped_profiles_are_refused() -> None:
    with pytest.raises(ValueError, match="echo must be a profile of kind 'echo', got 'induction'"):
        RazorAttention(profile("induction"), profile("echo"))
