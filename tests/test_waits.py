"""How often the compression of a layer waits for the device: a few times a sequence, however many heads there are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import headkv
from headkv.cache import RaggedLayer, rust
from headkv.heads import HeadProfile
from headkv.integrations.planning import Observation, keep_entries
from headkv.logits import Rule
from headkv.scorers import SnapKVScorer

N, DIM, GROUP, LAYERS = 200, 16, 2, 3
MOST, MOST_PADDED = 5, 8  # waits; two of them are in `RaggedLayer.from_dense`
SCORER = SnapKVScorer(window=4, kernel_size=3)


def profile(heads: int, kind: str) -> HeadProfile:
    scores = torch.rand(LAYERS, heads, generator=torch.Generator().manual_seed(0))
    return HeadProfile(model="tiny", kind=kind, heads="kv", scores=scores.as_subclass(Host))


METHODS = {
    "FullCache": lambda heads: headkv.FullCache(),
    "SnapKV": lambda heads: headkv.SnapKV(budget=0.2, scorer=SCORER),
    "PyramidKV": lambda heads: headkv.PyramidKV(budget=0.2, scorer=SCORER),
    "AdaKV": lambda heads: headkv.AdaKV(budget=0.2, scorer=SCORER),
    "HeadKV": lambda heads: headkv.HeadKV(budget=0.2, profile=profile(heads, "retrieval"), scorer=SCORER),
    "DuoAttention": lambda heads: headkv.DuoAttention(profile(heads, "gate"), sinks=1, recent=5),
    "RazorAttention": lambda heads: headkv.RazorAttention(
        profile(heads, "echo"), profile(heads, "induction"), min_recent=5, window_share=0.0
    ),
    "StreamingLLM": lambda heads: headkv.StreamingLLM(budget=0.2),
    "RandomHeads": lambda heads: headkv.RandomHeads(sinks=1, recent=5),
}


DEVICE, HOST = torch.device("cpu:0"), torch.device("cpu")  # one place for torch, two for `Waits`


class Host(torch.Tensor):
    """A tensor on the host; what is computed from it is there, too."""


class Waits(TorchFunctionMode):
    """Lists what would wait for the device, if all tensors but `Host`s were on one. Tensors say that they are."""

    FETCH = ("item", "tolist", "numpy", "nonzero", "masked_select", "unique")
    FETCH += ("__bool__", "__int__", "__float__", "__index__", "__contains__")
    MAKE = ("tensor", "zeros", "ones", "full", "empty", "arange", "linspace", "rand", "randperm")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        first, host = args[0] if args else None, bool(args) and isinstance(args[0], Host)
        others = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.Tensor)]
        if func == torch.Tensor.device.__get__:
            return HOST if host else DEVICE
        if name in self.MAKE:
            made = func(*args, **kwargs)
            if torch.device(kwargs.get("device", HOST)) == HOST:
                return made.as_subclass(Host)
            self.found += ["tensor of a list"] if name == "tensor" else []
            return made
        if name in ("to", "cpu"):
            places = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, (torch.device, str))]
            to_host = torch.device(places[0]) == HOST if places else host or name == "cpu"
            if to_host != host and not (host and kwargs.get("non_blocking")):
                self.found.append("to the host" if to_host else "to the device")
            return func(*args, **kwargs).as_subclass(Host if to_host else torch.Tensor)
        if not host and name in self.FETCH:
            self.found.append(name)
        elif not host and name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in index):
                self.found.append(f"{name} by a mask")
            if name == "__setitem__" and isinstance(args[2], Host):
                self.found.append(f"{name} from the host")
        elif not host and name == "repeat_interleave" and others and "output_size" not in kwargs:
            self.found.append(name)
        else:
            places = {isinstance(x, Host) for x in (first, *others) if isinstance(x, torch.Tensor) and x.ndim}
            assert len(places) < 2, f"{name} of tensors in two places"
        return func(*args, **kwargs)


def compression(method: Any, heads: int, pad: int = 0, device: str = "cpu") -> Callable[[], RaggedLayer]:
    """All that happens to one layer's keys and values after the prefill's attention, ready to be called."""
    generator = torch.Generator().manual_seed(1)
    q, keys, values = (
        torch.randn(1, N, h, DIM, generator=generator).to(device).transpose(1, 2)
        for h in (heads * GROUP, heads, heads)
    )
    valid = (torch.arange(N)[None] >= pad).to(device) if pad else None
    rule = Rule(DIM**-0.5)

    def run() -> RaggedLayer:
        observed = Observation.of(q, valid, method.observed_queries, rule)
        kept = keep_entries(method, observed, keys, values, valid, layer_idx=1, num_layers=LAYERS)
        return RaggedLayer.from_dense(keys, values, valid=valid, rollback=32, **kept)

    return run


@pytest.mark.parametrize("pad", [0, 3], ids="{} padded".format)
@pytest.mark.parametrize("name", METHODS)
def test_a_layer_waits_a_few_times_whatever_the_heads(name, pad, monkeypatch):
    monkeypatch.setattr(rust, "available", lambda: False)  # what a GPU runs instead
    found = []
    for heads in (2, 8):
        run = compression(METHODS[name](heads), heads, pad)
        with Waits() as waits:
            run()
        found.append(waits.found)
    assert found[0] == found[1]
    assert len(found[0]) <= (MOST_PADDED if pad else MOST)


def test_waits_are_found():
    """The counting itself: one for each way to wait."""
    with Waits() as waits:
        x = torch.zeros(4, device=DEVICE)
        mask = x > 1
        assert not waits.found and x.device == DEVICE and x.cpu().device == HOST
        waits.found.clear()
        bool(mask.any()), x[mask], mask.nonzero(), torch.zeros(4).to(x.device), x.tolist()
        torch.repeat_interleave(x, x.long())
    want = ["__bool__", "__getitem__ by a mask", "nonzero", "to the device", "tolist", "repeat_interleave"]
    assert waits.found == want
    with Waits() as waits:
        host = torch.zeros(4)
        bool(host.any()), host.tolist(), host.cpu(), host[host > 1], host.to(host.device)
        host.to(DEVICE, non_blocking=True)
    assert not waits.found


@pytest.mark.gpu
@pytest.mark.parametrize("pad", [0, 3], ids="{} padded".format)
@pytest.mark.parametrize("name", METHODS)
def test_waits_on_a_gpu(name, pad):
    """By torch's own count, which also knows what is inside of operators."""
    found = []
    for heads in (2, 8):
        run = compression(METHODS[name](heads), heads, pad, "cuda")
        run()  # compiles, and loads libraries
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found.append([str(w.message) for w in caught if "synchronizing CUDA" in str(w.message)])
    assert len(found[0]) == len(found[1]), found
    assert 0 < len(found[0]) <= (MOST_PADDED if pad else MOST), found[0]


