"""Decode steps replayed as a CUDA graph: the same bits as without, whatever `generate` does around them."""

from __future__ import annotations

import shutil
import threading
import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from generation_cases import METHODS, Collect, prompts

import headkv
from headkv.attention.api import choose_backend
from headkv.cache.ragged import Storage
from headkv.integrations import compiled
from headkv.integrations.compiled import compiled_layers, decoder_layers
from headkv.integrations.graph import DecodeGraph
from headkv.integrations.joined import joined_weights
from headkv.models.tiny import FAMILIES, tiny_model

TOKENS = 90
compiles = pytest.mark.skipif(not compiled.can_compile(), reason="compile_layers needs a newer torch")
GREEDY: dict[str, Any] = {
    **{"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None},
    **{"return_dict_in_generate": True, "output_logits": True},
}


def on_gpu(family: str, batch: int = 3) -> tuple[Any, dict[str, torch.Tensor]]:
    model = tiny_model(family)
    if family == "gpt_oss":  # in float32 the experts' default waits for the device
        model.set_experts_implementation("batched_mm")
    return model.cuda().eval(), {name: x.cuda() for name, x in prompts(batch).items()}


def generate(
    model: Any,
    inputs: dict[str, torch.Tensor],
    method: Any,
    graph: bool,
    compile_layers: bool = False,
    storage: Storage = "model",
    residual_length: int = 0,
    **options: Any,
) -> Any:
    torch.manual_seed(3)
    how: dict[str, Any] = {"cuda_graph": graph, "compile_layers": compile_layers}
    how |= {"storage": storage, "residual_length": residual_length}
    with headkv.compress(model, method, **how) as session:
        out = model.generate(**inputs, **{**GREEDY, **options})
    assert "generate" not in vars(model)
    return out, session


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("batch", [1, 3], ids="batch {}".format)
def test_tokens_are_equal(name: str, batch: int) -> None:
    """Batch 3 is padded on the left. Windowed rows are trimmed on the way."""
    model, inputs = on_gpu("llama", batch)
    want, plain = generate(model, inputs, METHODS[name], graph=False)
    got, session = generate(model, inputs, METHODS[name], graph=True)
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        # What leaves a compensating row's window is summed when the row is trimmed, and that happens at other steps.
        bound = 1e-4 if name == "RazorAttention" else 0
        assert float((a - b).abs().max()) <= bound
    assert session.cache.seen == plain.cache.seen
    if name not in ("DuoAttention", "RazorAttention", "StreamingLLM", "RandomHeads"):
        assert torch.equal(session.cache.lengths(), plain.cache.lengths())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "storage, newest", [("int8", 0), ("k8v4", 0), ("int4", 0), ("int8", 64), ("int4", 7)]
)
@pytest.mark.parametrize("name", ["AdaKV", "DuoAttention"])
def test_rows_of_codes(name: str, storage: str, newest: int) -> None:
    """The same bits by a graph as without, and by the kernels."""
    model, inputs = on_gpu("llama")
    how: dict[str, Any] = {"storage": storage, "residual_length": newest}
    outs = [generate(model, inputs, METHODS[name], graph, **how) for graph in (False, True)]
    assert torch.equal(outs[0][0].sequences, outs[1][0].sequences)
    assert all(torch.equal(a, b) for a, b in zip(outs[0][0].logits, outs[1][0].logits, strict=True))
    for layer in outs[1][1].cache.layers:
        assert layer.ragged.residual_length == newest
        assert layer.ragged.storage == storage and choose_backend(layer.ragged) == "triton"


