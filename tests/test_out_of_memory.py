"""Where memory runs out, a layer is as it was: wherever an operator fails, the same call can be made again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from generation_cases import METHODS, prompts
from torch.utils._python_dispatch import TorchDispatchMode

import headkv
from headkv.cache import RaggedLayer, rust
from headkv.cache.mixed import Store, stored_in
from headkv.integrations.graph import DecodeGraph
from headkv.models.tiny import tiny_model

HEADS, DIM = 2, 4


class FailAt(TorchDispatchMode):
    """In place of the operator number `left`: no memory. What writes into tensors that `layer` holds needs none."""

    def __init__(self, left: int, layers: list[RaggedLayer]):
        super().__init__()
        self.left = left
        self.held = {
            t.untyped_storage().data_ptr() for layer in layers for part in layer.parts for t in part._held()
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func._schema.is_mutable and args[0].untyped_storage().data_ptr() in self.held):
            self.left -= 1
            if self.left == -1:
                raise torch.OutOfMemoryError("no memory, says the test")
        return func(*args, **(kwargs or {}))


def filled(n: int = 9, headroom: int = 1, **options: Any) -> RaggedLayer:
    """Two sequences, the second padded; head 1 windowed, and compensating where asked for."""
    keys, values = torch.randn(2, 2, HEADS, n, DIM, generator=torch.Generator().manual_seed(n))
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[1, :3] = False
    return RaggedLayer.from_dense(keys, values, valid=valid, headroom=headroom, **options)


def mixed(**options: Any) -> Store:
    """Of the two heads one in 16 steps, its newest entries as they came, one in 255."""
    return stored_in(filled(**options), ("int4", "int8"), 3)


def tokens(number: int) -> torch.Tensor:
    return torch.randn(2, 2, HEADS, number, DIM, generator=torch.Generator().manual_seed(number))


FOLDS = torch.tensor([[False, True]] * 2)
WINDOW = {"sinks": FOLDS * 1, "recent": FOLDS * 2}
HOLES = torch.rand(2, HEADS, 9, generator=torch.Generator().manual_seed(0)) < 0.5
HOLES[..., -4:] = True
SAVED = filled(12, **WINDOW, compensate=FOLDS).snapshot()

RINGS = {"storage": "int4", "residual_length": 3}

# name -> (a layer, a change that needs memory)
CHANGES: dict[str, tuple[Callable[[], RaggedLayer], Callable[[RaggedLayer], Any]]] = {
    "append": (filled, lambda layer: layer.append(*tokens(1))),
    "append of padding": (filled, lambda layer: layer.append(*tokens(3), torch.tensor([[True, False, True]] * 2))),
    "append to larger pools": (filled, lambda layer: layer.append(*tokens(3))),
    "append to larger pools, windowed": (lambda: filled(**WINDOW), lambda layer: layer.append(*tokens(70))),
    "append to larger pools, compensating": (
        lambda: filled(**WINDOW, compensate=FOLDS),
        lambda layer: layer.append(*tokens(70)),
    ),
    "append to trimmed windows": (
        lambda: filled(sinks=1, recent=2, headroom=2),
        lambda layer: layer.append(*tokens(3)),
    ),
    "append to trimmed windows, compensating": (
        lambda: filled(sinks=1, recent=2, headroom=2, compensate=FOLDS | True),
        lambda layer: layer.append(*tokens(3)),
    ),
    "append to rings": (lambda: filled(**RINGS), lambda layer: layer.append(*tokens(1))),
    "append of padding to rings": (
        lambda: filled(headroom=4, **RINGS),
        lambda layer: layer.append(*tokens(3), torch.tensor([[True, False, True]] * 2)),
    ),
    "append to rings of trimmed windows": (
        lambda: filled(sinks=1, recent=2, headroom=2, **RINGS),
        lambda layer: layer.append(*tokens(3)),
    ),
    "evict from rings": (lambda: filled(**RINGS), lambda layer: layer.evict(HOLES)),
    "quantise": (filled, lambda layer: layer.quantise("int4", 3)),
    "reserve": (lambda: filled(**WINDOW, compensate=FOLDS), lambda layer: layer.reserve(100)),
    "evict": (filled, lambda layer: layer.evict(HOLES)),
    "evict, then windowed and compensating": (
        filled,
        lambda layer: layer.evict(HOLES, **WINDOW, compensate=FOLDS),
    ),
    "evict, compensating before": (
        lambda: filled(**WINDOW, compensate=FOLDS),
        lambda layer: layer.evict(HOLES, sinks=2, recent=3),
    ),
    "set_windows": (filled, lambda layer: layer.set_windows(FOLDS * 1, FOLDS * 3)),
    "crop": (filled, lambda layer: layer.crop(2)),
    "reorder": (lambda: filled(**WINDOW, compensate=FOLDS), lambda layer: layer.reorder(torch.tensor([1, 1, 0]))),
    "restore": (filled, lambda layer: layer.restore(SAVED)),
    "to parts": (filled, lambda layer: stored_in(layer, ("int4", "int8"), 3)),
    "append to parts": (mixed, lambda layer: layer.append(*tokens(1))),
    "append to larger parts": (lambda: mixed(**WINDOW, compensate=FOLDS), lambda layer: layer.append(*tokens(70))),
    "evict from parts": (lambda: mixed(**WINDOW, compensate=FOLDS), lambda layer: layer.evict(HOLES, sinks=2, recent=3)),
    "reorder parts": (mixed, lambda layer: layer.reorder(torch.tensor([1, 1, 0]))),
}  # fmt: skip


def state(layer: Store) -> list[Any]:
    """What a layer says to the outside: not where its rows lie, nor what their free slots hold."""
    rows = [layer.row(b, h) for b in range(layer.batch_size) for h in range(layer.num_kv_heads)]
    names = ("evicted_end", "sinks", "recent", "key_sum", "value_sum", "count")
    tensors = (getattr(part, name) for part in layer.parts for name in names)
    return [layer.seen, layer.rollback, layer.batch_size, *tensors, *(t for row in rows for t in row)]


def equal(a: list[Any], b: list[Any]) -> bool:
    same = (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))
    return len(a) == len(b) and all(same)


def is_sound(layer: Store) -> bool:
    return all(part.seen == layer.seen and rows_are_sound(part) for part in layer.parts)


def rows_are_sound(layer: RaggedLayer) -> bool:
    room, ends = layer.capacity - layer.length, layer.start + layer.capacity
    inside = bool((room >= 0).all() and (ends[:-1] <= layer.start[1:]).all()) and int(ends[-1]) <= len(
        layer.keys
    )
    return (
        inside
        and layer._free <= int(room.min())
        and len(layer.keys) == len(layer.values) == len(layer.positions)
    )


@pytest.mark.parametrize("backend", ["rust", "torch"])
@pytest.mark.parametrize("make, change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_is_all_or_nothing(make, change, backend, monkeypatch):
    """For every operator that may fail: what the layer stores is unchanged, and the change can be made again.

    Making room is a change of its own: a token that is not stored after it leaves the windows trimmed.
    """
    if backend == "torch":
        monkeypatch.setattr(rust, "available", lambda: False)
    reserve, roomy, made = RaggedLayer.reserve, [], make()
    monkeypatch.setattr(RaggedLayer, "reserve", lambda self, n: (reserve(self, n), roomy.append(state(made))))
    change(made)
    monkeypatch.undo()
    if backend == "torch":
        monkeypatch.setattr(rust, "available", lambda: False)
    want, allowed = state(made), [state(make()), *roomy]
    # Of several parts the operators are many, and much alike.
    for k in range(0, 1000, 1 if isinstance(made, RaggedLayer) else 7):
        layer = make()
        try:
            with FailAt(k, [layer]):
                change(layer)
        except torch.OutOfMemoryError:
            assert any(equal(state(layer), before) for before in allowed) and is_sound(layer), k
            change(layer)
            assert equal(state(layer), want) and is_sound(layer), k
        else:
            break
    assert 1 < k < 1000
    assert equal(state(layer), want)


def feed(model: Any, cache: headkv.RaggedCache, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, past_key_values=cache).logits[:, -1:].clone()


def test_a_failed_step_is_cropped_away(monkeypatch):
    """Layers before the one that fails have the token, the others do not; the next call says so."""
    model, ids, rewrite = tiny_model("llama"), prompts(2)["input_ids"], RaggedLayer._rewrite
    for name in ("FullCache", "AdaKV", "DuoAttention", "RazorAttention"):
        want, token = [], ids[:, -1:]
        cache = headkv.RaggedCache.for_model(model, METHODS[name], headroom=0, rollback=0)
        feed(model, cache, ids)
        saved = cache.snapshot()
        want = [feed(model, cache, ids[:, i : i + 1]) for i in range(3)]
        for failing, layer in enumerate(cache.layers):
            cache.restore(saved)
            n, broken = cache.seen, cache.layers[failing].ragged

            def full(self, *args, broken=broken):
                if self is broken:
                    raise torch.OutOfMemoryError
                rewrite(self, *args)

            with monkeypatch.context() as patch:
                patch.setattr(RaggedLayer, "_rewrite", full)
                with pytest.raises(torch.OutOfMemoryError):
                    feed(model, cache, token)
            if failing:
                with pytest.raises(
                    RuntimeError, match=rf"seen {n} to {n + 1} tokens; call cache.crop\({n}\)"
                ):
                    feed(model, cache, token)
            assert layer.get_seq_length() == n
            cache.crop(n)
            for i in range(3):
                torch.testing.assert_close(
                    feed(model, cache, ids[:, i : i + 1]), want[i], rtol=1e-5, atol=1e-5
                )


def test_wherever_a_step_fails(monkeypatch):
    """At any operator of the model: `crop` to the tokens seen before, and the step can be repeated."""
    model, ids = tiny_model("llama"), prompts(1)["input_ids"]
    cache = headkv.RaggedCache.for_model(model, METHODS["RazorAttention"], headroom=0)
    feed(model, cache, ids)
    saved, n = cache.snapshot(), cache.seen
    want, failures = feed(model, cache, ids[:, -1:]), 0
    for k in range(0, 10000, 11):
        cache.restore(saved)
        try:
            with FailAt(k, [layer.filled() for layer in cache.layers]):
                feed(model, cache, ids[:, -1:])
        except torch.OutOfMemoryError:
            failures += 1
            cache.crop(n)
            torch.testing.assert_close(feed(model, cache, ids[:, -1:]), want, rtol=1e-5, atol=1e-5)
        else:
            break
    assert failures > 20


@pytest.mark.parametrize("chunked", [False, True])
def test_a_failed_prompt(chunked, monkeypatch):
    """In the first layer nothing has happened; after it the next call asks for a reset."""
    model, ids = tiny_model("llama"), prompts(1)["input_ids"]
    make = lambda: headkv.RaggedCache.for_model(model, METHODS["AdaKV"], chunked_prefill=chunked)  # noqa: E731
    cache = make()
    want = [feed(model, cache, ids), feed(model, cache, ids[:, -1:])]
    name = "append" if chunked else "from_dense"
    whole = getattr(RaggedLayer, name)
    for failing in range(3):
        cache, calls = make(), []

        def full(*args, failing=failing, calls=calls, **options):
            calls.append(0)
            if len(calls) > failing:
                raise torch.OutOfMemoryError
            return whole(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(RaggedLayer, name, full)
            with pytest.raises(torch.OutOfMemoryError):
                feed(model, cache, ids)
        if failing:
            with pytest.raises(RuntimeError, match=r"seen 0 to 60 tokens; call cache.reset\(\)"):
                feed(model, cache, ids)
            cache.reset()
        assert torch.equal(feed(model, cache, ids), want[0])
        assert torch.equal(feed(model, cache, ids[:, -1:]), want[1])


@contextlib.contextmanager
def no_memory() -> Iterator[None]:
    """Inside, whatever asks for 2 MiB or more of the GPU fails."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    ballast, size = [], 1 << 30
    try:
        while size >= 1 << 21:  # fills what is reserved and free
            try:
                ballast.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                size //= 2
        yield
    finally:
        ballast.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("windowed", [False, True])
