"""Autocast, mixed dtypes and gradients: as close to the truth as transformers' own cache, or an error that says why not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from generation_cases import METHODS, SCORER, prompts
from torch import Tensor
from transformers import DynamicCache

import headkv
from headkv.models.tiny import FAMILIES, tiny_model

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TURN = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(8))
MODEL = headkv.AdaKV(budget=20, scorer=SCORER, scope="model")


def cast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


@torch.no_grad()
def read(model: Any, cache: Any, casts: tuple[torch.dtype | None, ...]) -> Tensor:
    """Logits of a text read in pieces: the prompt, several tokens, single ones; `casts` are in force one after another."""
    inputs, logits = prompts(), []
    mask = inputs["attention_mask"]
    pieces = [inputs["input_ids"], TURN[:, :4], *TURN[:, 4:].split(1, 1)]
    for i, piece in enumerate(pieces):
        if i:
            mask = torch.cat([mask, torch.ones_like(piece)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -piece.shape[1] :]
        with cast(casts[i % len(casts)]):
            out = model(piece, attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits.append(out.logits[:, -1].double())
    return torch.stack(logits, 1)


# what is in force for one piece after another
CASTS: dict[str, tuple[torch.dtype | None, ...]] = {
    "bfloat16": (BF16,),
    "float16": (FP16,),
    "the prompt alone": (BF16, *[None] * 6),
    "all but the prompt": (None, *[BF16] * 6),
    "in turns": (BF16, None),
    "two kinds": (BF16, FP16, None),
}


@pytest.mark.parametrize("backend", ["reference", "rust"])
@pytest.mark.parametrize("casts", CASTS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_autocast_rounds_as_transformers_does(dtype: torch.dtype, casts: str, backend: Any) -> None:
    """The distance from float32's logits is that of transformers' cache under the coarsest dtype alone, give or take.

    (In turns, transformers' own cache ends in an error of sdpa, with a model of float16.)
    """
    model, kinds = tiny_model("llama").to(dtype).float(), CASTS[casts]
    coarsest = max((kind or dtype for kind in (*kinds, dtype)), key=lambda kind: torch.finfo(kind).eps)
    truth = read(model, DynamicCache(), (None,))
    theirs = (read(model, DynamicCache(), (coarsest,)) - truth).abs()
    model = model.to(dtype)
    cache = headkv.RaggedCache.for_model(model, headkv.FullCache(), backend=backend)
    ours = (read(model, cache, kinds) - truth).abs()
    assert float(ours.max()) <= 1.5 * float(theirs.max())
    assert float(ours.mean()) <= 1.25 * float(theirs.mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation("eager")  # older sdpa leaves softcaps out
    truth = read(model, DynamicCache(), (None,))
    theirs = (read(model, DynamicCache(), (BF16,)) - truth).abs()
    ours = (read(model, headkv.RaggedCache.for_model(model, headkv.FullCache()), (BF16,)) - truth).abs()
    assert float(ours.mean()) <= 1.25 * float(theirs.mean())


@pytest.mark.parametrize("name", [*METHODS, "model"])
def test_methods_under_autocast(name: str) -> None:
    """What is stored is half as large, and each head keeps as many entries as without, within rounding of the scores."""
    model, method = tiny_model("llama"), {**METHODS, "model": MODEL}[name]
    stored = {}
    for dtype in (None, BF16):
        with headkv.compress(model, method, headroom=0) as session, cast(dtype):
            out = model.generate(**prompts(), max_new_tokens=4, eos_token_id=None, do_sample=False)
        assert out.shape == (3, 64)
        stored[dtype] = session.cache.lengths().double()
        kept = {layer.filled().dtype for layer in session.cache.layers}
        assert kept == {FP32 if dtype is None else BF16}
    assert float((stored[BF16].sum() / stored[None].sum() - 1).abs()) < 0.02


@pytest.mark.parametrize("option", [{"prompt_lookup_num_tokens": 6}, {"prefill_chunk_size": 9}], ids=str)
def test_drafts_and_chunks_under_autocast(option: dict[str, Any]) -> None:
    model = tiny_model("llama")
    with headkv.compress(model, headkv.FullCache()) as session, cast(BF16):
        model.generate(**prompts(1), max_new_tokens=8, min_new_tokens=8, do_sample=False, **option)
    assert session.cache.seen == 67 and session.cache.layers[0].filled().dtype == BF16


def test_a_model_that_changes_its_dtype() -> None:
    """A prompt read in float32, and its answer in bfloat16, over one cache."""
    model, ids = tiny_model("llama"), prompts(1)["input_ids"]
    cache = headkv.RaggedCache.for_model(model, headkv.FullCache())
    with torch.no_grad():
        model(ids, past_key_values=cache)
        want = model(ids[:, :1], past_key_values=cache).logits
        cache.crop(-1)
        got = model.to(BF16)(ids[:, :1], past_key_values=cache).logits
    assert got.dtype == BF16 and cache.layers[0].filled().dtype == FP32
    assert float((got - want).abs().max()) < 0.05 * float(want.abs().max())


def test_float64_is_refused() -> None:
    model = tiny_model("llama").double()
    with (
        headkv.compress(model, headkv.FullCache()),
        pytest.raises(TypeError, match="keys must be float32, bfloat16"),
    ):
        model(**prompts(1))
    model = tiny_model("llama")
    cache = headkv.RaggedCache.for_model(model, headkv.FullCache())
    model(**prompts(1), past_key_values=cache)
    with pytest.raises(TypeError, match="keys must be float32, bfloat16 or float16, got torch.float64"):
        model.double()(TURN[:1, :1], past_key_values=cache)


# -- gradients ----------------------------------------------------------------------------------------------------------


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tokens", [9, 1])
@pytest.mark.parametrize("prefix_graph", [False, True], ids=["prefix without", "prefix with"])
@pytest.mark.parametrize("backend", ["reference", "rust"])
def test_gradients_over_a_prefix_are_refused(backend: Any, prefix_graph: bool, tokens: int) -> None:
    """Forward calls without torch.no_grad are inference; the error comes with `backward`."""
    model, ids = tiny_model("llama"), prompts(1)["input_ids"]
    cache = headkv.RaggedCache.for_model(model, headkv.FullCache(), backend=backend)
    with torch.set_grad_enabled(prefix_graph):
        model(ids, past_key_values=cache)
    out = model(TURN[:1, :tokens], past_key_values=cache).logits
    model.set_attn_implementation("eager")
    want = model(torch.cat([ids, TURN[:1, :tokens]], 1)).logits[:, 60:]
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="gradients do not pass through a ragged cache"):
        out.sum().backward()
    assert not any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.model.layers[0].parameters())


def inputs_that_learn(model: Any, cache: Any) -> Tensor:
    """Soft prompts: the weights are frozen, the embeddings are not."""
    model.requires_grad_(False)
    embeddings = model.model.embed_tokens(TURN[:1]).requires_grad_()
    return model(inputs_embeds=embeddings, past_key_values=cache).logits


def one_projection(model: Any, cache: Any) -> Tensor:
    model.requires_grad_(False)
    model.model.layers[1].self_attn.v_proj.weight.requires_grad_()
    return model(TURN[:1], past_key_values=cache).logits


@pytest.mark.parametrize("way", [inputs_that_learn, one_projection])
def test_whatever_requires_a_gradient(way: Callable[[Any, Any], Tensor]) -> None:
    model = tiny_model("llama")
    with headkv.compress(model, METHODS["AdaKV"]), torch.no_grad():
        cache = model(**prompts(1)).past_key_values
    model.set_attn_implementation("headkv")
    with pytest.raises(RuntimeError, match="train over a prefix in a transformers DynamicCache"):
        way(model, cache).sum().backward()


def test_what_needs_none_is_right() -> None:
    """The head alone is trained: its gradient needs nothing of the cache."""
    found = []
    for own in (False, True):
        model = tiny_model("llama").requires_grad_(False)
        model.lm_head.requires_grad_()
        cache = headkv.RaggedCache.for_model(model, headkv.FullCache()) if own else DynamicCache()
        model(**prompts(1), past_key_values=cache)
        model(TURN[:1], past_key_values=cache).logits.logsumexp(-1).sum().backward()
        found.append(weights(model)["lm_head.weight"])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def prompt_gradients(model: Any, method: Any) -> dict[str, Tensor]:
    inputs = prompts()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with nullcontext() if method is None else headkv.compress(model, method):
        out = model(**inputs, labels=labels)
        out.loss.backward()
    layers = [] if method is None else out.past_key_values.layers
    assert not any(layer.filled().keys.requires_grad for layer in layers)
    return weights(model)


@pytest.mark.parametrize("name", ["FullCache", "AdaKV"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3"])
def test_gradients_of_a_prompt_are_right(family: str, name: str) -> None:
    """It is read densely, whatever is stored of it: a loss on one call inside the block trains as outside."""
    want, got = (prompt_gradients(tiny_model(family), method) for method in (None, METHODS[name]))
    for key, gradient in want.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-3, atol=1e-5)


STREAMING = headkv.DuoAttention(
    profile=METHODS["DuoAttention"].profile, sparsity=0.5, sinks=1, recent=5, streaming_prefill=True
)


@pytest.mark.parametrize(
    "family, method",
    [
        ("llama", STREAMING),
        *((family, METHODS["FullCache"]) for family in ("mistral-sliding", "gemma2", "gemma3", "gpt_oss")),
    ],
)
def test_heads_that_stream_or_slide_are_refused(family: str, method: Any) -> None:
    """Reading such a prompt with a graph is no error, training on it is."""
    model = tiny_model(family)
    with headkv.compress(model, method):
        model(**prompts())
        with pytest.raises(RuntimeError, match="nor through heads that stream, slide or have a sink"):
            model(**prompts()).logits.sum().backward()


@pytest.mark.parametrize("tokens", [0, 1, 5], ids="{} tokens over a cache".format)
def test_sinks_are_not_trained(tokens: int) -> None:
    """Nothing but the last layer's sinks asks for a gradient."""
    model, ids = tiny_model("gpt_oss", layer_types=["full_attention"] * 3), prompts(1)["input_ids"]
    model.requires_grad_(False).model.layers[2].self_attn.sinks.requires_grad_()
    with headkv.compress(model, METHODS["FullCache"]):
        out = model(ids, use_cache=True)
        if tokens:
            out = model(ids[:, :tokens], past_key_values=out.past_key_values)
        with pytest.raises(RuntimeError, match="nor through heads that stream, slide or have a sink"):
            out.logits.sum().backward()


@pytest.mark.parametrize("backend", ["reference", "rust"])
def test_attention_of_ones_own_is_refused(backend: Any) -> None:
    """The functions alike: what was stored knows nothing of what made it, and stays without a graph."""
    q, keys, values = (torch.randn(1, heads, 3, 16, requires_grad=True) for heads in (4, 2, 2))
    layer = headkv.RaggedLayer.from_dense(torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16))
    layer.append(keys, values)
    out = headkv.ragged_extend(q, layer, backend=backend)
    step = headkv.ragged_step(q[:, :, 0], keys[:, :, 0], values[:, :, 0], layer, backend=backend)
    decoded = headkv.ragged_decode(q[:, :, 0], layer, backend=backend)
    assert not (layer.keys.requires_grad or layer.values.requires_grad)
    sinks = torch.zeros(4, requires_grad=True)
    sunk = headkv.ragged_extend(q.detach(), layer, sink_logits=sinks, backend=backend)
    for result in (out, step, decoded, sunk):
        with pytest.raises(RuntimeError, match="gradients do not pass through a ragged cache"):
            result.sum().backward()


def test_drafts_with_a_graph() -> None:
    """A loop of one's own outside torch.no_grad keeps no graph in the cache."""
    model = tiny_model("llama")
    cache = headkv.RaggedCache.for_model(model, METHODS["AdaKV"], chunked_prefill=True)
    for piece in prompts(1)["input_ids"].split(17, 1):
        model(piece, past_key_values=cache)
    assert cache.layers[0].observed is not None and not cache.layers[0].observed.queries.requires_grad
    model(TURN[:1, :1], past_key_values=cache)
    for layer in cache.layers:
        assert not (layer.filled().keys.requires_grad or layer.filled().values.requires_grad)
