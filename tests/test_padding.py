"""Padding wherever it stands: batches padded on the right, on both sides or in the middle, as transformers reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation_cases import METHODS, prompts
from masked_oracle import oracle_cache

import headkv
from headkv.models.tiny import FAMILIES, tiny_model

LENGTH: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": None, "do_sample": False}
LOGITS: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
# which columns of 40 are padding, for each of three sequences
SIDES: dict[str, list[list[int]]] = {
    "right": [[], [33, 34, 35, 36, 37, 38, 39], [39]],
    "far right": [[], list(range(33, 40)), list(range(20, 40))],
    "one on the left, one on the right": [[], [0, 1, 2, 3], [38, 39]],
    "both sides": [[0, 39], [0, 1, 2, 37, 38, 39], []],
    "middle": [[], [10, 11, 12], [0, 20, 21, 38, 39]],
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "chunks": {"prefill_chunk_size": 9},
}


def padded(side: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 97, (3, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for b, columns in enumerate(SIDES[side]):
        ids[b, columns], mask[b, columns] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: Any, inputs: dict[str, torch.Tensor], cache: Any = None, **options: Any) -> Any:
    return model.generate(**inputs, past_key_values=cache, **LENGTH, **LOGITS, **options)


def alike(got: Any, want: Any) -> None:
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_compression_equals_eager(family: str, side: str) -> None:
    """So do the logits of a forward call, of all tokens that see any."""
    slides = "sliding" in family or "gemma" in family
    if slides and side == "far right":
        pytest.skip(
            "the last padding has all text behind its window of 8: transformers answers what it likes"
        )
    model, inputs = tiny_model(family), padded(side)
    model.set_attn_implementation("eager")
    want, logits = generated(model, inputs), model(**inputs).logits
    sees = inputs["attention_mask"].cumsum(1) > 0
    with headkv.compress(model, headkv.FullCache()):
        alike(generated(model, inputs), want)
        got = model(**inputs).logits
    if not slides:
        torch.testing.assert_close(got[sees], logits[sees], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*METHODS, "streaming prefill"])
def test_right_padding_compressed(name: str, way: str) -> None:
    streams = headkv.DuoAttention(
        profile=METHODS["DuoAttention"].profile, sparsity=0.5, sinks=1, recent=5, streaming_prefill=True
    )
    method = streams if name == "streaming prefill" else METHODS[name]
    model, inputs = tiny_model("llama"), padded("far right")
    options = {key: value for key, value in WAYS[way].items() if key != "prefill_chunk_size"}
    want = generated(model, inputs, oracle_cache(model, method), **options)
    with headkv.compress(model, method, rollback=9, headroom=3):
        alike(generated(model, inputs, **WAYS[way]), want)


@pytest.mark.parametrize("side", ["right", "both sides", "middle"])
@pytest.mark.parametrize("family", ["mistral-sliding", "gemma2"])
@pytest.mark.parametrize("name", ["AdaKV", "DuoAttention"])
def test_padding_and_windows_compressed(name: str, family: str, side: str) -> None:
    model, method, inputs = tiny_model(family), METHODS[name], padded(side)
    want = generated(model, inputs, oracle_cache(model, method))
    with headkv.compress(model, method):
        alike(generated(model, inputs), want)


def test_a_second_turn_padded_on_the_right() -> None:
    model, method, inputs = tiny_model("llama"), METHODS["AdaKV"], prompts()
    turn = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(8))
    turn_mask = torch.ones_like(turn)
    turn_mask[1, 4:] = 0
    logits = []
    for cache in (oracle_cache(model, method), None):
        cache = headkv.RaggedCache.for_model(model, method) if cache is None else cache
        first = model.generate(**inputs, past_key_values=cache, **LENGTH)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 4, dtype=torch.long), turn_mask], 1)
        both = {"input_ids": torch.cat([first, turn], 1), "attention_mask": mask}
        logits.append(torch.stack(generated(model, both, cache).logits))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


def test_training_on_a_batch_padded_on_the_right() -> None:
    """The gradients of the default; what padding is asked for counts too."""
    inputs, grads = padded("far right"), []
    for inside in (False, True):
        model = tiny_model("llama")
        if inside:
            with headkv.compress(model, METHODS["AdaKV"]):
                model(**inputs, labels=inputs["input_ids"]).loss.backward()
        else:
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append([weight.grad for weight in model.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)
