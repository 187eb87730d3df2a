"""Prompts that come with drafts behind them, or in chunks: what is evicted is what it would be of the prompt alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from generation_cases import METHODS, RAZOR, prompts
from masked_oracle import oracle_cache
from transformers import GenerationConfig

import headkv
from headkv.models.tiny import FAMILIES, tiny_model

LENGTH: dict[str, Any] = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
LOGITS: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
MODEL = headkv.AdaKV(budget=20, scope="model")
STREAMING = {
    name: headkv.DuoAttention(profile=METHODS["DuoAttention"].profile, sparsity=0.5, sinks=1, recent=5, streaming_prefill=True)
    for name in ("DuoAttention",)
}  # fmt: skip


def draft(layers: int = 2) -> Any:
    return tiny_model("llama", num_hidden_layers=layers)


# name -> arguments of generate; the window of the scorers is 4, windowed rows can take back 9
DRAFTS: dict[str, Callable[[], dict[str, Any]]] = {
    "lookup": lambda: {"prompt_lookup_num_tokens": 3},
    "more than the window": lambda: {"prompt_lookup_num_tokens": 7},
    "more than rollback": lambda: {"prompt_lookup_num_tokens": 14},
    "a draft model": lambda: {"assistant_model": draft()},
    "the model itself": lambda: {"assistant_model": tiny_model("llama")},
    "its own first layers": lambda: {"assistant_early_exit": 2},
}


def alike(got: Any, want: Any) -> None:
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize("name", [*METHODS, "streaming prefill"])
def test_drafts_change_nothing(name: str, drafts: str) -> None:
    """Tokens and logits are those of greedy decoding under the oracle's mask."""
    method = STREAMING["DuoAttention"] if name == "streaming prefill" else METHODS[name]
    model, inputs = tiny_model("llama"), prompts(1)
    want = model.generate(**inputs, past_key_values=oracle_cache(model, method), **LENGTH, **LOGITS)
    with headkv.compress(model, method, rollback=9, headroom=3) as session:
        got = model.generate(**inputs, **DRAFTS[drafts](), **LENGTH, **LOGITS)
    alike(got, want)
    assert got.past_key_values is session.cache


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_in_families(family: str) -> None:
    model, inputs, method = tiny_model(family), prompts(1), METHODS["AdaKV"]
    want = model.generate(**inputs, past_key_values=oracle_cache(model, method), **LENGTH, **LOGITS)
    with headkv.compress(model, method):
        alike(model.generate(**inputs, prompt_lookup_num_tokens=6, **LENGTH, **LOGITS), want)


@pytest.mark.parametrize("chunked_prefill", [False, True])
@pytest.mark.parametrize("name", ["AdaKV", "DuoAttention"])
def test_drafts_over_a_cache_passed_on(name: str, chunked_prefill: bool) -> None:
    """No block is needed; padding stands before the prompt; nothing is left behind in the cache."""
    model, method = tiny_model("llama"), METHODS[name]
    inputs = {key: x[2:] for key, x in prompts().items()}
    want = model.generate(**inputs, past_key_values=oracle_cache(model, method), **LENGTH, **LOGITS)
    cache = headkv.RaggedCache.for_model(model, method, chunked_prefill=chunked_prefill, rollback=2)
    alike(
        model.generate(**inputs, past_key_values=cache, prompt_lookup_num_tokens=6, **LENGTH, **LOGITS), want
    )
    assert cache.seen == 75 and not any(layer.call.drafts for layer in cache.layers)


def test_drafts_behind_a_prompt_in_chunks() -> None:
    """The first part was read by calls of one's own."""
    model, method, inputs = tiny_model("llama"), METHODS["AdaKV"], prompts(1)
    want = model.generate(**inputs, past_key_values=oracle_cache(model, method), **LENGTH, **LOGITS)
    cache = headkv.RaggedCache.for_model(model, method, chunked_prefill=True)
    with torch.no_grad():
        model(inputs["input_ids"][:, :37], past_key_values=cache)
    alike(
        model.generate(**inputs, past_key_values=cache, prompt_lookup_num_tokens=6, **LENGTH, **LOGITS), want
    )


def test_logits_of_more_tokens_are_no_drafts() -> None:
    """A call of one's own that asks for some logits reads a prompt like any other."""
    model, ids = tiny_model("llama"), prompts(1)["input_ids"]
    lengths = []
    for keep in (1, 9):
        cache = headkv.RaggedCache.for_model(model, METHODS["AdaKV"])
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        lengths.append(cache.lengths())
    assert torch.equal(*lengths)


def test_drafts_and_a_method_of_the_whole_prompt() -> None:
    model = tiny_model("llama")
    with (
        headkv.compress(model, MODEL),
        pytest.raises(
            ValueError, match="AdaKV decides once the whole prompt is read: drafts must not come with"
        ),
    ):
        model.generate(**prompts(1), prompt_lookup_num_tokens=3, **LENGTH)


