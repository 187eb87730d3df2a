"""The Rust backend beyond test_attention.py: every instruction set, many shapes, moves, bad memory."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from attention_cases import CASES, Case, truth

import headkv
from headkv.attention import reference, rust
from headkv.cache import RaggedLayer, Rows, layout, moves
from headkv.cache import rust as rust_moves
from headkv.cache.residual import NAMES as RESIDUAL
from headkv.logits import Rule

_rust = pytest.importorskip("headkv._rust", reason="needs the compiled extension: maturin develop --release")

BF16, FP16 = torch.bfloat16, torch.float16
LENGTHS = {
    "skewed": ((1, 4097, 0, 63),),
    "batch": ((5, 300), (64, 1)),
}
SHAPES = [
    Case(f"G {group} D {dim} {str(dtype)[6:]} {name}", lengths, group=group, dim=dim, dtype=dtype, gaps=False)
    for group, dim, dtype, name, lengths in [
        *((group, 64, torch.float32, "skewed", LENGTHS["skewed"]) for group in range(1, 17)),
        *((4, dim, dtype, "batch", LENGTHS["batch"])
          for dim in (1, 7, 32, 40, 64, 80, 96, 112, 128, 256) for dtype in (torch.float32, BF16, FP16)),
    ]
]  # fmt: skip


def attend(case: Case, q, layer, isa):
    positions = torch.arange(layer.seen - case.tokens, layer.seen).expand(q.shape[0], -1)
    scale = case.dim**-0.5 if case.scale is None else case.scale
    rule = Rule(**case.options(q) | {"scale": scale})
    return rust.extend(q.float(), layer, rule, query_positions=positions, isa=isa)


@pytest.mark.parametrize("isa", _rust.instruction_sets())
@pytest.mark.parametrize("case", SHAPES + CASES, ids=lambda case: case.name)
def test_every_instruction_set_equals_truth(case, isa):
    """float32 queries, so that no rounding of the output hides an error."""
    q, layer = case.build()
    got, want = attend(case, q, layer, isa), truth(case, q, layer)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=4e-6 * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_do_not_change_what_is_seen(threads):
    """One row of 40,000 entries beside rows of one: shares cut the row in many places."""
    case = Case(
        "huge", ((1, 40_000, 3, 1),), group=4, dim=32, sinks=3, recent=20_000, windowed=(1,), gaps=False
    )
    q, layer = case.build()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = attend(case, q, layer, None)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got.double(), truth(case, q, layer), rtol=1e-5, atol=1e-6)


def test_query_positions_of_padding_see_nothing():
    torch.manual_seed(0)
    layer = RaggedLayer.from_dense(torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16))
    q, positions = torch.randn(2, 4, 3, 16), torch.tensor([[-1, 0, 8], [3, 1, 2]])
    got = headkv.ragged_extend(q, layer, query_positions=positions, backend="rust")
    want = headkv.ragged_extend(q, layer, query_positions=positions, backend="reference")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert got[0, :, 0].abs().max() == 0 and got[0, :, 1].abs().min() > 0


def test_output_is_written_everywhere():
    """Every element of an output full of NaN is replaced."""
    case = Case("poison", ((3, 0),), gaps=False)
    q, layer = case.build()
    out = torch.full(q.shape, float("nan"))
    call(q=q, layer=rust.layer_arrays(layer), out=out)
    assert bool(out.isfinite().all())


def test_large_logits_do_not_overflow():
    torch.manual_seed(0)
    keys, values = torch.randn(1, 1, 200, 32) * 100, torch.randn(1, 1, 200, 32)
    layer, q = RaggedLayer.from_dense(keys, values), torch.randn(1, 2, 32) * 100
    got = rust.decode(q, layer, Rule(1.0))
    torch.testing.assert_close(got, reference.decode(q, layer, Rule(1.0)), rtol=1e-5, atol=1e-5)


def bits(tensor):
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def noise(*shape, dtype):
    """Any bits at all, also those of NaNs."""
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "slots, new, dim", [(1, 1, 1), (90, 40, 64), (3000, 5000, 80), (40_000, 30_000, 128)]
)
def test_gather_is_bit_equal(slots, new, dim, dtype):
    torch.manual_seed(slots)
    positions = torch.arange(slots, dtype=torch.int32)
    pools = layout.Pools(noise(slots, dim, dtype=dtype), noise(slots, dim, dtype=dtype), positions)
    source = torch.randint(0, slots + 5, (new,))  # past the end means the last slot
    moved = rust_moves.gather(pools, source), layout.gather(pools, source)
    assert moved[0].scales is moved[1].scales is None
    for got, want in zip(*(new[:3] for new in moved), strict=True):
        assert got.dtype == want.dtype and bool((bits(got) == bits(want)).all())


def test_gather_from_nothing():
    pools = layout.Pools(torch.zeros(0, 8), torch.zeros(0, 8), torch.zeros(0, dtype=torch.int32))
    assert [p.shape[0] for p in rust_moves.gather(pools, torch.zeros(3, dtype=torch.int64))[:3]] == [3, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tokens", [1, 5, 700])
@pytest.mark.parametrize("padded", [False, True], ids=["all valid", "padded"])
@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "as a model gives it"])
def test_append_is_bit_equal(dtype, tokens, padded, transposed):
    torch.manual_seed(tokens)
    dense = [torch.randn(2, 3, 50, 64).to(dtype) for _ in range(2)]
    layers = [RaggedLayer.from_dense(*dense, headroom=tokens + 1) for _ in range(2)]
    new = [noise(2, 3, tokens, 64, dtype=dtype) for _ in range(2)]
    if transposed:
        new = [noise(2, tokens, 3, 64, dtype=dtype).transpose(1, 2) for _ in range(2)]
    valid = torch.rand(2, tokens) < 0.6 if padded else None
    rust_moves.append(layers[0], *new, valid)
    moves.append_reference(layers[1], *new, valid)
    assert bool((layers[0].length == layers[1].length).all())
    for b in range(2):
        for h in range(3):
            for got, want in zip(layers[0].row(b, h), layers[1].row(b, h), strict=True):
                assert bool((bits(got) == bits(want)).all())


def test_append_of_the_layers_own_entries():
    layer = RaggedLayer.from_dense(torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8), headroom=9)
    keys, values, _ = (t.clone() for t in layer.row(0, 0))
    layer.append(layer.row(0, 0).keys[None, None], layer.row(0, 0).values[None, None])
    assert torch.equal(layer.row(0, 0).keys, keys.repeat(2, 1))
    assert torch.equal(layer.row(0, 0).values, values.repeat(2, 1))


def good_layer(**changes):
    """Arrays of a layer of two rows of three entries, D = 8, with two free slots each."""
    arrays = {
        **{name: torch.zeros(10, 8) for name in ("keys", "values")},
        "positions": torch.tensor([0, 1, 2, 0, 0] * 2, dtype=torch.int32),
        **dict(
            zip(("start", "length", "capacity"), torch.tensor([[0, 5], [3, 3], [5, 5]]).unbind(), strict=True)
        ),
        **{name: torch.zeros(2, dtype=torch.int64) for name in ("sinks", "recent")},
        **dict.fromkeys(("key_sum", "value_sum", "count", "scales", *RESIDUAL)),
    } | changes
    return SimpleNamespace(**{k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in arrays.items()})


def call(q=None, layer=None, out=None, positions=None, dtype="float32", **options):
    q = torch.zeros(1, 4, 1, 8) if q is None else q
    out = torch.zeros(q.shape) if out is None else out
    positions = torch.full((q.shape[0], q.shape[2]), 2) if positions is None else positions
    arrays = (x.numpy() if isinstance(x, torch.Tensor) else x for x in (q, positions))
    out = out.numpy() if isinstance(out, torch.Tensor) else out
    _rust.attend(*arrays, layer or good_layer(), dtype, out, **{"scale": 1.0, **options})


def rows(*numbers):
    return torch.tensor(numbers)


ONE, TWO = torch.zeros(1, 8), torch.zeros(2, 8)
CODES = {name: torch.zeros(10, 8, dtype=torch.int8) for name in ("keys", "values")}
BYTES = {name: torch.zeros(10, 8, dtype=torch.uint8) for name in ("keys", "values")} | {
    "scales": torch.zeros(10, 2)
}
RINGS = CODES | {"scales": torch.zeros(10, 2), "residual_count": torch.zeros(2, dtype=torch.int64)}
RINGS |= {name: torch.zeros(2, 3, 8) for name in ("residual_keys", "residual_values")}
FAR, LAST = 2**62, 2**63 - 1
BAD = {
    "length past the capacity": (dict(length=rows(3, 6)), ValueError, "row 1 must lie within the 10 slots"),
    "capacity past the pool": (dict(capacity=rows(5, 6)), ValueError, "row 1 must lie within the 10 slots"),
    "start past the pool": (dict(start=rows(0, 6)), ValueError, "row 1 must lie within the 10 slots"),
    "start far away": (dict(start=rows(FAR, 5)), ValueError, "row 0 must lie within"),
    "sum that overflows": (dict(start=rows(LAST, 5), capacity=rows(LAST, 5)), ValueError, "row 0"),
    "negative start": (dict(start=rows(-1, 5)), ValueError, "start -1"),
    "negative length": (dict(length=rows(3, -3)), ValueError, "length -3"),
    "fewer lengths": (dict(length=rows(3)), ValueError, "length must hold 2 elements, got 1"),
    "more recents": (dict(recent=rows(1, 1, 1)), ValueError, "recent must hold 2 elements, got 3"),
    "negative sinks": (dict(sinks=rows(0, -2)), ValueError, "sinks and recent must be at least 0"),
    "short positions": (dict(positions=torch.zeros(9, dtype=torch.int32)), ValueError, "keys must hold 72"),
    "long positions": (dict(positions=torch.zeros(11, dtype=torch.int32)), ValueError, "keys must hold 88"),
    "short values": (dict(values=torch.zeros(9, 8)), ValueError, "values must hold 80 elements, got 72"),
    "narrow keys": (dict(keys=torch.zeros(20, 4)), ValueError, "keys must have the width of q 8, got 4"),
    "strided keys": (dict(keys=torch.zeros(10, 16)[:, ::2]), ValueError, "keys must be contiguous"),
    "transposed keys": (dict(keys=torch.zeros(8, 10).T), ValueError, "keys must be contiguous"),
    "flat keys": (dict(keys=torch.zeros(80)), ValueError, "keys must have 2 dimensions"),
    "int64 positions": (dict(positions=torch.zeros(10).long()), TypeError, "positions must be a numpy array of int32"),
    "double keys": (dict(keys=torch.zeros(10, 8).double()), TypeError, "array of float32, got float64"),
    "int32 lengths": (dict(length=rows(3, 3).int()), TypeError, "length must be a numpy array of int64"),
    "no array": (dict(keys=[1.0]), TypeError, "keys must be a numpy array of float32"),
    "half of the sums": (dict(count=rows(0, 0)), ValueError, "must be given together"),
    "codes without scales": (CODES, ValueError, "scales must be given with int8 or uint8 keys, and"),
    "scales without codes": (dict(scales=torch.zeros(10, 2)), ValueError, "scales must be given with int8 or uint8 keys"),
    "values that are no codes": (CODES | dict(values=torch.zeros(10, 8)), TypeError, "values must be a numpy array of int8"),
    "wide bytes of 4 bits": (BYTES, ValueError, "keys must have the width of q 8, got 16"),
    "values of more bits than keys": (BYTES | CODES | dict(keys=torch.zeros(10, 4, dtype=torch.uint8)), TypeError, "values must be a numpy array of uint8, got int8"),
    "short scales": (CODES | dict(scales=torch.zeros(9, 2)), ValueError, "scales must hold 20 elements, got 18"),
    "scales of float64": (CODES | dict(scales=torch.zeros(10, 2).double()), TypeError, "scales must be a numpy array of float32"),
    "short sums": (dict(count=rows(0, 0), key_sum=ONE, value_sum=TWO), ValueError, "key_sum must hold 16"),
    "half of the rings": (RINGS | dict(residual_count=None), ValueError, "residual_count must be given together"),
    "rings without codes": (RINGS | dict.fromkeys(("scales",)) | {x: torch.zeros(10, 8) for x in ("keys", "values")}, ValueError, "residual_keys must be given with scales only"),
    "rings of bfloat16": (RINGS | dict(residual_keys=torch.zeros(2, 3, 8, dtype=torch.int16)), TypeError, "residual_keys must be a numpy array of float32"),
    "rings turned around": (RINGS | dict(residual_values=torch.zeros(2, 8, 3)), ValueError, r"must have shape \[rows, R, 8\], got \[2, 3, 8\] and \[2, 8, 3\]"),
    "rings without slots": (RINGS | {x: torch.zeros(2, 0, 8) for x in ("residual_keys", "residual_values")}, ValueError, "at least one slot a row"),
    "rings of a row": (RINGS | {x: torch.zeros(1, 3, 8) for x in ("residual_keys", "residual_values")}, ValueError, "residual_keys must hold 48 elements, got 24"),
    "fewer than none": (RINGS | dict(residual_count=rows(0, -1)), ValueError, "residual_count must be at least 0, got -1"),
}  # fmt: skip
BAD_CALLS = {
    "wrong dtype tag": (
        dict(dtype="bfloat16"),
        TypeError,
        "keys must be a numpy array of uint16, got float32",
    ),
    "unknown dtype": (dict(dtype="int8"), TypeError, "dtype must be float32, bfloat16 or float16, got"),
    "small out": (dict(out=torch.zeros(1, 4, 1, 4)), ValueError, "out must have the shape of q"),
    "few positions": (
        dict(positions=torch.zeros(0, dtype=torch.int64)),
        ValueError,
        "query_positions must hold 1",
    ),
    "odd heads": (dict(q=torch.zeros(1, 3, 1, 8)), ValueError, "multiple of the 2 KV heads, got 3"),
    "another batch": (
        dict(q=torch.zeros(4, 2, 1, 8)),
        ValueError,
        "rows must be a positive multiple of batch",
    ),
    "scale": (dict(scale=float("inf")), ValueError, "scale must be finite"),
    "softcap": (dict(softcap=-1.0), ValueError, "softcap must be positive"),
    "window": (dict(sliding_window=0), ValueError, "sliding_window must be at least 1"),
    "sinks of a head too few": (
        dict(sink_logits=torch.zeros(3).numpy()),
        ValueError,
        "sink_logits must hold 4 elements, got 3",
    ),
    "sinks of float64": (
        dict(sink_logits=torch.zeros(4).double().numpy()),
        TypeError,
        "sink_logits must be a numpy array of float32",
    ),
    "a sink that is no number": (
        dict(sink_logits=torch.tensor([0, torch.nan, 0, 0]).numpy()),
        ValueError,
        "sink_logits must be below infinity, got NaN",
    ),
    "instruction set": (dict(isa="mmx"), ValueError, "isa must be one of"),
}


def test_the_good_layer_is_good():
    call()
    call(threads=0)


@pytest.mark.parametrize("changes, error, message", BAD.values(), ids=BAD.keys())
def test_a_layer_that_does_not_fit_is_refused(changes, error, message):
    out = torch.full((1, 4, 1, 8), float("nan"))
    with pytest.raises(error, match=message):
        call(layer=good_layer(**changes), out=out)
    assert bool(out.isnan().all()), "nothing was written"


@pytest.mark.parametrize("changes, error, message", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_a_call_that_does_not_fit_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


def test_out_must_not_be_what_is_read():
    memory = torch.zeros(20, 8)
    with pytest.raises(ValueError, match="out must not share memory"):
        call(layer=good_layer(keys=memory[:10]), out=memory[8:12].view(1, 4, 1, 8))
    with pytest.raises(ValueError, match="out must not share memory"):
        rings = RINGS | {"residual_values": memory[:6].view(2, 3, 8)}
        call(layer=good_layer(**rings), out=memory[4:8].view(1, 4, 1, 8))
    read_only = torch.zeros(1, 4, 1, 8).numpy()
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="out can not be written"):
        call(out=read_only)


@pytest.mark.parametrize(
    "start, length, capacity, message",
    [
        ((0, 5), (5, 3), (5, 5), "row 0 must have room for 1 new entries, got room for 0"),
        ((0, 4), (3, 3), (5, 5), "rows must not overlap"),
        ((0, 6), (3, 3), (5, 5), "row 1 must lie within"),
        ((0, 5), (-1, 3), (5, 5), "row 0 must lie within"),
    ],
    ids=["full", "overlap", "past the end", "negative"],
)
def test_append_never_writes_out_of_bounds(start, length, capacity, message):
    layer = RaggedLayer.from_dense(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), headroom=2)
    layer.start, layer.length, layer.capacity = rows(*start), rows(*length), rows(*capacity)
    before = layer.keys.clone()
    with pytest.raises(ValueError, match=message):
        rust_moves.append(layer, torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), None)
    assert torch.equal(layer.keys, before) and layer.length.tolist() == list(length)


def test_gather_never_reads_out_of_bounds():
    pools = layout.Pools(torch.zeros(3, 8), torch.zeros(3, 8), torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="source must be at least 0, got -1"):
        rust_moves.gather(pools, rows(0, -1))
    with pytest.raises(TypeError, match="source must be a numpy array of int64"):
        rust_moves.gather(pools, rows(0, 1).int())


def test_released_memory_is_refused():
    """A tensor whose storage was emptied still has its shape; torch must not hand over a dangling pointer."""
    _, layer = Case("released", ((9, 9),), gaps=False).build()
    layer.keys = layer.keys.clone()
    layer.keys.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="keys must lie within its memory of 0 bytes"):
        rust.decode(torch.zeros(1, 4, 64), layer, Rule(1.0))
    _, layer = Case("released", ((9, 9),), gaps=False).build()
    array = rust_moves.array("keys", layer.keys)
    with pytest.raises(RuntimeError, match="not resizable"):
        layer.keys.untyped_storage().resize_(0)
    del layer
    assert array.shape == (24, 64) and array.base is not None


def test_tensors_that_are_not_plain_memory_are_refused():
    with pytest.raises(ValueError, match="x must be on the CPU"):
        rust_moves.array("x", torch.zeros(3, device="meta"))
    with pytest.raises(ValueError, match="x must be contiguous"):
        rust_moves.array("x", torch.zeros(3, 4).T)


def test_the_interpreter_runs_meanwhile():
    """Another thread makes progress during one long call."""
    layer = RaggedLayer.from_dense(torch.zeros(1, 1, 200_000, 64), torch.zeros(1, 1, 200_000, 64))
    q, ticks, stop = torch.zeros(1, 64, 64, 64), [0], threading.Event()

    def tick():
        while not stop.wait(0.001):
            ticks[0] += 1

    positions = torch.full((1, 64), 199_999)
    thread = threading.Thread(target=tick)
    thread.start()
    before = ticks[0]
    rust.extend(q, layer, Rule(1.0), query_positions=positions)
    during = ticks[0] - before
    stop.set()
    thread.join()
    assert during > 3


def test_missing_extension_names_the_install_line():
    code = """if 1:
        import sys; sys.modules['headkv._rust'] = None
        import torch, headkv
        from headkv.attention.api import choose_backend
        layer = headkv.RaggedLayer.from_dense(torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 8))
        layer.append(torch.ones(1, 1, 1, 8), torch.ones(1, 1, 1, 8))
        assert choose_backend(layer) == 'reference'
        try:
            headkv.ragged_decode(torch.ones(1, 1, 8), layer, backend='rust')
        except ImportError as error:
            print(error)
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install headkv" in out and "maturin develop --release" in out


def test_rust_reads_rows_by_their_own_names():
    """A layer's rows are described once on each side of a language: what Rust asks for are fields of `Rows`."""
    layer = good_layer()
    given = vars(rust.layer_arrays(RaggedLayer.from_dense(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8))))
    asked = []
    for name in given:
        without = SimpleNamespace(**{other: x for other, x in given.items() if other != name})
        try:
            call(layer=without)
        except AttributeError as error:
            assert name in str(error)
            asked.append(name)
    fields = {field.name for field in dataclasses.fields(Rows)}
    assert set(asked) == set(vars(layer)) == fields - {"evicted_end", "trimmed_end", "num_kv_heads", "seen"}
