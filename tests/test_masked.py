"""Masks and fake keys, beside the cache that really evicts: the same answers, nothing saved, and the leak."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import headkv
from headkv.integrations.masked import MaskedCache, fake_key
from headkv.models.tiny import tiny_model

METHODS = {
    "AdaKV": headkv.AdaKV(0.3, headkv.SnapKVScorer(window=4)),
    "SnapKV": headkv.SnapKV(0.3, headkv.SnapKVScorer(window=4)),
    "full": headkv.FullCache(),
}


def ids(n: int) -> Tensor:
    return torch.randint(3, 97, (1, n), generator=torch.Generator().manual_seed(n))


def steps(model: Any, cache: Any, *questions: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(q, past_key_values=cache).logits for q in questions], 1)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("fake_keys", [True, False], ids=["fake keys", "boolean"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_same_answers_different_bills(family: str, name: str, fake_keys: bool) -> None:
    only_full = {"layer_types": ["full_attention"] * 3} if family == "gpt_oss" else {}
    model, method = tiny_model(family, **only_full), METHODS[name]
    ragged, masked = (
        headkv.RaggedCache.for_model(model, method),
        MaskedCache.for_model(model, method, fake_keys=fake_keys),
    )
    new = [ids(20)[:, i : i + 1] for i in range(6)]
    for cache in (ragged, masked):
        steps(model, cache, ids(50))
    assert masked.nbytes == 3 * 2 * 50 * 2 * 16 * 4
    hidden = sum(int(layer.hidden.sum()) for layer in masked.layers)
    assert hidden + int(ragged.lengths().sum()) == 3 * 2 * 50
    torch.testing.assert_close(steps(model, ragged, *new), steps(model, masked, *new), atol=1e-4, rtol=0)
    assert masked.leaked < 1e-6 and masked.nbytes == 3 * 2 * 56 * 2 * 16 * 4
    stored = sum(layer.ragged.lengths().sum() for layer in ragged.layers) * 2 * 16 * 4
    assert stored == masked.nbytes - hidden * 2 * 16 * 4


def test_by_hand() -> None:
    east, north = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    one = fake_key(east[None])
    assert one.tolist() == pytest.approx([-1e5 / 3, 0])
    assert float(one @ north) == 0  # made for the one, it is nothing to a query at 90 degrees
    both = fake_key(torch.stack([east, north]))
    y = torch.tensor([1.5, 1.0])
    torch.testing.assert_close(both, -1e5 * y / 3.25)
    assert max(float(both @ east), float(both @ north)) < -6e4


def test_nearly_opposite_queries_leave_no_room() -> None:
    """At 174 degrees there is a half space, hardly: a weight of exp(-5), where 0 was promised."""
    away = torch.tensor([[1.0, 0.0], [-1.0, 0.1]])
    assert -6 < float((away @ fake_key(away)).max()) < 0
    with pytest.raises(ValueError, match="queries must share a half space, but none was found for 2 of 2"):
        fake_key(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))


@pytest.mark.parametrize("m, low, high", [(4, -1e4, -3e3), (16, -3e3, -1e2), (64, -3, 0), (128, -1, 0)])
def test_trap_the_more_queries_spread_the_more_leaks(m: int, low: float, high: float) -> None:
    """The search asks for signs alone: of 128 queries in 128 dimensions some see the fake key almost as any other."""
    logits = []
    for seed in range(20):
        queries = torch.randn(m, 128, generator=torch.Generator().manual_seed(seed))
        logits.append(float((queries @ fake_key(queries)).max()) / 128**0.5)
    assert low < max(logits) < high


def test_trap_and_beyond_twice_the_dimension_it_fails() -> None:
    for seed in range(3):
        with pytest.raises(ValueError, match="none was found for 300 of 128 dimensions"):
            fake_key(torch.randn(300, 128, generator=torch.Generator().manual_seed(seed)))


def test_trap_a_long_question_leaks_or_fails_where_a_mask_does_not() -> None:
    outcomes = set()
    model, method = tiny_model("llama"), METHODS["AdaKV"]
    ragged = headkv.RaggedCache.for_model(model, method)
    steps(model, ragged, ids(50))
    taken = ragged.snapshot()
    for n in (8, 12, 16, 24, 40):
        ragged.restore(taken)
        truth = steps(model, ragged, ids(n))
        for fake_keys in (True, False):
            cache = MaskedCache.for_model(model, method, fake_keys=fake_keys)
            steps(model, cache, ids(50))
            before = [layer.keys.clone() for layer in cache.layers]
            try:
                error = float((steps(model, cache, ids(n)) - truth).abs().max())
            except ValueError as refused:
                assert fake_keys and "must share a half space" in str(refused)
                outcomes.add("fails")
                continue
            if not fake_keys:
                assert error < 1e-4 and cache.leaked == 0
                continue
            outcomes.add("leaks" if cache.leaked > 1e-3 else "holds")
            assert (error > 1e-3) == (cache.leaked > 1e-3)
            layer, hidden = cache.layers[0], cache.layers[0].hidden
            assert not torch.equal(layer.keys[0, :, :50][hidden], before[0][0][hidden])  # lost
            assert torch.equal(layer.keys[0, :, :50][~hidden], before[0][0][~hidden])
    assert {"leaks", "fails"} <= outcomes


def test_what_it_does_not_serve() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="method must decide layer by layer, got AdaKV"):
        MaskedCache.for_model(model, headkv.AdaKV(0.3, scope="model"))
    with pytest.raises(TypeError, match="fake_keys must be"):
        MaskedCache.for_model(model, METHODS["SnapKV"], fake_keys=1)
    with pytest.raises(TypeError, match="method must be a headkv method"):
        MaskedCache.for_model(model, None)
    cache = MaskedCache.for_model(model, METHODS["SnapKV"])
    assert cache.nbytes == 0
    with pytest.raises(ValueError, match="a MaskedCache serves one sequence without padding, got 2"):
        model(ids(20).expand(2, -1), past_key_values=cache)
