"""What models lay over a causal mask, and what they ask of attention, with a ragged cache and without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from generation_cases import METHODS, prompts
from seeing import seeing_model
from transformers import DynamicCache

import headkv
from headkv.integrations import hook
from headkv.models.tiny import tiny_model

IDS = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))
MASKS = {"none": torch.ones_like(IDS), "left": torch.ones_like(IDS), "right": torch.ones_like(IDS)}
MASKS["left"][1, :5] = 0
MASKS["right"][1, 37:] = 0
LENGTH: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
TEXT = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def seeing(kinds: list[str]) -> Any:
    """Gemma 3 with a vision tower."""
    text = {**TEXT, "sliding_window": 8, "layer_types": [f"{kind}_attention" for kind in kinds]}
    return seeing_model(text, image_token_index=96, boi_token_index=95, eoi_token_index=94)


LAYERS = [["sliding", "sliding", "full"], ["full", "sliding", "full"], ["full", "full", "full"]]


@pytest.mark.parametrize("block", [hook.MASK_BLOCK, 100], ids=["at once", "in blocks"])
@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("kinds", LAYERS, ids="-".join)
def test_a_seeing_model_asked_about_text(
    kinds: list[str], padding: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processor sends token types all the same, all zero: nothing is joined, the mask is causal."""
    monkeypatch.setattr(hook, "MASK_BLOCK", block)
    model = seeing(kinds)
    call = {"input_ids": IDS, "attention_mask": MASKS[padding], "token_type_ids": torch.zeros_like(IDS)}
    want = model.generate(**call, **LENGTH)
    with headkv.compress(model, headkv.FullCache()):
        assert torch.equal(model.generate(**call, **LENGTH), want)


@pytest.mark.parametrize("kinds", LAYERS, ids="-".join)
def test_joined_tokens_are_refused(kinds: list[str]) -> None:
    """An image's tokens see one another in both directions, in full layers too."""
    types = torch.zeros_like(IDS)
    types[0, 4:8] = 1
    model = seeing(kinds)
    with (
        headkv.compress(model, METHODS["AdaKV"]),
        pytest.raises(ValueError, match="attention_mask must be causal"),
    ):
        model.generate(IDS, attention_mask=MASKS["none"], token_type_ids=types, **LENGTH)


# how attention is called that has no ragged cache -> logits
BARE: dict[str, Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]] = {
    "no cache": lambda model, inputs: model(**inputs, use_cache=False).logits,
    "a cache of its own": lambda model, inputs: model(**inputs).logits,
    "one of the user's": lambda model, inputs: (
        model(**inputs, past_key_values=DynamicCache(config=model.config)).logits
    ),
    "generate": lambda model, inputs: torch.stack(
        model.generate(**inputs, **LENGTH, output_logits=True, return_dict_in_generate=True).logits
    ),
}


@pytest.mark.parametrize("way", BARE)
@pytest.mark.parametrize("own", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mistral-sliding", "gpt_oss", "llama"])
def test_calls_without_a_ragged_cache(family: str, own: str, way: str) -> None:
    """Attention may stay ours after `for_model`: softcaps and sinks are the model's own, and padding is."""
    if family in ("gemma2", "gpt_oss") and own == "sdpa":
        pytest.skip("transformers has no sdpa for softcaps and sinks")
    model, inputs = tiny_model(family), prompts(3)
    model.set_attn_implementation(own)
    sees = inputs["attention_mask"].bool() if way != "generate" else slice(None)
    with torch.no_grad():
        want = BARE[way](model, inputs)
        headkv.RaggedCache.for_model(model, METHODS["AdaKV"])
        assert model.config._attn_implementation == "headkv"
        torch.testing.assert_close(BARE[way](model, inputs)[sees], want[sees], rtol=1e-4, atol=1e-4)


def test_a_softcap_without_a_cache_inside_a_block() -> None:
    model, inputs = tiny_model("gemma2"), prompts(3)
    sees = inputs["attention_mask"].bool()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want = model(**inputs, use_cache=False).logits
        with headkv.compress(model, headkv.FullCache()):
            torch.testing.assert_close(model(**inputs, use_cache=False).logits[sees], want[sees])