@pytest.mark.gpu
def test_autocast() -> None:
    """A graph holds no weight that autocast cast and lets go: each step may be in a block of its own, or in none."""
    model, inputs = on_gpu("llama")
    with torch.autocast("cuda", torch.bfloat16):
        outs = [generate(model, inputs, METHODS["AdaKV"], graph)[0] for graph in (False, True)]
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert all(torch.equal(a, b) for a, b in zip(outs[0].logits, outs[1].logits, strict=True))
    caches = [headkv.RaggedCache.for_model(model, headkv.FullCache()) for _ in range(2)]
    token = inputs["input_ids"][:, -1:]
    with torch.no_grad():
        for cache in caches:
            model(**inputs, past_key_values=cache)
        graph = DecodeGraph(model, caches[0])
        for i in range(12):
            with torch.autocast("cuda", torch.bfloat16, enabled=i % 6 < 4):
                got = graph.step(token)
                want = model(token, past_key_values=caches[1]).logits
            assert torch.equal(got, want), i


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    model, inputs = on_gpu(family)
    outs = [generate(model, inputs, METHODS["AdaKV"], graph)[0] for graph in (False, True)]
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert all(torch.equal(a, b) for a, b in zip(outs[0].logits, outs[1].logits, strict=True))


@pytest.mark.gpu
def test_sampling_streamer_and_stopping() -> None:
    model, inputs = on_gpu("llama", 1)
    options: dict[str, Any] = {"do_sample": True, "top_k": 20, "max_new_tokens": 40}
    want = generate(model, inputs, METHODS["AdaKV"], False, **options)[0].sequences
    stop = int(want[0, inputs["input_ids"].shape[1] + 20])
    want = generate(model, inputs, METHODS["AdaKV"], False, **{**options, "eos_token_id": stop})[0].sequences
    collected = Collect()
    options |= {"streamer": collected, "eos_token_id": stop}
    got = generate(model, inputs, METHODS["AdaKV"], True, **options)[0].sequences
    assert torch.equal(got, want)
    assert collected.tokens == [*want[0].tolist(), -1] and int(got[0, -1]) == stop


@compiles
@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("batch", [1, 3], ids="batch {}".format)
def test_compiled_layers(family: str, batch: int) -> None:
    """The same logits but for rounding, under `inference_mode` too; the model is left as it was."""
    model, inputs = on_gpu(family, batch)
    want = generate(model, inputs, METHODS["AdaKV"], False, max_new_tokens=12)[0]
    for inference in (False, True):
        with torch.inference_mode(inference):
            options = {"compile_layers": True, "max_new_tokens": 12}
            got = generate(model, inputs, METHODS["AdaKV"], True, **options)[0]
        for a, b in zip(got.logits, want.logits, strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    assert all(layer._compiled_call_impl is None for layer in model.modules())


@compiles
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_layers_are_compiled_only_inside() -> None:
    """One compilation serves all layers; an error leaves none of them compiled."""
    model, ids = tiny_model("llama", num_hidden_layers=5), torch.arange(3, 20)[None]
    cache = headkv.RaggedCache.for_model(model, METHODS["FullCache"])
    with torch.no_grad():
        model(ids, past_key_values=cache)
        saved = cache.snapshot()
        want = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(3)]
        cache.restore(saved)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        config, got = torch._dynamo.config.get_config_copy(), []
        for i in range(3):
            with compiled_layers(model):
                got.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
    assert 0 < torch._dynamo.utils.counters["frames"]["ok"] < 2 * model.config.num_hidden_layers
    assert torch._dynamo.config.get_config_copy() == config
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    with pytest.raises(ZeroDivisionError), compiled_layers(model):
        assert model.model.layers[0]._compiled_call_impl is not None
        raise ZeroDivisionError
    assert all(layer._compiled_call_impl is None for layer in model.modules())


