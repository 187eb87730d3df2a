"""A text that outgrows the first length of Phi 3's longrope: transformers leaves the cache out and reads all again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from generation_cases import METHODS
from transformers import DynamicCache

import headkv
from headkv.models.tiny import tiny_model

FIRST = 64  # the length at which the rotary embeddings change
LENGTH: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
LOGITS: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
SCALING = dict(
    rope_type="longrope", short_factor=[1.0] * 8, long_factor=[1.5 + 0.5 * i for i in range(8)],
    rope_theta=10000.0, original_max_position_embeddings=FIRST,
)  # fmt: skip


def longrope() -> Any:
    return tiny_model("phi3", rope_parameters=SCALING, original_max_position_embeddings=FIRST)


def ids(n: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, n), generator=torch.Generator().manual_seed(0))


# how a cache is given -> of a method the cache, made before the block
GIVEN: dict[str, Callable[[Any, Any], Any]] = {
    "none": lambda model, method: None,
    "a ragged one": lambda model, method: headkv.RaggedCache.for_model(model, method),
    "a DynamicCache": lambda model, method: DynamicCache(config=model.config),
}


@pytest.mark.parametrize("n", [58, 64, 70])
@pytest.mark.parametrize("given, block", [*((given, True) for given in GIVEN), ("a ragged one", False)])
def test_a_full_cache_changes_nothing(given: str, block: bool, n: int) -> None:
    """And the cache that was passed is the one that comes back, and holds the text."""
    model, text = longrope(), ids(n, 2)
    want = model.generate(text, **LENGTH, **LOGITS)
    cache = GIVEN[given](model, headkv.FullCache())
    if block:
        with headkv.compress(model, headkv.FullCache()) as session:
            got = model.generate(text, past_key_values=cache, **LENGTH, **LOGITS)
        assert got.past_key_values is session.cache
    else:
        got = model.generate(text, past_key_values=cache, **LENGTH, **LOGITS)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-3, atol=1e-3)
    assert isinstance(got.past_key_values, headkv.RaggedCache) and got.past_key_values.seen == n + 11
    if given == "a ragged one":
        assert got.past_key_values is cache


@pytest.mark.parametrize("name", ["AdaKV", "DuoAttention"])
@pytest.mark.parametrize("n", [58, 70])
def test_what_is_read_again_is_compressed_again(n: int, name: str) -> None:
    """As by a call that brings the text up to there as a prompt."""
    model, method = longrope(), METHODS[name]
    cache = headkv.RaggedCache.for_model(model, method)
    got = model.generate(ids(n), past_key_values=cache, **LENGTH, **LOGITS)
    prompt = max(n, FIRST + 1)
    fresh = headkv.RaggedCache.for_model(model, method)
    with torch.no_grad():
        model(got.sequences[:, :prompt], past_key_values=fresh)
        rest = model(got.sequences[:, prompt:-1], past_key_values=fresh).logits
    want = torch.stack(got.logits)[-rest.shape[1] :, 0]
    torch.testing.assert_close(rest[0], want, rtol=1e-3, atol=1e-3)
    assert torch.equal(cache.lengths(), fresh.lengths())


def test_two_turns() -> None:
    """The second crosses the length at its start."""
    model, text = longrope(), ids(40)
    cache = headkv.RaggedCache.for_model(model, METHODS["AdaKV"])
    first = model.generate(text, past_key_values=cache, **LENGTH)
    both = torch.cat([first, ids(20)], 1)
    out = model.generate(both, past_key_values=cache, **LENGTH, **LOGITS)
    assert out.past_key_values is cache and cache.seen == 83
    with headkv.compress(model, METHODS["AdaKV"]):
        assert torch.equal(out.sequences, model.generate(both, **LENGTH))


def test_other_caches_are_left_alone() -> None:
    """A text that another cache is for, or none of ours, crosses the length."""
    model = longrope()
    want = model.generate(ids(58), **LENGTH)
    kept, crossing = (headkv.RaggedCache.for_model(model, METHODS["AdaKV"]) for _ in range(2))
    with torch.no_grad():
        model(ids(40), past_key_values=kept)
    assert kept.seen == 40
    model.generate(ids(58), past_key_values=crossing, **LENGTH)
    assert torch.equal(model.generate(ids(58), **LENGTH), want), "transformers' own cache"
    assert (kept.seen, crossing.seen) == (40, 69)
    assert int(kept.lengths().float().mean()) == 20


def test_drafts_across_the_length() -> None:
    """Drafts reach the length sooner, in transformers' own cache too."""
    model, text = longrope(), ids(30).repeat(1, 2)
    want = model.generate(text, prompt_lookup_num_tokens=3, **LENGTH)
    cache = headkv.RaggedCache.for_model(model, headkv.FullCache())
    got = model.generate(text, past_key_values=cache, prompt_lookup_num_tokens=3, **LENGTH)
    assert torch.equal(got, want) and cache.seen == 71
