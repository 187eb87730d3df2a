"""Scorers: against slow definitions in float64, by hand, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from prefills import prefill
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headkv.logits import Rule
from headkv.methods import Prefill
from headkv.scorers import (
    KeyNormScorer,
    ObservedAttentionScorer,
    RandomScorer,
    SnapKVScorer,
    StreamingScorer,
    observed,
    snapkv,
)
from headkv.scorers.attention import attention_weights


def dense_weights(p: Prefill) -> Tensor:
    """Causal attention of the observed queries, one at a time, `[HQ, w, n]` float64."""
    n, w = p.length, p.queries.shape[1]
    out = torch.zeros(p.queries.shape[0], w, n, dtype=torch.float64)
    for head, query in enumerate(p.queries.double()):
        keys = p.keys[head // (len(p.queries) // p.num_kv_heads)].double()
        for t in range(w):
            position = n - w + t
            first = 0 if p.sliding_window is None else max(0, position - p.sliding_window + 1)
            seen = slice(first, position + 1)
            logits = keys[seen] @ query[t] * p.scale
            if p.softcap is not None:
                logits = p.softcap * torch.tanh(logits / p.softcap)
            if p.sink_logits is not None:  # an entry more, whose weight nobody gets
                logits = torch.cat([logits, p.sink_logits[head : head + 1].double()])
            out[head, t, seen] = torch.softmax(logits, 0)[: position + 1 - first]
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_weights_on_a_gpu_have_all_digits(dtype: torch.dtype) -> None:
    """16-bit queries and keys are multiplied without rounding in between."""
    q, k = torch.randn(2, 3, 32, 80).to(dtype), torch.randn(2, 5000, 80).to(dtype)
    hidden = torch.ones(32, 5000, dtype=torch.bool).triu(4969)
    want = (q.double() @ k.double()[:, None].mT * 0.3).masked_fill(hidden, -torch.inf).softmax(-1)
    got = attention_weights(q.cuda(), k.cuda(), 4968, Rule(0.3)).cpu()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=3e-5, atol=1e-9)


def slow_snapkv(p: Prefill, scorer: SnapKVScorer) -> Tensor:
    """The definition, in words: mean over the window, reduce the group, pool, drop the window."""
    m = p.length - scorer.window
    weights = dense_weights(p)[:, -scorer.window :, :m].mean(1)
    group = weights.view(p.num_kv_heads, -1, m)
    heads = {"mean": group.mean(1), "max": group.max(1).values, "sum": group.sum(1)}[scorer.reduce]
    reach = scorer.kernel_size // 2
    pooled = torch.zeros_like(heads)
    for i in range(m):
        around = heads[:, max(0, i - reach) : i + reach + 1]
        total = around.sum(1) / scorer.kernel_size  # beyond the ends there is 0, and it counts
        pooled[:, i] = around.max(1).values if scorer.pooling == "max" else total
    return pooled


SNAP = [
    pytest.param(SnapKVScorer(8, 5), {"n": 40}, id="max-mean"),
    pytest.param(SnapKVScorer(8, 5, "avg"), {"n": 40}, id="avg-mean"),
    pytest.param(SnapKVScorer(8, 7, "max", "max"), {"n": 41, "group": 3}, id="max-max"),
    pytest.param(SnapKVScorer(8, 3, "avg", "sum"), {"n": 33, "heads": 1}, id="avg-sum"),
    pytest.param(SnapKVScorer(4, 1), {"n": 20, "group": 1, "dim": 10}, id="no-pooling"),
    pytest.param(SnapKVScorer(1, 9), {"n": 6}, id="kernel-longer-than-text"),
    pytest.param(SnapKVScorer(4, 5), {"n": 40, "sliding_window": 9}, id="sliding-window"),
    pytest.param(SnapKVScorer(4, 5), {"n": 40, "softcap": 2.0}, id="softcap"),
    pytest.param(SnapKVScorer(4, 3, "avg"), {"n": 40, "softcap": 5.0, "sliding_window": 9}, id="both"),
    pytest.param(SnapKVScorer(4, 5), {"n": 40, "sinks": True}, id="sinks"),
    pytest.param(SnapKVScorer(4, 5), {"n": 40, "sinks": True, "softcap": 5.0, "sliding_window": 9}, id="all"),
]


@pytest.mark.parametrize("scorer, shape", SNAP)
def test_snapkv_is_its_definition(scorer: SnapKVScorer, shape: dict[str, Any]) -> None:
    p = prefill(**shape)
    found = scorer.score(p)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), slow_snapkv(p, scorer), atol=1e-6, rtol=1e-5)


def test_snapkv_by_hand() -> None:
    # Six entries, one query of weight 1, 2, 5, 1, 3, 4 (sixteenths); the last is the window itself.
    weights = torch.tensor([1.0, 2, 5, 1, 3, 4]) / 16
    p = Prefill(torch.ones(1, 1, 1), weights.log()[None, :, None], torch.ones(1, 6, 1), 0, 1, 1.0)
    exact = {
        ("max", 1): [1, 2, 5, 1, 3],
        ("max", 3): [2, 5, 5, 5, 3],
        ("avg", 3): [1, 8 / 3, 8 / 3, 3, 4 / 3],
    }
    for (pooling, kernel), sixteenths in exact.items():
        found = SnapKVScorer(1, kernel, pooling).score(p)[0]
        torch.testing.assert_close(found * 16, torch.tensor(sixteenths, dtype=torch.float32))


def test_snapkv_is_not_normalised_without_the_window() -> None:
    keys = torch.zeros(1, 10, 2)
    keys[0, 8:, 0] = 20  # both window entries draw nearly all attention
    p = Prefill(torch.tensor([[[1.0, 0], [1, 0]]]), keys, keys, 0, 1, 1.0)
    assert float(SnapKVScorer(2, 1).score(p).sum()) < 1e-6


def test_snapkv_gives_0_to_what_no_observing_query_sees() -> None:
    scores = SnapKVScorer(4, 1).score(prefill(40, sliding_window=10))
    assert not scores[:, :27].any()  # the first query is 36 and sees 27 .. 36
    assert bool((scores[:, 27:] > 0).all())


@pytest.mark.parametrize("n", [1, 7, 8], ids=lambda n: f"n={n}")
def test_nothing_competes_in_a_prompt_within_the_window(n: int) -> None:
    p = prefill(n)
    scorers = (
        SnapKVScorer(8),
        ObservedAttentionScorer(8),
        StreamingScorer(1, 8),
        KeyNormScorer(8),
        RandomScorer(0, 8),
    )
    for scorer in scorers:
        assert scorer.score(p).shape == (3, 0), scorer


def test_more_queries_than_the_window_change_nothing() -> None:
    scorer = SnapKVScorer(8)
    assert torch.equal(scorer.score(prefill(40)), scorer.score(prefill(40, queries=8)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scorer", [SnapKVScorer(8), ObservedAttentionScorer(8), KeyNormScorer(8)], ids=str)
def test_half_precision_is_scored_in_float32(scorer: Any, dtype: torch.dtype) -> None:
    p = prefill(64, dtype=dtype)
    wide = Prefill(p.queries.float(), p.keys.float(), p.values.float(), 0, 4, p.scale)
    found = scorer.score(p)
    assert found.dtype == torch.float32
    assert torch.equal(found, scorer.score(wide))


@pytest.mark.parametrize("reduce", ["mean", "max", "sum"])
@pytest.mark.parametrize("sliding_window", [None, 7], ids=["full", "sliding"])
@pytest.mark.parametrize("average", [False, True], ids=["sum", "average"])
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("sinks", [False, True], ids=["no sinks", "sinks"])
def test_observed_attention_is_its_definition(
    reduce: str, sliding_window: int | None, average: bool, softcap: float | None, sinks: bool
) -> None:
    p = prefill(30, sliding_window=sliding_window, softcap=softcap, sinks=sinks)
    got = dense_weights(p).sum(1).view(3, 2, 30)
    got = {"mean": got.mean(1), "max": got.max(1).values, "sum": got.sum(1)}[reduce]
    if average:
        got = got / torch.tensor([min(30 - j, sliding_window or 30) for j in range(30)])
    found = ObservedAttentionScorer(4, average, reduce).score(p)
    torch.testing.assert_close(found.double(), got[:, :26], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("module", [snapkv, observed], ids=["snapkv", "observed"])
@pytest.mark.parametrize("block", [1, 500], ids=lambda b: f"block={b}")
def test_blocks_do_not_change_scores(module: Any, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = SnapKVScorer(8) if module is snapkv else ObservedAttentionScorer(8)
    p = prefill(50, sinks=True)
    whole = scorer.score(p)
    monkeypatch.setattr(module, "BLOCK", block)
    torch.testing.assert_close(scorer.score(p), whole)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize(
    "scorer, queries, most",
    [
        pytest.param(SnapKVScorer(32), 32, 12 * 32 * 1500, id="snapkv-w-x-n"),
        pytest.param(ObservedAttentionScorer(), None, 1 << 20, id="observed-block"),
    ],
)
def test_no_matrix_of_all_pairs(
    scorer: Any, queries: int | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observed, "BLOCK", 1 << 20)
    with Largest() as largest:
        scorer.score(prefill(1500, heads=6, queries=queries))
    assert 0 < largest.numel <= most < 1500 * 1500


def test_streaming_ranks_sinks_then_the_latest() -> None:
    scores = StreamingScorer(sinks=2).score(prefill(7))
    assert scores.argsort(1, descending=True).tolist() == [[0, 1, 6, 5, 4, 3, 2]] * 3


def test_key_norm_prefers_small_keys() -> None:
    p = prefill(9)
    found = KeyNormScorer(window=2).score(p)
    want = [[-math.sqrt(sum(x * x for x in key.tolist())) for key in head[:7]] for head in p.keys]
    torch.testing.assert_close(found, torch.tensor(want))


def test_random_is_of_seed_and_layer_alone() -> None:
    state = torch.get_rng_state()
    first = RandomScorer(3).score(prefill(50, seed=1))
    torch.rand(5)
    torch.set_rng_state(state)
    assert torch.equal(first, RandomScorer(3).score(prefill(50, seed=2)))
    assert not torch.equal(first, RandomScorer(4).score(prefill(50)))
    assert not torch.equal(first, RandomScorer(3).score(prefill(50, layer_idx=1)))
    assert len(set(first.flatten().tolist())) == first.numel()
    RandomScorer(3).score(prefill(50))
    assert torch.equal(torch.get_rng_state(), state), "the global random state is not touched"


@pytest.mark.parametrize(
    "scorer, queries, message",
    [
        pytest.param(SnapKVScorer(8), 7, "queries must hold the last 8 tokens .* got 7", id="snapkv"),
        pytest.param(ObservedAttentionScorer(), 8, "queries must hold all 40 tokens .* got 8", id="observed"),
    ],
)
def test_too_few_queries(scorer: Any, queries: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scorer.score(prefill(40, queries=queries))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: SnapKVScorer(window=0), ValueError, "window must be an int of at least 1, got 0"),
        (lambda: SnapKVScorer(window=2.5), TypeError, "window must be an int of at least 1, got 2.5"),
        (lambda: SnapKVScorer(window=True), TypeError, "window must be an int of at least 1, got True"),
        (lambda: SnapKVScorer(kernel_size=0), ValueError, "kernel_size must be an int of at least 1"),
        (lambda: SnapKVScorer(kernel_size=4), ValueError, "kernel_size must be odd.*got 4"),
        (lambda: SnapKVScorer(pooling="min"), ValueError, "pooling must be one of 'max', 'avg', got 'min'"),
        (lambda: SnapKVScorer(reduce="first"), ValueError, "reduce must be one of 'mean', 'max', 'sum'"),
        (
            lambda: ObservedAttentionScorer(window=-1),
            ValueError,
            "window must be an int of at least 0, got -1",
        ),
        (lambda: ObservedAttentionScorer(reduce=""), ValueError, "reduce must be one of"),
        (lambda: StreamingScorer(sinks=-1), ValueError, "sinks must be an int of at least 0, got -1"),
        (lambda: KeyNormScorer(window="x"), TypeError, "window must be an int of at least 0, got 'x'"),
        (lambda: RandomScorer(seed=-1), ValueError, "seed must be an int of at least 0, got -1"),
    ],
)
def test_bad_parameters(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
