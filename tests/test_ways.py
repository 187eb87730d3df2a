"""The table of ways: how it generates x how a cache is given x what wraps the model x what is evicted.

Each cell is the masked full cache's text and logits, or an error that names what is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from generation_cases import METHODS, prompts
from masked_oracle import oracle_cache
from test_huggingface_wrappers import compiled, lora
from transformers import DynamicCache

import headkv
from headkv.models.tiny import tiny_model

LENGTH: dict[str, Any] = {
    "max_new_tokens": 5,
    "min_new_tokens": 5,
    "output_logits": True,
    "return_dict_in_generate": True,
}

# how it generates -> sequences, arguments of generate
MODES: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy": (2, {}),
    "sampling": (2, {"do_sample": True, "top_k": 20}),
    "beams": (2, {"num_beams": 2}),
    "chunks": (2, {"prefill_chunk_size": 7}),
    "lookup": (1, {"prompt_lookup_num_tokens": 3}),
    "draft model": (1, {"assistant_model": None}),
}
DRAFTS = ("lookup", "draft model")
CHOSEN = {
    "FullCache": METHODS["FullCache"],
    "AdaKV": METHODS["AdaKV"],
    "DuoAttention": METHODS["DuoAttention"],
    "AdaKV, all layers": headkv.AdaKV(budget=0.5, scorer=METHODS["AdaKV"].scorer, scope="model"),
}


def dispatched(model: Any) -> Any:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    return accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "none": lambda model: model,
    "peft": lora,
    "torch.compile": compiled,
    "accelerate": dispatched,
}


def filled(model: Any) -> DynamicCache:
    return model(prompts(1, 10)["input_ids"], use_cache=True).past_key_values


# how a cache is given -> whether in a block, arguments of generate, what the error names
GIVEN: dict[str, tuple[bool, Callable[[Any, Any], dict[str, Any]], str | None]] = {
    "none": (True, lambda model, method: {}, None),
    "one's own": (True, lambda model, method: {"past_key_values": DynamicCache(config=model.config)}, None),
    "one's own, bare": (True, lambda model, method: {"past_key_values": DynamicCache()}, None),
    "ragged, no block": (False, lambda model, method: {"past_key_values": headkv.RaggedCache.for_model(model, method)}, None),
    "ragged, in a block": (True, lambda model, method: {"past_key_values": headkv.RaggedCache.for_model(model, method)}, None),
    "static": (True, lambda model, method: {"cache_implementation": "static"}, "[Ss]tatic"),
    "filled": (True, lambda model, method: {"past_key_values": filled(model)}, "a filled DynamicCache"),
    "refused": (True, lambda model, method: {"use_cache": False}, "cache"),
}  # fmt: skip

CORNERS = ("none", "one's own", "ragged, no block", "filled")


@cache
def model_in(wrapper: str) -> Any:
    """One model serves all cells: each leaves it as it was."""
    return WRAPPERS[wrapper](tiny_model("llama"))


@cache
def oracle(tuned: bool, mode: str, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and logits of a full cache with a mask; chunks and drafts change nothing."""
    model = tiny_model("llama")
    inner = lora(model).get_base_model() if tuned else model
    return generated(inner, mode, plain=True, past_key_values=oracle_cache(inner, CHOSEN[name]))


def generated(model: Any, mode: str, plain: bool = False, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, arguments = MODES[mode]
    arguments = {} if plain and mode in (*DRAFTS, "chunks") else dict(arguments)
    if "assistant_model" in arguments:
        arguments["assistant_model"] = tiny_model("llama", num_hidden_layers=2)
    torch.manual_seed(3)
    out = model.generate(**prompts(batch, 24), **{"do_sample": False, **LENGTH, **arguments}, **given)
    return out.sequences, torch.stack(out.logits)


def cells() -> Iterator[tuple[str, str, str, str]]:
    """All of the table for a model without a wrapper, its corners for the others; what is refused is so for any method."""
    for mode, given, wrapper, name in product(MODES, GIVEN, WRAPPERS, CHOSEN):
        served = GIVEN[given][2] is None
        if wrapper != "none" and (name not in ("AdaKV", "DuoAttention") or given not in CORNERS):
            continue
        if served or name == "AdaKV":
            yield mode, given, wrapper, name


@pytest.mark.parametrize("mode, given, wrapper, name", cells())
def test_every_way(mode: str, given: str, wrapper: str, name: str) -> None:
    model, method = model_in(wrapper), CHOSEN[name]
    in_block, arguments, refused = GIVEN[given]
    if refused is None and mode in DRAFTS and name == "AdaKV, all layers":
        refused = "drafts must not come with the prompt"
    brought = arguments(model, method)  # before the block, where a cache may be filled
    try:
        with headkv.compress(model, method, rollback=9) if in_block else nullcontext():
            check(model, mode, wrapper, name, refused, **brought)
    finally:
        model.set_attn_implementation("sdpa")


def check(model: Any, mode: str, wrapper: str, name: str, refused: str | None, **given: Any) -> None:
    if refused is not None:
        with pytest.raises((ValueError, TypeError), match=refused):
            generated(model, mode, **given)
        return
    tokens, logits = generated(model, mode, **given)
    want, want_logits = oracle(wrapper == "peft", mode, name)
    assert torch.equal(tokens, want)
    torch.testing.assert_close(logits, want_logits, rtol=1e-4, atol=1e-4)