@compiles
def test_blocks_on_two_threads_take_turns() -> None:
    """Whichever ends first: inside the layers are compiled, afterwards they are as they were."""
    model, inside = tiny_model("llama"), []
    both = threading.Barrier(2)

    def block(seconds: float) -> None:
        both.wait()
        with compiled_layers(model):
            time.sleep(seconds)
            inside.append(model.model.layers[0]._compiled_call_impl is not None)

    threads = [threading.Thread(target=block, args=(seconds,)) for seconds in (0.2, 0.05)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == [True, True]
    assert all(layer._compiled_call_impl is None for layer in model.modules())


@compiles
def test_layers_that_can_not_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="compile_layers must be False for Linear"):
        decoder_layers(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compile_layers must be False without cuda_graph=True"):
        headkv.compress(tiny_model("llama"), METHODS["AdaKV"], compile_layers=True)
    monkeypatch.setattr(compiled, "CONFIG", {"an option of a later torch": True})
    with pytest.raises(ValueError, match="compile_layers must be False with torch .*: it needs a newer one"):
        decoder_layers(tiny_model("llama"))


@compiles
@pytest.mark.gpu
@pytest.mark.parametrize("compile_layers", [False, True], ids="compile_layers {}".format)
def test_weights_that_move(compile_layers: bool) -> None:
    """A graph that was recorded reads them where they are now, when projections are joined and when they are not."""
    model, inputs = on_gpu("llama", 1)
    caches = [headkv.RaggedCache.for_model(model, METHODS["AdaKV"]) for _ in range(2)]
    token = inputs["input_ids"][:, -1:]
    with torch.no_grad():
        for cache in caches:
            model(inputs["input_ids"], past_key_values=cache)
    steps = DecodeGraph(model, caches[0], compile_layers=compile_layers)
    bound = 1e-3 if compile_layers else 0
    sizes = {parameter.nbytes for parameter in model.parameters()}
    for joined in (False, True, False):
        with torch.no_grad(), joined_weights(model) if joined else nullcontext():
            for _ in range(5):  # what is freed and read all the same is NaN
                freed = [
                    torch.full((size // 4,), torch.nan, device="cuda") for size in sizes for _ in range(9)
                ]
                got, want = steps.step(token), model(token, past_key_values=caches[1]).logits
                torch.testing.assert_close(got, want, atol=bound, rtol=bound)
                del freed


@compiles
@pytest.mark.gpu
def test_compiled_layers_when_the_mode_changes_and_pools_move() -> None:
    """What was compiled in another mode is of no use in a recording, during which nothing can be compiled."""
    model, inputs = on_gpu("llama", 1)
    ids, outs = inputs["input_ids"], []
    for compile_layers in (False, True):
        cache = headkv.RaggedCache.for_model(model, METHODS["AdaKV"], headroom=0)
        with torch.no_grad():
            model(ids, past_key_values=cache)
        steps = DecodeGraph(model, cache, compile_layers=compile_layers)
        found = []
        for i in range(150):
            with torch.inference_mode(i in (2, 3, 4) or i > 80):
                found.append(steps.step(ids[:, i % 50 : i % 50 + 1]).clone())
        outs.append(torch.cat(found).cpu())
    torch.testing.assert_close(outs[1], outs[0], atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["FullCache", "AdaKV", "DuoAttention"])
def test_the_graph_survives_growth(name: str) -> None:
    """No head room at all: the pools move several times, and the graph is recorded again each time."""
    model, inputs = on_gpu("llama", 1)
    logits = []
    for graph in (False, True):
        cache = headkv.RaggedCache.for_model(model, METHODS[name], headroom=0)
        with torch.inference_mode():
            model(inputs["input_ids"], past_key_values=cache)
        steps = DecodeGraph(model, cache) if graph else None
        token, pools, found = inputs["input_ids"][:, -1:], set(), []
        for _ in range(200):
            if steps is None:
                with torch.inference_mode():
                    out = model(token, past_key_values=cache).logits
            else:
                out = steps.step(token).clone()
                pools.add(cache.layers[0].filled().keys.data_ptr())
            token = out[:, -1:].argmax(-1)
            found.append(out)
        logits.append(torch.cat(found))
    assert len(pools) > 1
    assert torch.equal(logits[0], logits[1])


@pytest.mark.gpu
def test_a_cache_that_changes_between_steps() -> None:
    """A snapshot restored, a second turn: the next step is recorded again where it must be."""
    model, inputs = on_gpu("llama", 1)
    ids = inputs["input_ids"]
    cache = headkv.RaggedCache.for_model(model, METHODS["AdaKV"])
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    steps, token = DecodeGraph(model, cache), ids[:, -1:]
    saved = cache.snapshot()
    first = [steps.step(token).clone() for _ in range(5)]
    cache.restore(saved)
    again = [steps.step(token).clone() for _ in range(5)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with torch.inference_mode():
        model(ids[:, :7], past_key_values=cache)
        saved = cache.snapshot()
        want = model(token, past_key_values=cache).logits.clone()
    cache.restore(saved)
    for _ in range(2):  # without a graph first, as the restored layers are new; then replayed
        assert torch.equal(steps.step(token), want)
        cache.restore(saved)


@pytest.mark.gpu
def test_two_models_on_two_streams() -> None:
    """Nothing is shared: each graph has tickets and memory of its own."""
    pairs = [on_gpu("llama", 1), on_gpu("qwen3", 1)]
    wants = [generate(model, inputs, METHODS["AdaKV"], False)[0].logits for model, inputs in pairs]
    streams, steps, founds = [torch.cuda.Stream() for _ in pairs], [], [[], []]
    tokens = [want[0].argmax(-1)[:, None] for want in wants]
    torch.cuda.synchronize()
    for (model, inputs), stream in zip(pairs, streams, strict=True):
        with torch.cuda.stream(stream), torch.inference_mode():
            cache = headkv.RaggedCache.for_model(model, METHODS["AdaKV"])
            model(inputs["input_ids"], past_key_values=cache)
            steps.append(DecodeGraph(model, cache))
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                out = steps[i].step(tokens[i])
                founds[i].append(out[:, -1].clone())
                tokens[i] = out[:, -1:].argmax(-1)
    torch.cuda.synchronize()
    for found, want in zip(founds, wants, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, want[1:], strict=False))


@pytest.mark.gpu
def test_refuses_what_it_can_not_replay() -> None:
    model, inputs = on_gpu("llama", 1)
    with headkv.compress(model, METHODS["AdaKV"], cuda_graph=True):
        with pytest.raises(ValueError, match="greedy decoding and sampling, got beam"):
            model.generate(**inputs, num_beams=2, max_new_tokens=2)
        with pytest.raises(ValueError, match="assistant_model must be None"):
            model.generate(**inputs, assistant_model=model, max_new_tokens=2)
        with pytest.raises(ValueError, match="output_hidden_states must be False"):
            model.generate(
                **inputs, max_new_tokens=2, output_hidden_states=True, return_dict_in_generate=True
            )
    assert "generate" not in vars(model)
    cache = headkv.RaggedCache.for_model(model, METHODS["AdaKV"])
    with pytest.raises(ValueError, match="cache must hold a prompt, got an empty one"):
        DecodeGraph(model, cache)
    with torch.inference_mode():
        model(inputs["input_ids"], past_key_values=cache)
    with pytest.raises(ValueError, match=r"input_ids must have shape \[1, 1\], got \[1, 2\]"):
        DecodeGraph(model, cache).step(inputs["input_ids"][:, :2])
    with pytest.raises(TypeError, match=r"input_ids must be torch.int64, got torch.float32"):
        DecodeGraph(model, cache).step(inputs["input_ids"][:, :1].float())
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attention implementation 'headkv', got 'sdpa'"):
        DecodeGraph(model, cache)


def test_a_model_on_a_cpu_is_refused() -> None:
    model = tiny_model("llama")
    former = model.config._attn_implementation
    with (
        pytest.raises(ValueError, match="needs a model on one CUDA device, got one on cpu"),
        headkv.compress(model, METHODS["AdaKV"], cuda_graph=True),
    ):
        pass
    assert model.config._attn_implementation == former
    cache = headkv.RaggedCache.for_model(model, METHODS["AdaKV"])
    with pytest.raises(ValueError, match="needs a model on one CUDA device"):
        DecodeGraph(model, cache)
    with pytest.raises(TypeError, match="cache must be a RaggedCache, got NoneType"):
        DecodeGraph(model, None)  # type: ignore[arg-type]
