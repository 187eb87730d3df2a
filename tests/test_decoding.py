"""Long generations under a decode budget: against the masked oracle at every step, and bytes that stop growing."""

from __future__ import annotations

import copy

import pytest
import torch
from generation_cases import METHODS, prompts
from masked_oracle import oracle_cache

import headkv
from headkv.integrations.decoding import DecodeBudget
from headkv.models.tiny import tiny_model

BUDGET = DecodeBudget(40, 12)
DECODE = (BUDGET.entries, BUDGET.every, BUDGET.scorer.window, BUDGET.scorer.kernel_size)
WAYS = {
    "greedy": (3, {}),
    "sampling": (3, {"do_sample": True, "top_k": 20, "temperature": 1.5}),
    "beam search": (2, {"num_beams": 3}),
    "beam sampling": (2, {"num_beams": 2, "do_sample": True, "num_return_sequences": 2}),
    "chunked prefill": (3, {"prefill_chunk_size": 9}),
}


def generate(model, way="greedy", cache=None, tokens=70):
    batch, arguments = WAYS[way]
    torch.manual_seed(11)
    out = model.generate(
        **prompts(batch),
        **{"do_sample": False, **arguments},
        past_key_values=cache,
        max_new_tokens=tokens,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits)


def bounded_as_masked(model, method, way="greedy"):
    oracle = oracle_cache(model, method, "prefill_chunk_size" in WAYS[way][1], DECODE)
    tokens, logits = generate(model, way, oracle)
    with headkv.compress(model, method, decode_budget=BUDGET.entries, every=BUDGET.every) as session:
        got_tokens, got_logits = generate(model, way)
    assert torch.equal(got_tokens, tokens)
    torch.testing.assert_close(got_logits, logits, rtol=1e-4, atol=1e-4)
    return session.cache


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["FullCache", "AdaKV", "DuoAttention", "RazorAttention"])
def test_every_step_is_a_masked_full_cache(method, way):
    cache = bounded_as_masked(tiny_model("llama"), METHODS[method], way)
    planned = torch.stack([layer.growth.budgets for layer in cache.layers])
    assert int(planned.max()) > 0
    most = torch.where(planned > 0, planned + 2 * BUDGET.every, cache.seen)
    assert bool((cache.lengths() <= most).all())


@pytest.mark.parametrize("family", ["gemma2", "mistral-sliding", "qwen3", "gpt_oss"])
def test_families(family):
    bounded_as_masked(tiny_model(family), METHODS["AdaKV"])


def test_budgets_follow_the_prompt_and_add_up():
    model, inputs = tiny_model("llama"), prompts(2)
    cache = headkv.RaggedCache.for_model(model, METHODS["HeadKV"], decode_budget=50, every=8)
    model(**inputs, past_key_values=cache)
    kept = cache.lengths().double()
    model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)
    budgets = torch.stack([layer.growth.budgets for layer in cache.layers])
    assert budgets.sum((0, 2)).tolist() == [50 * kept[:, 0].numel()] * 2
    for b in range(2):
        want = 33 + kept[:, b] / kept[:, b].mean() * (50 - 33)
        assert float((budgets[:, b] - want).abs().max()) < 1


def test_bytes_stop_growing():
    """700 tokens: what is stored at the end of each plan's interval is the same, by the allocator's count."""
    model = tiny_model("llama", max_position_embeddings=1024)
    cache = headkv.RaggedCache.for_model(model, headkv.AdaKV(0.5), decode_budget=64, every=50)
    held = []
    with torch.inference_mode():
        model(prompts(1)["input_ids"], past_key_values=cache)
        for step in range(700):
            model(torch.tensor([[3 + step % 90]]), past_key_values=cache)
            held.append(cache.nbytes)
    assert max(held[100:]) == max(held[100:200])
    assert int(cache.lengths().sum()) <= (64 + 50) * cache.lengths().numel()


def test_a_later_turn_is_compressed_too():
    """The next call after a long turn stores no more than the budget and what has come since."""
    model, inputs = tiny_model("llama"), prompts(1)
    turn = torch.randint(3, 97, (1, 90), generator=torch.Generator().manual_seed(3))
    with (
        headkv.compress(model, METHODS["AdaKV"], decode_budget=40, every=16) as session,
        torch.inference_mode(),
    ):
        model(**inputs)
        cache = session.cache
        model(turn, past_key_values=cache)
        before = int(cache.lengths().sum())
        model(torch.tensor([[5]]), past_key_values=cache)
    assert int(cache.lengths().sum()) <= 41 * cache.lengths().numel() < before


def test_copies_and_resets_go_on_by_themselves():
    model, inputs = tiny_model("llama"), prompts(1)
    options = {"decode_budget": 40, "every": 5}

    def go_on(cache, steps):
        return torch.cat([model(torch.tensor([[7 + i]]), past_key_values=cache).logits for i in range(steps)])

    with torch.inference_mode():
        cache = headkv.RaggedCache.for_model(model, METHODS["AdaKV"], **options)
        model(**inputs, past_key_values=cache)
        go_on(cache, 45)
        twin = copy.deepcopy(cache)
        assert torch.equal(go_on(cache, 20), go_on(twin, 20))
        cache.reset()
        model(**inputs, past_key_values=cache)
        again, other = go_on(cache, 50), headkv.RaggedCache.for_model(model, METHODS["AdaKV"], **options)
        model(**inputs, past_key_values=other)
        assert torch.equal(again, go_on(other, 50))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode_budget": 32}, "decode_budget must be an int of at least 33, got 32"),
        ({"decode_budget": 40.0}, "decode_budget must be an int of at least 33, got 40.0"),
        ({"decode_budget": 40, "every": 0}, "every must be an int of at least 1, got 0"),
        ({"every": 10}, "every must be None without a decode_budget, got 10"),
        (
            {"decode_budget": 40, "cuda_graph": True},
            "decode_budget must be None with cuda_graph=True, got 40",
        ),
    ],
)
def test_bad_options(options, message):
    model = tiny_model("llama")
    former = model.config._attn_implementation
    with pytest.raises((TypeError, ValueError), match=message):
        headkv.compress(model, headkv.AdaKV(0.5), **options)
    assert model.config._attn_implementation == former


def test_drafts_are_refused():
    model = tiny_model("llama")
    with (
        headkv.compress(model, METHODS["AdaKV"], decode_budget=40),
        pytest.raises(ValueError, match="decode_budget must be None with drafts"),
    ):
        model.generate(**prompts(1), prompt_lookup_num_tokens=3, max_new_tokens=8, do_sample=False)