def test_a_layer_out_of_gpu_memory(windowed):
    """Really so: the pools of 32 MiB can not grow, and nothing has happened."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, device="cuda", generator=generator).bfloat16()  # noqa: E731
    keys, values = draw(2, 1, 8, 16384, 128)
    window = (
        {"recent": torch.tensor([[0] * 7 + [100]]), "sinks": 4, "headroom": 1}
        if windowed
        else {"headroom": 1}
    )
    layer = RaggedLayer.from_dense(keys, values, **window)
    saved = layer.snapshot()
    steps = [(draw(1, 16, 128), draw(1, 8, 128), draw(1, 8, 128)) for _ in range(4)]
    want = [headkv.ragged_step(*step, layer) for step in steps]
    layer.restore(saved)
    layer.append(*(new[:, :, None] for new in steps[0][1:]))
    before = state(layer)
    with no_memory():
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                headkv.ragged_step(*steps[1], layer)
        with pytest.raises(torch.OutOfMemoryError):
            layer.append(*(new[:, :, None] for new in steps[1][1:]))
        assert layer.seen == 16385
    assert equal(state(layer), before) and is_sound(layer)
    for step, out in zip(steps[1:], want[1:], strict=True):
        torch.testing.assert_close(headkv.ragged_step(*step, layer), out, rtol=0, atol=0)


def large(headroom: int) -> tuple[Any, headkv.RaggedCache, torch.Tensor]:
    """A model of 3 layers whose pools are of 32 MiB each, on the GPU, and its prompt read."""
    shape: dict[str, int] = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
    model = tiny_model("llama", **shape, max_position_embeddings=40000).cuda().eval()
    ids = torch.randint(3, 97, (1, 32768), generator=torch.Generator().manual_seed(0)).cuda()
    cache = headkv.RaggedCache.for_model(model, headkv.FullCache(), headroom=headroom)
    with torch.inference_mode():
        model(ids, past_key_values=cache, logits_to_keep=1)
    return model, cache, ids[:, :8]


@pytest.mark.gpu
@pytest.mark.parametrize("failing", [0, 1])
def test_a_model_out_of_gpu_memory(failing):
    """Decoding goes on once memory is free, as if nothing had been."""
    model, cache, ids = large(headroom=0)
    saved = cache.snapshot()
    want = [feed(model, cache, ids[:, i : i + 1]) for i in range(4)]
    cache.restore(saved)
    for layer in cache.layers[:failing]:
        layer.filled().reserve(1)
    with no_memory(), pytest.raises(torch.OutOfMemoryError):
        feed(model, cache, ids[:, :1])
    assert [layer.get_seq_length() for layer in cache.layers] == [32769] * failing + [32768] * (3 - failing)
    cache.crop(32768)
    for i in range(4):
        assert torch.equal(feed(model, cache, ids[:, i : i + 1]), want[i])


@pytest.mark.gpu
@pytest.mark.parametrize("when", ["growing", "recording"])
def test_a_graph_out_of_gpu_memory(when):
    """No room for the token, or none for the graph: the step is not counted, and can be made again."""
    model, cache, ids = large(headroom=3)
    saved = cache.snapshot()
    want = [feed(model, cache, ids[:, i : i + 1]) for i in range(5)]
    cache.restore(saved)
    graph = DecodeGraph(model, cache)
    got = [graph.step(ids[:, :1]).clone()]
    if when == "growing":
        got += [graph.step(ids[:, i : i + 1]).clone() for i in (1, 2)]
    seen = cache.seen
    with no_memory():
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                graph.step(ids[:, len(got) : len(got) + 1])
    assert [layer.get_seq_length() for layer in cache.layers] == [seen] * 3
    got += [graph.step(ids[:, i : i + 1]).clone() for i in range(len(got), 5)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