# how the option is given -> arguments of generate; the model's own configuration is set by the test
SAID: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "argument": lambda model, size: {"prefill_chunk_size": size, **LENGTH},
    "the model's configuration": lambda model, size: {**LENGTH},
    "a configuration": lambda model, size: {"generation_config": GenerationConfig(prefill_chunk_size=size, pad_token_id=0, **LENGTH)},
    "beams": lambda model, size: {"prefill_chunk_size": size, "num_beams": 2, **LENGTH},
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 9, 59, 60, 100])
@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("explicit", [False, True], ids=["block", "cache passed on"])
@pytest.mark.parametrize("batch", [1, 3], ids="batch {}".format)
def test_chunks_change_nothing(batch: int, explicit: bool, said: str, size: int) -> None:
    """The prompt is compressed as a whole when its last chunk has been read, also where that is a single token."""
    model, method, inputs = tiny_model("llama"), METHODS["AdaKV"], prompts(batch)
    beams = {"num_beams": 2} if said == "beams" else {}
    reference = headkv.RaggedCache.for_model(model, method)
    want = model.generate(**inputs, past_key_values=reference, **LENGTH, **beams)
    if said == "the model's configuration":
        model.generation_config.prefill_chunk_size = size
    if explicit:
        cache = headkv.RaggedCache.for_model(model, method)
        got = model.generate(**inputs, past_key_values=cache, **SAID[said](model, size))
    else:
        with headkv.compress(model, method) as session:
            got = model.generate(**inputs, **SAID[said](model, size))
        cache = session.cache
    assert torch.equal(got, want)
    assert torch.equal(cache.lengths(), reference.lengths())


@pytest.mark.parametrize("name", [*METHODS, "model", "streaming prefill"])
def test_methods_read_chunks(name: str) -> None:
    """Those that stream while they read need no look at the whole prompt; those that look at it all wait for its end."""
    methods = {**METHODS, "model": MODEL, "streaming prefill": STREAMING["DuoAttention"]}
    model, method, inputs = tiny_model("llama"), methods[name], prompts(1)
    with headkv.compress(model, method, chunked_prefill=name == "streaming prefill") as session:
        model(**inputs) if name != "streaming prefill" else [
            model(x, past_key_values=session._cache) for x in inputs["input_ids"].split(9, 1)
        ]
        session.cache.finalize_prefill()
        want = session.cache.lengths()
    with headkv.compress(model, method) as session:
        model.generate(**inputs, max_new_tokens=1, prefill_chunk_size=9)
    assert torch.equal(session.cache.lengths(), want)
    assert session.cache.seen == 60


def test_chunks_of_a_later_turn_are_stored_whole() -> None:
    model, inputs = tiny_model("llama"), prompts(1)
    more = torch.cat([inputs["input_ids"], prompts(1)["input_ids"][:, :40].flip(1)], 1)
    with headkv.compress(model, METHODS["AdaKV"]) as session:
        cache = model(**inputs).past_key_values
        before = cache.lengths()
        model.generate(more, past_key_values=cache, max_new_tokens=1)
        want = cache.lengths()
        assert torch.equal(want, before + 40)
        cache = model(**inputs).past_key_values
        model.generate(more, past_key_values=cache, max_new_tokens=1, prefill_chunk_size=9)
    assert torch.equal(session.cache.lengths(), want)


def test_a_method_that_must_know_the_length() -> None:
    """As with `chunked_prefill=True`."""
    model = tiny_model("llama")
    razor = headkv.RazorAttention(
        echo=RAZOR.echo, induction=RAZOR.induction, window_share=0.2, streaming_prefill=True
    )
    with headkv.compress(model, razor), pytest.raises(ValueError, match="chunk|length"):
        model.generate(**prompts(1), max_new_tokens=2, prefill_chunk_size=9)


def test_positions_of_ones_own_are_no_chunks() -> None:
    """A piece of a longer tensor of positions, in a call of one's own, is read and compressed at once."""
    model, ids = tiny_model("llama"), prompts(1)["input_ids"]
    cache = headkv.RaggedCache.for_model(model, METHODS["AdaKV"])
    model(ids, past_key_values=cache, position_ids=torch.arange(100)[None, :60])
    assert int(cache.lengths().float().mean()) == 30


def test_memory_of_chunks_goes_back() -> None:
    """Compressed when the last chunk is read: nothing of the prompt waits for the first single token."""
    model, inputs = tiny_model("llama"), prompts(1)
    with headkv.compress(
        model, headkv.AdaKV(budget=6, scorer=METHODS["AdaKV"].scorer), headroom=0
    ) as session:
        model.generate(**inputs, max_new_tokens=1, prefill_chunk_size=9)
        chunked = session.cache.nbytes
        model.generate(**inputs, max_new_tokens=1)
    assert chunked == session.cache.nbytes
