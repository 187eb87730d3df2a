"""A prompt read once: its window attention against transformers', its answers against compressing from the start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import headkv
import headkv.scorers
from headkv.evaluation.compare import step_times
from headkv.evaluation.reading import Reading
from headkv.methods.base import Method
from headkv.models.tiny import tiny_model

SCORER = headkv.SnapKVScorer(window=4, kernel_size=3)
METHODS = {
    "Ada-KV": headkv.AdaKV(0.3, SCORER),
    "SnapKV": headkv.SnapKV(9, SCORER),
    "Ada-KV with a pyramid": headkv.AdaKV(0.3, SCORER, pyramid=True, beta=3),
    "full": headkv.FullCache(),
}


def prompt(length: int, vocabulary: int = 97) -> Tensor:
    return torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(length))


def from_the_start(model: PreTrainedModel, ids: Tensor, method: Method, count: int) -> list[int]:
    """Compress all but the last token, feed that one, go on greedily: nothing of `Reading` is used."""
    former, cache = model.config._attn_implementation, headkv.RaggedCache.for_model(model, method)
    with torch.inference_mode():
        model(ids[:, :-1], past_key_values=cache)
        token, answer = ids[:, -1:], []
        for _ in range(count):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            answer.append(int(token))
    model.set_attn_implementation(former)
    return answer


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-sliding", "gemma2", "gpt_oss"])
@pytest.mark.parametrize(
    ("n", "window"), [(41, 8), (10, 8), (41, 1)], ids=["long", "one earlier", "one query"]
)
def test_window_attention_is_what_transformers_returns(family: str, n: int, window: int) -> None:
    model, ids = tiny_model(family), prompt(n)
    found = Reading(model, ids).window_attention(window)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        weights = torch.stack(model(ids[:, :-1], output_attentions=True).attentions)[:, 0]
    layers, heads, n = weights.shape[:3]
    kv_heads = model.config.num_key_value_heads
    grouped = weights.view(layers, kv_heads, heads // kv_heads, n, n)
    torch.testing.assert_close(found, grouped[..., -window:, : n - window].mean((2, 3)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_answers_are_those_of_compressing_from_the_start(family: str) -> None:
    model, ids = tiny_model(family), prompt(40)
    reading = Reading(model, ids)
    found = {name: reading.answer(method, 6).tolist() for name, method in METHODS.items()}
    assert found == {name: from_the_start(model, ids, method, 6) for name, method in METHODS.items()}
    assert len({tuple(answer) for answer in found.values()}) > 1, "compression changes something"


def test_kept_is_what_the_cache_stores() -> None:
    model, ids = tiny_model("llama"), prompt(40)
    with headkv.compress(model, METHODS["Ada-KV"]) as session, torch.inference_mode():
        model(ids[:, :-1])
    kept = Reading(model, ids).kept(METHODS["Ada-KV"])
    assert torch.equal(kept.sum(-1), session.cache.lengths()[:, 0])
    row = session.cache.layers[1].row(0, 1)
    assert torch.equal(kept[1, 1].nonzero()[:, 0], row.positions.long())


def test_the_model_is_left_as_it_was() -> None:
    model, ids = tiny_model("llama"), prompt(20)
    before, implementation = model(ids).logits, model.config._attn_implementation
    Reading(model, ids).answer(METHODS["SnapKV"])
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("shape", [(2, 20), (20,), (1, 1)], ids=["batch", "no batch", "one token"])
def test_refuses_what_is_not_one_sequence(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"input_ids must have shape \[1, n\] with n at least 2"):
        Reading(tiny_model("llama"), torch.zeros(shape, dtype=torch.int64))


def test_refuses_what_keeps_by_age() -> None:
    with pytest.raises(ValueError, match="method must not have windowed rows"):
        Reading(tiny_model("llama"), prompt(40)).kept(headkv.StreamingLLM(10))


@pytest.mark.parametrize("family", ["mistral-sliding", "gemma3", "gpt_oss"])
def test_layers_with_a_sliding_window_are_compressed_as_from_the_start(family: str) -> None:
    model, ids = tiny_model(family), prompt(40)
    for method in (METHODS["SnapKV"], METHODS["Ada-KV"], headkv.StreamingLLM(9)):
        assert Reading(model, ids).answer(method, 5).tolist() == from_the_start(model, ids, method, 5)


def test_one_reading_serves_methods_of_every_kind() -> None:
    model, ids = tiny_model("llama"), prompt(60)
    reading, before = Reading(model, ids), model.config._attn_implementation
    whole = headkv.KVzip(20, headkv.scorers.KVzipScorer((3, 4), chunk=17, window=5))
    for method in (
        whole,
        headkv.AdaKV(0.4, SCORER, scope="model"),
        headkv.RandomHeads(0.5, sinks=2, recent=7),
        METHODS["SnapKV"],
    ):
        assert reading.answer(method, 6).tolist() == from_the_start(model, ids, method, 6)
        stored = reading.compressed(method).lengths()
        assert int(stored.sum()) < stored.numel() * 59 and reading.cache.seen == 59
    assert model.config._attn_implementation == before


def test_steps_are_timed_in_turns_and_leave_the_reading_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama"), prompt(40)
    reading = Reading(model, ids)
    seen: list[int] = []
    forward = model.forward

    def noted(*args: Any, past_key_values: Any, **kwargs: Any) -> Any:
        seen.append(int(past_key_values.lengths().sum()))
        return forward(*args, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(model, "forward", noted)
    methods = {"full": headkv.FullCache(), "few": headkv.SnapKV(10, headkv.SnapKVScorer(4))}
    stored = [int(reading.compressed(method).lengths().sum()) for method in methods.values()]
    times = step_times(reading, methods, steps=3)
    assert list(times) == list(methods) and min(times.values()) > 0
    rows = reading.kept(methods["full"])[..., 0].numel()
    assert seen == [n + step * rows for step in range(3) for n in stored]
    assert reading.cache.seen == 39