@pytest.mark.gpu
def test_compression_needs_little_beside_what_it_keeps():
    """Keys and values as models make them are not copied on the way: the peak is the kept entries and some indices."""
    keys, values = torch.randn(2, 1, 1 << 15, 8, 128, device="cuda", dtype=torch.bfloat16).transpose(2, 3)
    dense = 2 * keys.numel() * keys.element_size()
    keep = torch.rand(keys.shape[:3], device="cuda") < 0.1
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer = RaggedLayer.from_dense(keys, values, keep=keep)
    assert torch.cuda.max_memory_allocated() - before < layer.nbytes + 0.15 * dense


@pytest.mark.parametrize("pad", [0, 3], ids="{} padded".format)
@pytest.mark.parametrize("name", METHODS)
def test_models_layout_and_a_dense_one_are_stored_alike(name, pad):
    """`[B, n, H, D]` in memory, turned: what is kept equals that of a copy that is contiguous."""
    method, from_dense = METHODS[name](3), RaggedLayer.from_dense
    run = compression(method, 3, pad)
    got = run()
    RaggedLayer.from_dense = lambda keys, values, **kept: from_dense(
        keys.contiguous(), values.contiguous(), **kept
    )
    try:
        want = run()
    finally:
        RaggedLayer.from_dense = from_dense
    for name in (
        "positions",
        "start",
        "length",
        "capacity",
        "sinks",
        "recent",
        "evicted_end",
        "trimmed_end",
        "count",
    ):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None and b is None) or name == "positions" or torch.equal(a, b), name
    for h in range(3):
        assert all(torch.equal(a, b) for a, b in zip(got.row(0, h), want.row(0, h), strict=True))
    if got.count is not None:
        assert torch.equal(got.key_sum, want.key_sum) and torch.equal(got.value_sum, want.value_sum)
