"""What a method says that it will store: worked by hand, and against the cache that then does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from prefills import prefill, profile
from torch import Tensor

import headkv
from headkv.allocators import AdaptiveAllocator, FixedAllocator, PyramidAllocator
from headkv.methods import Keep
from headkv.models.tiny import tiny_model
from headkv.scorers import KeyNormScorer, SnapKVScorer
from headkv.scorers.defensive import DefensiveScorer
from headkv.scorers.kvzip import KVzipScorer

SCORER = SnapKVScorer(window=4, kernel_size=3)
GATES = profile("gate", layers=3, heads=2, per="kv")
ECHO, INDUCTION = (profile(kind, layers=3, heads=4, seed=i) for i, kind in enumerate(("echo", "induction")))
LOUD = headkv.HeadProfile("test", "retrieval", "kv", torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))
GATED = headkv.HeadProfile("test", "gate", "kv", torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.1]]))

# Three layers of two KV heads, 40 tokens: budgets, and entries in all.
BY_HAND: dict[str, tuple[Any, list[list[int]] | None, int]] = {
    "full": (headkv.FullCache(), [[40, 40]] * 3, 240),
    "SnapKV": (headkv.SnapKV(0.25, SCORER), [[10, 10]] * 3, 60),
    "a budget beyond the prompt": (headkv.SnapKV(500, SCORER), [[40, 40]] * 3, 240),
    "a budget within the window": (headkv.SnapKV(3, SCORER), [[3, 3]] * 3, 18),
    # 10 entries, 6 without the window: the last layer 6 // 3 = 2, the first 2 * 6 - 2 = 10
    "PyramidKV": (headkv.PyramidKV(10, beta=3, scorer=SCORER), [[14, 14], [10, 10], [6, 6]], 60),
    # 6 of 10 compete, all pooled: 36 to split 3 to 1, which is 27 and 9
    "HeadKV": (headkv.HeadKV(10, LOUD, beta=1, scorer=SCORER), [[31, 4], [13, 4], [4, 4]], 60),
    "DuoAttention": (headkv.DuoAttention(GATED, 2 / 3, sinks=2, recent=5), [[40, 7], [7, 40], [7, 7]], 108),
    "StreamingLLM": (headkv.StreamingLLM(9, sinks=2), [[9, 9]] * 3, 54),
    "given budgets": (
        headkv.ScoredMethod(10, SCORER, FixedAllocator([[1, 2], [3, 4], [50, 0]])),
        [[5, 6], [7, 8], [40, 4]],
        70,
    ),
    "no row stays empty": (
        headkv.ScoredMethod(2, KeyNormScorer(window=0), FixedAllocator([0, 4])),
        [[1, 3]] * 3,
        12,
    ),
    "AdaKV": (headkv.AdaKV(0.25, SCORER), None, 60),
    "AdaKV over all layers": (headkv.AdaKV(7, SCORER, scope="model"), None, 42),
    "AdaKV with a full safeguard": (headkv.AdaKV(7, SCORER, safeguard=1), [[7, 7]] * 3, 42),
    "AdaKV that keeps all": (headkv.AdaKV(1.0, SCORER), [[40, 40]] * 3, 240),
    "KVzip": (headkv.KVzip(0.5, KVzipScorer(window=4)), None, 120),
}


@pytest.mark.parametrize("method, budgets, entries", BY_HAND.values(), ids=BY_HAND)
def test_by_hand(method: Any, budgets: list[list[int]] | None, entries: int) -> None:
    model = tiny_model("llama")
    for told in (method.explain(model, 40), method.explain(model.config, np.int64(40))):
        assert (told.budgets if budgets is None else told.budgets.tolist()) == budgets
        assert (told.entries, told.full_entries, told.share) == (entries, 240, entries / 240)
        assert told.nbytes == entries * 2 * 16 * 4, "keys and values of 16 float32 numbers"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_of_the_models_dtype(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    told = headkv.FullCache().explain(model, 10)
    with torch.no_grad():
        cache = model(torch.zeros(1, 10, dtype=torch.int64)).past_key_values
    assert told.nbytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


METHODS: dict[str, Any] = {
    "full": headkv.FullCache(),
    "snap": headkv.SnapKV(0.3, SCORER),
    "pyramid": headkv.PyramidKV(12, beta=3, scorer=SCORER),
    "ada": headkv.AdaKV(0.3, SCORER),
    "ada-pyramid": headkv.AdaKV(0.3, SCORER, pyramid=True),
    "ada-model": headkv.AdaKV(0.3, SCORER, scope="model"),
    "head": headkv.HeadKV(0.3, profile(layers=3, heads=4), scorer=SCORER),
    "duo": headkv.DuoAttention(GATES, 0.5, sinks=2, recent=5),
    "razor": headkv.RazorAttention(ECHO, INDUCTION, sinks=1, min_recent=6, window_share=0.1),
    "random": headkv.RandomHeads(0.5, sinks=2, recent=4),
    "streaming": headkv.StreamingLLM(9, sinks=2),
    "kvzip": headkv.KVzip(0.3, KVzipScorer(window=4)),
    "defensive": headkv.DefensiveKV(0.3, DefensiveScorer(window=4)),
    "critical": headkv.CriticalKV(0.3, SCORER),
    "critical-ada": headkv.CriticalKV(0.3, SCORER, adaptive=True),
}
BY_SCORES = set(METHODS) - {"full", "duo", "razor", "random", "streaming"}
FOLLOW = {"ada", "ada-pyramid", "ada-model", "kvzip", "defensive", "critical-ada"}
ALL_LAYERS = {"ada-model", "kvzip"}
OF_WEIGHTS = {"defensive", "critical", "critical-ada"}  # a prefill made by hand has no output projection


def stored(cache: Any) -> Tensor:
    """Entries `[layers, H]`, one more where an entry stands for dropped ones."""
    counts = []
    for layer in cache.layers:
        ragged = layer.filled()
        folded = 0 if ragged.count is None else (ragged.count > 0).view(1, -1)
        counts.append((ragged.lengths() + folded)[0])
    return torch.stack(counts)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-sliding", "gemma2", "gpt_oss"])
def test_the_cache_stores_what_was_said(family: str, name: str) -> None:
    model, method = tiny_model(family), METHODS[name]
    ids = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(0))
    cache = headkv.RaggedCache.for_model(model, method, rollback=0)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    told, found = method.explain(model, 40), stored(cache)
    if getattr(model.config, "sliding_window", None) and name in BY_SCORES:
        assert told.entries >= int(found.sum()), "an upper bound: what has left the window is not stored"
        assert told.budgets is None or bool((told.budgets >= found).all())
        return
    assert told.entries == int(found.sum())
    assert (told.budgets is None) == (name in FOLLOW)
    assert told.budgets is None or torch.equal(told.budgets, found)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ALL_LAYERS | OF_WEIGHTS])
def test_one_layer_that_was_read(name: str) -> None:
    method = METHODS[name]
    p = prefill(60, heads=2, layer_idx=1, num_layers=3, queries=method.observed_queries)
    keep, told = method.plan(p), method.explain(p)
    folded = 0 if keep.compensate is None else int((keep.compensate & ~keep.mask.all(1)).sum())
    assert told.budgets.shape == (2,) and int(told.budgets.sum()) == told.entries
    assert told.entries == int(keep.mask.sum()) + folded
    assert (told.full_entries, told.entry_nbytes, told.length) == (120, 2 * 16 * 4, 60)


def test_what_has_left_a_sliding_window_does_not_count() -> None:
    told = headkv.SnapKV(30, SCORER).explain(prefill(60, heads=2, queries=4, sliding_window=9))
    kept = headkv.SnapKV(30, SCORER).plan(prefill(60, heads=2, queries=4, sliding_window=9)).mask
    assert torch.equal(told.budgets, kept[:, -8:].sum(1)) and told.entries < 60
    mask = torch.tensor([[True] * 6])
    windowed = Keep(mask, sinks=torch.tensor([2]), recent=torch.tensor([9]))
    assert windowed.stored(4).tolist() == [5], "two sinks, and the three that the next token sees"
    assert Keep(torch.tensor([[True, False, False]])).stored(2).tolist() == [1], "the newest is stored then"


def test_an_allocator_that_says_nothing_may_need_scores() -> None:
    class Mine:
        def allocate(self, scores: Tensor, budget: int, *, layer_idx: int, num_layers: int) -> Tensor:
            return torch.full((scores.shape[0],), budget, dtype=torch.int64)

    told = headkv.ScoredMethod(0.25, SCORER, Mine()).explain(tiny_model("llama"), 40)
    assert told.budgets is None and told.entries == 60
    half = AdaptiveAllocator(1, Mine())
    assert half.needs_scores and not AdaptiveAllocator(1, PyramidAllocator()).needs_scores


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no length": (lambda m: m.explain(tiny_model("llama")), TypeError, "length must be an int of at least 1, got None"),
    "a bool": (lambda m: m.explain(tiny_model("llama"), True), TypeError, "length must be an int of at least 1, got True"),
    "no token": (lambda m: m.explain(tiny_model("llama"), 0), ValueError, "length must be an int of at least 1, got 0"),
    "a word": (lambda m: m.explain("smollm2", 10), TypeError, "prompt must be a Prefill, a transformers model or its configuration, got str"),
    "two lengths": (lambda m: m.explain(prefill(9, heads=2), 9), ValueError, "length must be None with a Prefill, which has its own, got 9"),
    "one of all layers": (lambda m: headkv.AdaKV(5, scope="model").explain(prefill(9)), ValueError, r"prompt must be a model, with a length, .* got the Prefill of one for AdaKV\(5, scope='model'\)"),
    "another model": (lambda m: headkv.DuoAttention(GATES).explain(tiny_model("llama", num_hidden_layers=2), 9), ValueError, "profile must fit the model, 2 layers"),
}  # fmt: skip


@pytest.mark.parametrize("call, error, message", BAD.values(), ids=BAD)
def test_bad_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(headkv.SnapKV(5, SCORER))


# What a person sees.


def test_an_explanation_reads_as_a_line() -> None:
    told = METHODS["head"].explain(tiny_model("llama"), 40)
    assert str(told) == (
        "HeadKV(0.3, <retrieval of random>, scorer=SnapKVScorer(window=4, kernel_size=3)) of 40 tokens: "
        f"{int(told.budgets.min())} to {int(told.budgets.max())} entries a head, 72 in all, 30.0%, 0.0 of 0.0 MB"
    )
    assert repr(told) == f"Explanation({told})" and "\n" not in repr(told)
    assert "the split follows the prompt" in str(METHODS["ada"].explain(tiny_model("llama"), 40))


SMOLLM2 = {
    kind: headkv.HeadProfile.builtin(f"smollm2-{kind}") for kind in ("echo", "induction", "retrieval", "gate")
}
LINES: dict[str, tuple[Any, str]] = {
    "HeadKV": (headkv.HeadKV(0.2, SMOLLM2["retrieval"]), "HeadKV(0.2, <retrieval of SmolLM2-135M-Instruct>)"),
    "DuoAttention": (
        headkv.DuoAttention(SMOLLM2["gate"], sinks=4, streaming_prefill=True),
        "DuoAttention(<gate of SmolLM2-135M-Instruct>, sinks=4, streaming_prefill=True)",
    ),
    "RazorAttention": (
        headkv.RazorAttention(SMOLLM2["echo"], SMOLLM2["induction"], window_share=1 / 7),
        "RazorAttention(<echo of SmolLM2-135M-Instruct>, <induction of SmolLM2-135M-Instruct>, window_share=0.1429)",
    ),
    "ProfileAllocator": (
        headkv.allocators.ProfileAllocator(SMOLLM2["gate"].scores, temperature=2),
        "ProfileAllocator(<30 x 3>, temperature=2)",
    ),
    "FixedAllocator": (FixedAllocator([[5, 6, 7]] * 30), "FixedAllocator(<30 x 3>)"),
    "a few budgets": (FixedAllocator([5, 6]), "FixedAllocator(((5, 6),))"),
    "Prefill": (prefill(9, heads=2), "Prefill(<4 x 9 x 16>, <2 x 9 x 16>, <2 x 9 x 16>, 0, 4, 0.25)"),
    "Keep": (Keep.all(prefill(9)), "Keep(<3 x 9>)"),
    "HeadProfile": (SMOLLM2["gate"], "HeadProfile(gate of SmolLM2-135M-Instruct: 30 x 3 KV heads, scores 0 to 1)"),
}  # fmt: skip


@pytest.mark.parametrize("thing, line", LINES.values(), ids=LINES)
def test_what_holds_tensors_fits_a_line(thing: Any, line: str) -> None:
    assert repr(thing) == line and len(line) <= 120


def test_error_messages_hold_no_tensors() -> None:
    with pytest.raises(TypeError) as caught:
        headkv.SnapKV(0.2, scorer=SMOLLM2["gate"])  # type: ignore[arg-type]
    assert "got HeadProfile(gate of" in str(caught.value) and "tensor(" not in str(caught.value)
