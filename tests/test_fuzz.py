"""A few random conversations of `make fuzz`, and the faults that it has found."""

from __future__ import annotations

from typing import Any

import fuzz
import pytest
import torch
from generation_cases import METHODS, prompts

import headkv
from headkv.models.tiny import tiny_model

LENGTH: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("seed", range(16))
def test_a_random_conversation(seed: int) -> None:
    fuzz.converse(seed)


def test_every_step_is_checked() -> None:
    """An oracle that sees what was evicted is found out."""
    one = fuzz.Conversation(0)
    one.method = METHODS["SnapKV"]
    one.dtype = torch.float32
    begin = one.begin

    def cheat(stack: Any) -> None:
        begin(stack)
        for layer in one.oracle.layers:
            layer.plan[0] = torch.ones_like(layer.plan[0])
        one.more_text()

    one.begin = cheat  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="not close"):
        one.run()


@pytest.mark.parametrize("method", ["FullCache", "AdaKV"])
def test_drafts_that_are_not_found_do_not_read_the_text_twice(method: str) -> None:
    """Nothing in the text repeats, so that the second turn begins without a draft; assisted decoding sends all of it."""
    model, text = tiny_model("llama"), torch.arange(10, 63)[None]
    told = []
    for options in ({}, {"prompt_lookup_num_tokens": 3}):
        cache = headkv.RaggedCache.for_model(model, METHODS[method])
        model(text[:, :50], past_key_values=cache)
        told.append(model.generate(text, past_key_values=cache, **LENGTH, **options))
        assert cache.seen == 50 + 3 + 4 - 1
    assert torch.equal(*told)


@pytest.mark.parametrize("method", ["FullCache", "StreamingLLM", "RazorAttention"])
def test_drafts_with_the_prompt_are_taken_back_in_sliding_layers(method: str) -> None:
    """Of a sliding layer's prompt the entries are kept that the next token sees, and that is one less than a window."""
    model, inputs = tiny_model("mistral-sliding"), prompts(1, 14)
    told = []
    for options in ({}, {"prompt_lookup_num_tokens": 3}):
        cache = headkv.RaggedCache.for_model(model, METHODS[method], rollback=0)
        told.append(model.generate(**inputs, past_key_values=cache, **LENGTH, **options))
    assert torch.equal(*told)


def test_a_crop_is_done_in_all_layers_or_none() -> None:
    model = tiny_model("llama")
    cache = headkv.RaggedCache.for_model(model, METHODS["DuoAttention"], rollback=0)
    model(**prompts(2), past_key_values=cache)
    before, first, refused = cache.snapshot(), cache.layers[0], 0
    for tokens in range(1, 13):
        for given in (-tokens, 60 - tokens):  # to be taken, or to be kept
            try:
                first.crop(given)
            except ValueError:
                continue
            cache.restore(before)
            try:
                cache.crop(given)
            except ValueError:
                refused += 1
                assert fuzz.equal(cache.snapshot(), before)
            else:
                assert cache.seen == 60 - tokens
            cache.restore(before)
    assert refused  # by a later layer


def test_a_window_that_the_next_token_fills_is_whole() -> None:
    """A crop is refused one token later than that, not one earlier."""
    model, inputs = tiny_model("mistral-sliding"), prompts(1, 30)
    cache, full = (headkv.RaggedCache.for_model(model, METHODS["FullCache"], rollback=4) for _ in range(2))
    model(**inputs, past_key_values=cache)
    cache.crop(-4)
    model(inputs["input_ids"][:, :26], past_key_values=full)
    new = inputs["input_ids"][:, :1]
    got, want = (model(new, past_key_values=c).logits for c in (cache, full))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    model(
        **inputs,
        past_key_values=(cache := headkv.RaggedCache.for_model(model, METHODS["FullCache"], rollback=4)),
    )
    with pytest.raises(ValueError, match="cannot crop 5 tokens"):
        cache.crop(-5)
