"""On any stream, in inference mode, on any of several GPUs, whatever the default device: the same numbers."""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_cases import METHODS, prompts

import headkv
from headkv.cache import RaggedLayer
from headkv.integrations.graph import DecodeGraph
from headkv.integrations.planning import Observation, keep_entries
from headkv.logits import Rule
from headkv.models.tiny import tiny_model

KERNELS = Path(__file__).resolve().parents[1] / "kernels" / "headkv_kernels"
two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"needs two GPUs, torch sees {torch.cuda.device_count()}"
)


class Work:
    """Everything that launches a kernel, over one layer: its inputs on a device, then `outputs`."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32, compensate: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
        self.prompt, self.chunk = draw(2, 2, 3, 300, 64), draw(2, 2, 3, 5, 64)
        self.steps = [(draw(2, 6, 64), draw(2, 3, 64), draw(2, 3, 64)) for _ in range(80)]
        self.queries, self.valid = draw(2, 6, 5, 64), torch.tensor([[True] * 5, [False, True] * 2 + [True]])
        self.valid = self.valid.to(device)
        window = torch.tensor([[0, 20, 20]] * 2)
        self.window: dict[str, Any] = {"sinks": window // 10, "recent": window}
        if compensate:
            self.window["compensate"] = (window > 0).to(device)

    def layer(self) -> RaggedLayer:
        return RaggedLayer.from_dense(*self.prompt, headroom=3, **self.window)

    def outputs(self, layer: RaggedLayer | None = None) -> list[torch.Tensor]:
        """Append, extend, decode and step, past the room that there is."""
        layer = self.layer() if layer is None else layer
        layer.append(*self.chunk, self.valid)
        outs = [headkv.ragged_extend(self.queries, layer), headkv.ragged_decode(self.steps[0][0], layer)]
        outs += [headkv.ragged_step(*step, layer) for step in self.steps]
        return [*outs, layer.keys, layer.values]

    def tensors(self) -> list[torch.Tensor]:
        return [self.prompt, self.chunk, self.queries, *(t for step in self.steps for t in step)]


def assert_equal(got: list[torch.Tensor], want: list[torch.Tensor], bound: float = 0) -> None:
    for a, b in zip(got[:-2], want[:-2], strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=bound, atol=bound)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_side_stream(dtype):
    """The inputs come to be on the side stream, late: what ran on any other would read NaN."""
    work = Work("cuda", dtype, compensate=False)
    want, real = work.outputs(), [t.clone() for t in work.tensors()]
    for tensor in work.tensors():
        tensor.fill_(float("nan"))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        for tensor, number in zip(work.tensors(), real, strict=True):
            tensor.copy_(number)
        got = work.outputs()
        torch.cuda._sleep(10_000_000)
    side.synchronize()
    assert_equal(got, want)


@pytest.mark.gpu
def test_what_another_stream_made_is_not_reused_too_soon():
    """Pools made on the default stream, moved on a side stream: their memory is free only once they were read."""
    keys = torch.randn(1, 8, 1 << 17, 128, device="cuda", dtype=torch.bfloat16)
    layer = RaggedLayer.from_dense(keys, keys, headroom=0)
    torch.cuda.synchronize()
    size, side = layer.keys.shape, torch.cuda.Stream()
    with torch.cuda.stream(side):
        layer.reserve(1)
    taken = [torch.full(size, float("nan"), device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    torch.cuda.synchronize()
    assert all(torch.equal(layer.row(0, h).values, keys[0, h]) for h in range(8)) and taken[0].isnan().all()


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("made, used", [(True, True), (True, False), (False, True)])
def test_inference_mode(made, used, where):
    """A layer made in inference mode and used outside of it, and the other way round."""
    work = Work(where)
    want = work.outputs()
    with torch.inference_mode(made):
        layer = work.layer()
    with torch.inference_mode(used):
        got = work.outputs(layer)
        saved = layer.snapshot()
    with torch.inference_mode(made):
        layer.restore(saved)
        layer.append(*work.chunk)
    assert_equal(got, want, 1e-5)  # a GPU sums what it drops in any order


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_made_on_the_default_device(name):
    """`torch.set_default_device` says where a user's new tensors go, not where headkv's do."""
    q, keys, values = torch.randn(3, 1, 2, 60, 16, generator=torch.Generator().manual_seed(0))
    q = torch.cat([q, q], 1)
    rule = Rule(0.25)
    index = torch.zeros(1, dtype=torch.int64)
    outs = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            observed = Observation.of(q, None, METHODS[name].observed_queries, rule)
            kept = keep_entries(METHODS[name], observed, keys, values, None, layer_idx=0, num_layers=3)
            layer = RaggedLayer.from_dense(keys, values, headroom=0, **kept)
            for backend in ("reference", "rust"):
                outs.append(
                    headkv.ragged_step(q[:, :, 0], keys[:, :, 0], values[:, :, 0], layer, backend=backend)
                )
                layer.append(keys[:, :, :3], values[:, :, :3])
                outs.append(headkv.ragged_extend(q[:, :, :3], layer, backend=backend))
            layer.crop(1)
            layer.reorder(index)
            layer.evict(torch.ones(1, 2, int(layer.length.max()), dtype=torch.bool, device="cpu"))
            outs += [*layer.row(0, 1)]
    half = len(outs) // 2
    assert all(torch.equal(a, b) for a, b in zip(outs[:half], outs[half:], strict=True))


def test_every_launch_is_guarded():
    """`kernel[grid](...)` goes to the current device, so it stands inside `with guard(tensor):`."""
    launches = 0
    for path in KERNELS.glob("*.py"):
        tree = ast.parse(path.read_text())
        device_code = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.decorator_list]
        inside = {
            id(node) for f in device_code for node in ast.walk(f) if "jit" in ast.unparse(f.decorator_list[0])
        }
        guarded = {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.With) and any("guard(" in ast.unparse(item) for item in block.items)
            for node in ast.walk(block)
        }
        for call in ast.walk(tree):
            if (
                not (isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript))
                or id(call) in inside
            ):
                continue
            launches += 1
            assert id(call) in guarded, f"{path.name}:{call.lineno} launches outside of `with guard(...)`"
    assert launches >= 3


def test_the_guard_is_for_the_tensors_device(monkeypatch):
    rows = pytest.importorskip("headkv_kernels.rows", reason="needs Triton: pip install triton")
    entered = []

    class Tensor:
        device, is_cuda = torch.device("cuda:1"), True

    monkeypatch.setattr(
        torch.cuda, "device", lambda device: entered.append(device) or contextlib.nullcontext()
    )
    with rows.guard(Tensor()), rows.guard(torch.zeros(1)):
        assert entered == [torch.device("cuda:1")]


@pytest.mark.gpu
def test_launches_enter_the_guard(monkeypatch):
    """Each of the four, once, with the device of the layer."""
    work, entered = Work("cuda"), []
    layer = work.layer()

    class Noting(torch.cuda.device):
        def __init__(self, device):
            entered.append(device)
            super().__init__(device)

    monkeypatch.setattr(torch.cuda, "device", Noting)
    for call in (
        lambda: layer.append(*work.chunk),
        lambda: headkv.ragged_extend(work.queries, layer),
        lambda: headkv.ragged_decode(work.steps[0][0], layer),
        lambda: headkv.ragged_step(*work.steps[0], layer),
    ):
        entered.clear()
        call()
        assert layer.device in entered


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_gpu_than_the_current_one(dtype):
    """Everything, on GPU 1 while GPU 0 is current; and on both in turn."""
    works = [Work(f"cuda:{i}", dtype) for i in range(2)]
    outs = [work.outputs() for work in works]
    torch.cuda.synchronize(1)
    assert torch.cuda.current_device() == 0 and {t.device.index for t in outs[1]} == {1}
    assert_equal(outs[1], outs[0], 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.gpu
@two_gpus
def test_a_graph_on_another_gpu_than_the_current_one():
    """Recorded on GPU 0, then on GPU 1, while GPU 0 is current."""
    found = []
    for i in range(2):
        model, ids = tiny_model("llama").to(f"cuda:{i}").eval(), prompts(1)["input_ids"].to(f"cuda:{i}")
        cache = headkv.RaggedCache.for_model(model, METHODS["AdaKV"], headroom=0)
        with torch.inference_mode():
            model(ids, past_key_values=cache)
        graph = DecodeGraph(model, cache)
        found.append([graph.step(ids[:, t % 60 : t % 60 + 1]).clone() for t in range(90)])
        torch.cuda.synchronize(i)
    assert torch.cuda.current_device() == 0
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b.cpu(), a.cpu(), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_graph_on_a_side_stream():
    """Recorded and replayed where another stream than the default is current: the same bits."""
    model, ids = tiny_model("llama").cuda().eval(), prompts(1)["input_ids"].cuda()
    cache = headkv.RaggedCache.for_model(model, METHODS["AdaKV"], headroom=0)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    saved, side, found = cache.snapshot(), torch.cuda.Stream(), []
    for stream in (torch.cuda.current_stream(), side):
        torch.cuda.synchronize()
        cache.restore(saved)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph, token, outs = DecodeGraph(model, cache), torch.zeros_like(ids[:, :1]), []
            for t in range(90):
                torch.cuda._sleep(1_000_000)  # so that another stream would not see this token
                token.copy_(ids[:, t % 60 : t % 60 + 1])
                outs.append(graph.step(token).clone())
        torch.cuda.synchronize()
        found.append(torch.cat(outs))
    assert torch.equal(found[0], found[1])
