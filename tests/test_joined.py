"""Projections of one input whose weights are parts of one storage: the same model, with fewer products if compiled."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import headkv
from headkv.integrations import compiled
from headkv.integrations.compiled import compiled_layers
from headkv.integrations.joined import joined_weights, times_moved
from headkv.models.tiny import tiny_model

LAYERS = 3
compiles = pytest.mark.skipif(not compiled.can_compile(), reason="compile_layers needs a newer torch")
builds = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")


def storages(model: nn.Module) -> dict[int, int]:
    """Where weights lie, and how many bytes each place has."""
    found = (parameter.untyped_storage() for parameter in model.parameters())
    return {storage.data_ptr(): storage.nbytes() for storage in found}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_the_model_stays_what_it_was(family: str) -> None:
    """The same parameters with the same values, held once, inside and afterwards; qwen2 has biases."""
    model, ids = tiny_model(family), torch.arange(3, 20)[None]
    own = dict(model.named_parameters())
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places, moves = storages(model), times_moved(model)

    def check() -> None:
        assert {name: id(p) for name, p in model.named_parameters()} == {
            name: id(p) for name, p in own.items()
        }
        state = model.state_dict()
        assert list(state) == list(values)
        assert all(torch.equal(state[name], value) for name, value in values.items())
        assert sum(storages(model).values()) == sum(places.values())
        with torch.no_grad():
            assert torch.equal(model(ids).logits, want)

    with torch.no_grad():
        want = model(ids).logits
    with joined_weights(model) as groups:
        assert groups == 2 * LAYERS
        q, k, v = (getattr(model.model.layers[0].self_attn, f"{name}_proj").weight for name in "qkv")
        assert q.data_ptr() + q.nbytes == k.data_ptr() and k.data_ptr() + k.nbytes == v.data_ptr()
        assert times_moved(model) == moves + 1
        check()
    assert len(storages(model)) == len(places)
    assert times_moved(model) == moves + 2
    check()


@compiles
@builds
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_one_product_for_what_is_joined(family: str) -> None:
    """Four products a compiled layer instead of seven, one compilation for all layers, the same logits."""
    from torch._inductor.utils import run_and_get_code

    model, ids = tiny_model(family), torch.arange(3, 20)[None]
    cache = headkv.RaggedCache.for_model(model, headkv.FullCache())

    def step() -> torch.Tensor:
        cache.restore(saved)
        with compiled_layers(model):
            return model(ids[:, :1], past_key_values=cache).logits

    with torch.no_grad():
        model(ids, past_key_values=cache)
        saved = cache.snapshot()
        want = model(ids[:, :1], past_key_values=cache).logits
        for joined, products in ((False, 7), (True, 4), (False, 7)):
            torch._dynamo.reset()
            if joined:
                with joined_weights(model):
                    got, codes = run_and_get_code(step)
            else:
                got, codes = run_and_get_code(step)
            assert (
                len(re.findall(r"= extern_kernels\.|extern_kernels\.\w*mm\(", "\n".join(codes))) == products
            )
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert all(type(layer.mlp.up_proj) is nn.Linear for layer in model.model.layers)


@compiles
@builds
def test_weights_that_change_inside() -> None:
    """What is written into them stays; a model that moved computes with what it has now."""
    model, ids = tiny_model("llama").float(), torch.arange(3, 20)[None]
    cache = headkv.RaggedCache.for_model(model, headkv.FullCache())
    with torch.no_grad(), joined_weights(model):
        model(ids, past_key_values=cache)
        saved = cache.snapshot()
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
        model.model.layers[1].self_attn.k_proj.weight.data = torch.randn(
            model.model.layers[1].self_attn.k_proj.weight.shape
        )
        want = model(ids[:, :1], past_key_values=cache).logits
        cache.restore(saved)
        with compiled_layers(model):
            got = model(ids[:, :1], past_key_values=cache).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    cache.restore(saved)
    with torch.no_grad():
        assert torch.equal(model(ids[:, :1], past_key_values=cache).logits, want)


class Adapted(nn.Linear):
    """As adapters and quantised weights are: a linear layer that does more."""


def replaced(layer: Any, **options: Any) -> None:
    old = layer.self_attn.k_proj
    layer.self_attn.k_proj = nn.Linear(old.in_features, old.out_features, **{"bias": False} | options)


def hooked(layer: Any) -> None:
    layer.self_attn.q_proj.register_forward_hook(lambda *_: None)


def adapted(layer: Any) -> None:
    layer.self_attn.q_proj.__class__ = Adapted


def wrapped(layer: Any) -> None:  # as accelerate offloads
    layer.self_attn.q_proj.forward = layer.self_attn.q_proj.forward


def tied(layer: Any) -> None:
    layer.self_attn.v_proj.weight = layer.self_attn.k_proj.weight


def sharing(layer: Any) -> None:
    weight = layer.self_attn.k_proj.weight
    weight.data = torch.cat([weight.data, weight.data])[: len(weight)]


def frozen(layer: Any) -> None:
    layer.self_attn.v_proj.weight.requires_grad_(False)


NOT_JOINED = {
    "a hook": hooked,
    "an adapter": adapted,
    "a forward of its own": wrapped,
    "tied": tied,
    "in a storage with others": sharing,
    "not trained as its siblings are": frozen,
    "a bias that its siblings lack": lambda layer: replaced(layer, bias=True),
    "another dtype": lambda layer: replaced(layer, dtype=torch.float64),
    "on no device": lambda layer: replaced(layer, device="meta"),
    "missing": lambda layer: delattr(layer.self_attn, "k_proj"),
}


@pytest.mark.parametrize("change", NOT_JOINED.values(), ids=NOT_JOINED.keys())
def test_what_is_not_joined(change: Callable[[Any], None]) -> None:
    """The attention of one layer; all else is."""
    model = tiny_model("llama")
    change(model.model.layers[1])
    kept = [(p, p.data_ptr()) for p in model.model.layers[1].self_attn.parameters()]
    with joined_weights(model) as groups:
        assert groups == 2 * LAYERS - 1
        assert all(p.data_ptr() == place for p, place in kept)


def test_one_block_at_a_time() -> None:
    """And an error leaves the weights as they were."""
    model = tiny_model("llama")
    places = storages(model)
    with pytest.raises(ZeroDivisionError), joined_weights(model):
        with (
            pytest.raises(RuntimeError, match="joined already: leave that block first"),
            joined_weights(model),
        ):
            pass
        raise ZeroDivisionError
    assert len(storages(model)) == len(places)


@compiles
@builds
def test_what_is_drawn_or_differs_is_computed_twice() -> None:
    """Of equal nodes, the compiler leaves one; of noise and of casts that only look alike, both."""
    from headkv.integrations.once import ONCE

    options = {"post_grad_custom_pre_pass": ONCE, "fallback_random": True}

    @torch.compile(options=options)
    def both(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        noise = torch.rand_like(x), torch.rand_like(x)
        return *noise, F.linear(x, weight).sin(), F.linear(x, weight).cos(), x + 1, x + True, x * 2, x * 2.0

    x, weight = torch.randint(9, (1, 8)).float(), torch.randn(4, 8)
    with torch.no_grad():
        a, b, sin, cos, *_ = both(x, weight)
    assert not torch.equal(a, b)
    want = F.linear(x, weight)
    torch.testing.assert_close((sin, cos), (want.sin(), want.cos()))
