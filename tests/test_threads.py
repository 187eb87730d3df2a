"""Several threads and one model: each gets what it would get alone, or a clear error."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from generation_cases import METHODS

import headkv
from headkv.models.tiny import tiny_model

LENGTH: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
TEXTS = [torch.randint(3, 97, (1, n), generator=torch.Generator().manual_seed(n)) for n in (40, 33, 24, 37)]


def together(work: Callable[[int], Any]) -> list[Any]:
    """`work(i)` of four threads that begin at the same moment; an error is a result."""
    start = threading.Barrier(len(TEXTS))

    def run(i: int) -> Any:
        start.wait()
        try:
            return work(i)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(TEXTS)) as pool:
        return list(pool.map(run, range(len(TEXTS))))


def alone(model: Any, method: Any) -> list[torch.Tensor]:
    with headkv.compress(model, method):
        return [model.generate(text, **LENGTH) for text in TEXTS]


def test_blocks_of_their_own_models() -> None:
    models = [tiny_model("llama", seed=i) for i in range(len(TEXTS))]
    want = [alone(model, METHODS["AdaKV"])[i] for i, model in enumerate(models)]

    def work(i: int) -> Any:
        with headkv.compress(models[i], METHODS["AdaKV"]):
            return models[i].generate(TEXTS[i], **LENGTH)

    for got, text in zip(together(work), want, strict=True):
        assert torch.equal(got, text)


def test_overlapping_blocks_of_one_model() -> None:
    """One is entered at a time; the model comes back as it was."""
    model = tiny_model("llama")
    names = ["AdaKV", "SnapKV", "DuoAttention", "FullCache"]
    want = [alone(model, METHODS[name])[i] for i, name in enumerate(names)]

    def work(i: int) -> Any:
        with headkv.compress(model, METHODS[names[i]]):
            return model.generate(TEXTS[i], **LENGTH)

    served = 0
    for _ in range(3):
        for got, text in zip(together(work), want, strict=True):
            if isinstance(got, Exception):
                assert isinstance(got, RuntimeError) and "another headkv.compress block" in str(got)
            else:
                served += 1
                assert torch.equal(got, text)
        assert model.config._attn_implementation == "sdpa" and not model._forward_pre_hooks
    assert served >= 3


@pytest.mark.parametrize("name", ["AdaKV", "model"])
def test_one_block_and_many_threads(name: str) -> None:
    """As with a streamer, where another thread generates: every call has a cache of its own."""
    model, method = tiny_model("llama"), {**METHODS, "model": headkv.AdaKV(budget=20, scope="model")}[name]
    want = alone(model, method)
    with headkv.compress(model, method):
        for got, text in zip(together(lambda i: model.generate(TEXTS[i], **LENGTH)), want, strict=True):
            assert torch.equal(got, text)


def test_caches_of_their_own_on_one_model() -> None:
    model, method = tiny_model("llama"), METHODS["AdaKV"]
    want = alone(model, method)
    headkv.RaggedCache.for_model(model, method)

    def work(i: int) -> Any:
        cache = headkv.RaggedCache.for_model(model, method)
        return model.generate(TEXTS[i], past_key_values=cache, **LENGTH)

    for got, text in zip(together(work), want, strict=True):
        assert torch.equal(got, text)
