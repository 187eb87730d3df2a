"""`headkv.score`: the likelihood of continuations behind a compressed prompt, and the word about calls that show none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from generation_cases import METHODS
from masked_oracle import oracle_cache

import headkv
from headkv.models.tiny import FAMILIES, tiny_model

MODEL = headkv.AdaKV(budget=20, scope="model")


def texts(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (n,), generator=generator) for n in lengths]


CONTEXTS, ANSWERS = texts([40, 33, 21]), texts([5, 1, 9], seed=1)


def chances(logits: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1).gather(-1, answer[:, None])[:, 0]


def oracle(model: Any, method: Any, context: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """One text by a full cache with a mask: the context's last token is asked with, not compressed."""
    cache = oracle_cache(model, method)
    ids = torch.cat([context, answer])[None]
    n = len(context) - 1
    model(ids[:, :n], past_key_values=cache, attention_mask=torch.ones(1, n))
    out = []
    for end in range(n + 1, ids.shape[1]):
        step = {"past_key_values": cache, "attention_mask": torch.ones(1, end)}
        out.append(model(ids[:, end - 1 : end], **step).logits[0, -1])
    return chances(torch.stack(out), answer)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_compression_it_is_the_models_own(family: str) -> None:
    """Of a batch with texts of many lengths, what one call over each text alone gives."""
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    want = []
    for context, answer in zip(CONTEXTS, ANSWERS, strict=True):
        logits = model(torch.cat([context, answer])[None, :-1]).logits[0, len(context) - 1 :]
        want.append(chances(logits, answer).sum())
    got = headkv.score(model, headkv.FullCache(), CONTEXTS, ANSWERS)
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-4, atol=1e-3)
    assert model.config._attn_implementation == "eager" and not got.requires_grad


@pytest.mark.parametrize("name", [*METHODS, "model"])
def test_compressed_as_masked(name: str) -> None:
    method = {**METHODS, "model": MODEL}[name]
    got = headkv.score(tiny_model("llama"), method, CONTEXTS, ANSWERS, per_token=True)
    assert got.shape == (3, 9) and got.dtype == torch.float32
    with torch.no_grad():
        for row, context, answer in zip(got, CONTEXTS, ANSWERS, strict=True):
            want = oracle(tiny_model("llama"), method, context, answer)
            torch.testing.assert_close(row[: len(answer)], want, rtol=1e-4, atol=1e-4)
            assert not row[len(answer) :].any()


@pytest.mark.parametrize("family", ["mistral-sliding", "gemma2", "qwen3"])
def test_compressed_families(family: str) -> None:
    method = METHODS["AdaKV"]
    got = headkv.score(tiny_model(family), method, CONTEXTS, ANSWERS)
    with torch.no_grad():
        want = [
            oracle(tiny_model(family), method, c, a).sum() for c, a in zip(CONTEXTS, ANSWERS, strict=True)
        ]
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-4, atol=1e-3)


def test_one_token_shows_compression_too() -> None:
    """The answer of a multiple choice: nothing of it comes out of the dense prefill."""
    model = tiny_model("llama")
    full, few = (
        headkv.score(model, method, CONTEXTS[:1], ANSWERS[1:2])
        for method in (headkv.FullCache(), METHODS["StreamingLLM"])
    )
    assert abs(float(full - few)) > 0.1


def test_ways_to_give_texts() -> None:
    model, method = tiny_model("llama"), METHODS["AdaKV"]
    both = torch.stack([CONTEXTS[0], CONTEXTS[0].flip(0)])
    more = both[:, :4]
    want = headkv.score(model, method, both, more)
    as_lists = headkv.score(model, method, both.tolist(), [row.int() for row in more])
    assert torch.equal(want, as_lists)
    with headkv.compress(model, METHODS["SnapKV"]), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(headkv.score(model, method, both, more), want), "inside a block of another method"


BAD: dict[str, tuple[tuple[Any, Any], type[Exception], str]] = {
    "a string": (("text", ANSWERS), TypeError, r"context must be token ids \[B, n\] or a list of such, got 'text'"),
    "nothing": (([], []), TypeError, r"context must be token ids \[B, n\] or a list of such, got \[\]"),
    "one text": ((CONTEXTS[0], ANSWERS), TypeError, r"context\[0\] must be token ids \[n\], got torch.int64 \[\]"),
    "floats": ((CONTEXTS[:1], [torch.rand(3)]), TypeError, r"continuation\[0\] must be token ids \[n\], got torch.float32 \[3\]"),
    "a short context": (([[5]], [[6]]), ValueError, r"context\[0\] must have at least 2 token\(s\), got 1"),
    "no continuation": (([[5, 6], [5, 6]], [[6], []]), TypeError, r"continuation\[1\] must be token ids"),
    "too few": ((CONTEXTS, ANSWERS[:2]), ValueError, "continuation must be of 3 texts like context, got 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_texts_are_named(name: str) -> None:
    given, error, message = BAD[name]
    model = tiny_model("llama")
    with pytest.raises(error, match=message):
        headkv.score(model, METHODS["AdaKV"], *given)
    assert model.config._attn_implementation == "sdpa"


# The word about a call that shows no compression

IDS = CONTEXTS[0][None]
SCORES: dict[str, Callable[[Any], Any]] = {
    "labels": lambda model: model(IDS, labels=IDS),
    "labels with a cache": lambda model: model(IDS, labels=IDS, use_cache=True),
    "all logits": lambda model: model(IDS),
    "by name": lambda model: model(input_ids=IDS, attention_mask=torch.ones_like(IDS)),
    "embeddings": lambda model: model(inputs_embeds=model.get_input_embeddings()(IDS)),
    "without a cache": lambda model: model(IDS, use_cache=False),
}
NO_SCORES: dict[str, Callable[[Any], Any]] = {
    "a prompt": lambda model: model(IDS, use_cache=True),
    "one logit": lambda model: model(IDS, logits_to_keep=1),
    "a token": lambda model: model(IDS[:, :1]),
    "generate": lambda model: model.generate(IDS, max_new_tokens=2, do_sample=False),
    "beams": lambda model: model.generate(IDS, max_new_tokens=2, num_beams=2),
    "drafts": lambda model: model.generate(IDS, max_new_tokens=4, prompt_lookup_num_tokens=2),
    "labels behind a prompt": lambda model: model(
        IDS, labels=IDS, past_key_values=model(IDS, use_cache=True).past_key_values
    ),
}


@pytest.mark.parametrize("call", SCORES)
def test_a_score_that_shows_nothing_warns_once_a_block(call: str) -> None:
    model = tiny_model("llama")
    for _ in range(2):
        with headkv.compress(model, METHODS["AdaKV"]), pytest.warns(UserWarning) as said:
            for _ in range(2):
                SCORES[call](model)
        assert ["headkv.score(model, method, context" in str(one.message) for one in said] == [True]


@pytest.mark.parametrize("call", NO_SCORES)
def test_other_calls_do_not_warn(call: str) -> None:
    model = tiny_model("llama")
    with warnings.catch_warnings(), headkv.compress(model, METHODS["AdaKV"]):
        warnings.simplefilter("error", UserWarning)
        NO_SCORES[call](model)


def test_blocks_in_which_nothing_is_hidden_do_not_warn() -> None:
    """All is kept, or the calls were announced as parts of a prompt."""
    model = tiny_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with headkv.compress(model, headkv.FullCache()):
            model(IDS, labels=IDS)
        with headkv.compress(model, METHODS["AdaKV"], chunked_prefill=True):
            model(IDS)
