"""The usual looks into a cache of transformers: a ragged one answers, or says what to look at instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from generation_cases import METHODS, prompts
from transformers import DynamicCache

import headkv
from headkv.models.tiny import tiny_model

INSTEAD = r"cache\.lengths\(\) says how many; cache\.layers\[i\]\.row\(batch, head\)"

# what is looked at -> what is seen after a prompt of 60 tokens and one more, three sequences
ANSWERED: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "len": (len, 3),
    "get_seq_length": (lambda cache: cache.get_seq_length(), 61),
    "get_seq_length of a layer": (lambda cache: cache.get_seq_length(1), 61),
    "max_batch_size": (lambda cache: cache.max_batch_size, 3),
    "batch_size": (lambda cache: cache.batch_size, 3),
    "is_initialized": (lambda cache: cache.is_initialized, True),
    "is_compileable": (lambda cache: cache.is_compileable, False),
    "is_sliding": (lambda cache: cache.is_sliding, [False] * 3),
    "get_max_length of a layer": (lambda cache: cache.layers[0].get_max_length(), -1),
    "the dtype of a layer": (lambda cache: cache.layers[0].dtype, torch.float32),
    "the device of a layer": (lambda cache: cache.layers[0].device, torch.device("cpu")),
    "hasattr": (lambda cache: hasattr(cache.layers[0], "keys"), False),
    "getattr": (lambda cache: getattr(cache, "key_cache", "none"), "none"),
}
EXPLAINED: dict[str, tuple[Callable[[Any], Any], type[Exception]]] = {
    "keys of a layer": (lambda cache: cache.layers[0].keys.shape, AttributeError),
    "values of a layer": (lambda cache: cache.layers[-1].values.dtype, AttributeError),
    "a pair": (lambda cache: cache[0], TypeError),
    "two indices": (lambda cache: cache[0][1], TypeError),
    "a loop": (lambda cache: [keys for keys, values in cache], TypeError),
    "a tuple": (tuple, TypeError),
    "key_cache": (lambda cache: cache.key_cache[0], AttributeError),
    "value_cache": (lambda cache: cache.value_cache, AttributeError),
    "to_legacy_cache": (lambda cache: cache.to_legacy_cache(), AttributeError),
}


@pytest.fixture(scope="module")
def caches() -> dict[str, Any]:
    model, inputs = tiny_model("llama"), prompts(3)
    own = DynamicCache(config=model.config)
    with headkv.compress(model, METHODS["AdaKV"]) as session:
        model.generate(**inputs, past_key_values=own, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    return {"ragged": session.cache, "own": own}


@pytest.mark.parametrize("look", ANSWERED)
def test_answered(caches: dict[str, Any], look: str) -> None:
    see, want = ANSWERED[look]
    assert see(caches["ragged"]) == want


@pytest.mark.parametrize("look", EXPLAINED)
def test_explained(caches: dict[str, Any], look: str) -> None:
    see, error = EXPLAINED[look]
    with pytest.raises(error, match=INSTEAD):
        see(caches["ragged"])


@pytest.mark.parametrize("look", ["keys of a layer", "values of a layer", "a loop"])
def test_a_cache_of_ones_own_explains_too(caches: dict[str, Any], look: str) -> None:
    with pytest.raises(AttributeError, match=INSTEAD):
        EXPLAINED[look][0](caches["own"])


def test_an_empty_cache() -> None:
    cache = headkv.RaggedCache.for_model(tiny_model("llama"), METHODS["AdaKV"])
    layer = cache.layers[0]
    assert (layer.keys, layer.values, layer.dtype, layer.device) == (None, None, None, None)
    assert (cache.max_batch_size, cache.get_seq_length(), cache.is_initialized) == (-1, 0, False)
    with pytest.raises(AttributeError, match="`keys` of a ragged layer can not be set"):
        layer.keys = torch.zeros(1)
    with pytest.raises(AttributeError, match="'RaggedCache' object has no attribute 'nothing'$"):
        _ = cache.nothing
