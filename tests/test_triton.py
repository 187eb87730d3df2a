"""The Triton kernels against float64 truth: compiled on a GPU, and in Triton's interpreter where there is none.

The interpreter must be on before Triton is first imported, so `test_in_the_interpreter` runs this very file once more
in a process of its own; every other test here needs a GPU or that process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from attention_cases import CASES, Case, truth

import headkv
from headkv.attention import triton as backend
from headkv.cache import RaggedLayer, files, moves
from headkv.cache.mixed import stored_in
from headkv.cache.rows import Pools
from headkv.logits import Rule

ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
device = (lambda test: test) if INTERPRETED else pytest.mark.gpu
compiled = pytest.mark.skipif(INTERPRETED, reason="not for the interpreter's process")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

if INTERPRETED:
    from interpreter import patch_once_a_launch

    patch_once_a_launch()


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fresh memory holds NaN, so whatever a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def attend(q, layer, **options):
    if q.shape[2] == 1 and "query_positions" not in options:
        return headkv.ragged_decode(q[:, :, 0], layer, backend="triton", **options)[:, :, None]
    return headkv.ragged_extend(q, layer, backend="triton", **options)


def assert_close(got, want, dtype, slack=0.0):
    """Off by one rounding of the output to its dtype, and float32 sums inside; and by `slack`."""
    got, want = got.cpu().double(), want.cpu().double()
    assert bool(got.isfinite().all())
    bound = torch.finfo(dtype).eps * want.abs() + 4e-6 * max(1.0, float(want.abs().max())) + slack
    assert bool(((got - want).abs() <= bound).all()), float((got - want).abs().max())


def assert_true(got, case, q, layer):
    """Near the truth; in 16 bits as near as PyTorch's own attention in that dtype comes."""
    want = truth(case, q, layer)
    eager = want if case.dtype == FP32 else truth(case, q, layer, eager=case.dtype)
    assert_close(got, want, case.dtype, float((eager - want).abs().max()))


@pytest.mark.slow
@compiled
def test_in_the_interpreter():
    """All other tests of this file on a CPU, without exception."""
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    run = subprocess.run([*command, __file__], env=environment, cwd=ROOT, capture_output=True, text=True)
    summary = run.stdout.strip().splitlines()[-1] if run.stdout.strip() else run.stderr
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-1000:]
    assert int(summary.split(" passed")[0].split()[-1]) > len(CASES), summary


def sized(compiled, interpreted):
    """How many of what a GPU does at once, and the interpreter one after the other."""
    return interpreted if INTERPRETED else compiled


def combined(*axes):
    """All combinations; of the interpreter's, which is slow, a third, with each value of each axis in one at least."""
    some = [
        tuple(axis[i] for axis, i in zip(axes, at, strict=True))
        for at in product(*(range(len(axis)) for axis in axes))
        if not INTERPRETED or sum(at) % 3 == 0
    ]
    assert all({one[i] for one in some} == set(axis) for i, axis in enumerate(axes))
    return some


WIDE = [
    Case(f"D 512, {t} tokens, {dtype}", ((33, 100),), dim=512, tokens=t, dtype=dtype)
    for dtype in (FP32, FP16)
    for t in (1, 3)
]
WIDE += [Case(f"groups of 20, {t} tokens", ((33, 100),), group=20, dim=32, tokens=t) for t in (1, 3)]


def as_codes(cases, storage, interpreted, newest=0):
    """Those cases over rows of codes, the newest entries as they came; of the interpreter's, which is slow, the ones
    named."""
    assert interpreted <= {case.name for case in cases}
    chosen = [case for case in cases if not INTERPRETED or case.name in interpreted]
    how = {"storage": storage, "residual_length": newest}
    return [
        replace(case, name=f"{case.name}, {storage}" + f" and {newest}" * (newest > 0), **how)
        for case in chosen
    ]


CODED = as_codes(
    CASES + WIDE,
    "int8",
    {"an empty row beside others", "one huge row beside empty ones", "D 40", "D 80 bf16", "D 128 fp16"}
    | {
        "windowed",
        "sliding window and softcap",
        "compensation on some rows",
        "extend by 7",
        "extend, compensation",
    }
    | {"sinks, extend, sliding", f"D 512, 3 tokens, {FP16}"},
)
CODED += as_codes(
    CASES + WIDE,
    "int4",
    {"an empty row beside others", "D 40", "D 128 fp16", "compensation on some rows", "extend by 7"},
)
CODED += as_codes(CASES + WIDE, "k8v4", {"D 80 bf16", "sliding window and softcap", "extend, compensation"})
CODED += as_codes(
    CASES + WIDE,
    "int4",
    {"an empty row beside others", "D 40", "windowed", "sliding window and softcap", "extend, compensation"},
    newest=5,
)
CODED += as_codes(CASES + WIDE, "int8", {"D 80 bf16", "extend by 7", "compensation on some rows"}, newest=64)
# Whose bytes are no whole numbers of 16 bits.
CODED += [
    Case(f"D {dim}, {t} tokens, {storage}", ((33, 9),), dim=dim, tokens=t, storage=storage)
    for dim, storage in ((5, "int8"), (6, "k8v4"), (6, "int4"), (2, "int4"))
    for t in (1, 3)
]


@device
@pytest.mark.parametrize("case", CASES + WIDE + CODED, ids=lambda case: case.name)
def test_equals_truth(case):
    q, layer = case.build(DEVICE)
    got = attend(q, layer, **case.options(q))
    assert got.dtype == q.dtype
    assert_true(got, case, q, layer)


MANY = Case("many rows", tuple((0, b % 7, b * 5, 1) for b in range(sized(25, 5))), dim=32, gaps=False)
LENGTHS = (1, sized(700, 130), 0, 33, 64)
SHARES = sized(200, 80)  # the interpreter's are more than these rows have units of entries
UNEVEN = Case("uneven", (LENGTHS,), gaps=False, group=3)
SINKS = Case("sinks of uneven rows", (LENGTHS, (3, 0, 5, 9, 40)), gaps=False, sink_logits=(2.0, 5.0, -1.0))
WINDOWS = Case("windows", ((90, 400), (3, 40)), sinks=3, recent=9, compensate=True)
CODES = Case("codes", ((1, 130, 0, 33),), gaps=False, group=1, dim=80, dtype=FP16, storage="int8")


@device
@pytest.mark.parametrize("case", [UNEVEN, WINDOWS], ids=lambda case: case.name)
def test_a_layer_from_a_file_gives_the_same_bits(case, tmp_path):
    q, layer = case.build(DEVICE)
    files.write(tmp_path / "layer", [layer], {})
    (loaded,), _ = files.read(tmp_path / "layer", lambda about: None, [torch.device(DEVICE)])
    assert torch.equal(attend(q, loaded, **case.options(q)), attend(q, layer, **case.options(q)))


@device
@pytest.mark.parametrize(
    "case, programs, gap", combined([UNEVEN, SINKS, WINDOWS], [SHARES, 1, 2, 5], [0, 8, 500]), ids=str
)
def test_any_number_of_shares(case, programs, gap):
    """However the entries are cut, also into more shares than there are entries."""
    q, layer = case.build(DEVICE)
    kernels = backend.kernels()
    config = kernels.DecodeConfig(programs, 32, gap=gap)
    options = case.options(q) | {"scale": case.dim**-0.5}
    got = kernels.ragged_decode(q[:, :, 0], backend.rows_of(layer), config=config, **options)
    assert_close(got, truth(case, q, layer)[:, :, 0], case.dtype)


EXTENDED = [
    replace(UNEVEN, tokens=21, dtype=BF16),
    replace(UNEVEN, lengths=sized(((140, 71),), ((90, 46),)), tokens=sized(70, 45)),
    replace(WINDOWS, lengths=((90, sized(250, 130)), (3, 40)), tokens=30, compensate=False),
    Case("slides", ((200, 70), (0, 33)), tokens=20, sliding_window=60, gaps=False, softcap=2.0),
    replace(MANY, tokens=5),
    replace(SINKS, tokens=sized(21, 11)),
    replace(CODES, tokens=9),
]
if not INTERPRETED:
    EXTENDED += [replace(CODES, name=kind, tokens=9, storage=kind) for kind in ("k8v4", "int4")]
CUTS = [(16, 16, 0), (16, 64, 3), (64, 16, 7), (128, 32, 1), (32, 32, sized(40, 12))]


@device
@pytest.mark.parametrize("case, cut", combined(EXTENDED, CUTS), ids=str)
def test_any_cut_of_an_extension(case, cut):
    """However queries and entries are cut, also into more parts than there are blocks."""
    q, layer = case.build(DEVICE)
    kernels, (queries, block, cuts) = backend.kernels(), cut
    config = kernels.ExtendConfig(queries, block, 2, 4, cuts)
    where = torch.arange(layer.seen - case.tokens, layer.seen, device=DEVICE).expand(q.shape[0], -1)
    options = case.options(q) | {"scale": case.dim**-0.5, "query_positions": where}
    got = kernels.ragged_extend(q, backend.rows_of(layer), config=config, **options)
    assert_true(got, case, q, layer)


@device
@pytest.mark.parametrize(
    "tokens, heads, entries, compensate, least, most",
    [
        pytest.param(4, 8, 26_213, False, 120, 264, id="a draft"),
        pytest.param(256, 8, 26_213, False, 120, 132, id="a second turn"),
        pytest.param(1024, 8, 26_213, False, 512, 512, id="long rows are cut although all are busy"),
        pytest.param(4096, 8, 26_213, False, 1024, 1024, id="a chunk, not cut"),
        pytest.param(1024, 8, 3000, False, 256, 256, id="too short to be worth it"),
        pytest.param(4, 64, 3000, False, 120, 264, id="a batch of drafts"),
        pytest.param(4, 8, 10, False, 8, 8, id="hardly an entry"),
        pytest.param(4, 8, 3000, True, 8, 8, id="compensation entries"),
    ],
)
def test_programs_of_an_extension(tokens, heads, entries, compensate, least, most, monkeypatch):
    """So many on a GPU of 132 multiprocessors."""
    from headkv_kernels import extend

    monkeypatch.setattr(extend, "device_traits", lambda device: (132, True, 0))
    make = {"device": DEVICE, "dtype": FP16}
    pool, number = torch.empty(heads * entries, 128, **make), torch.full((heads,), entries, device=DEVICE)
    rows = extend.Rows(
        pool, pool, torch.empty(heads * entries, device=DEVICE, dtype=torch.int32), *[number] * 4
    )
    if compensate:
        sums = torch.zeros(heads, 128, device=DEVICE)
        rows = replace(rows, count=number, key_sum=sums, value_sum=sums)
    q = torch.empty(1, 4 * heads, tokens, 128, **make)
    config = extend.ExtendConfig.default(q, rows)
    programs = (heads + config.cuts) * -(-tokens // (config.queries // 4))
    assert least <= programs <= most


@device
@pytest.mark.parametrize("window", range(1, 12))
@pytest.mark.parametrize("tokens", [1, 3])
def test_edges_of_a_sliding_window(window, tokens):
    """Every distance, in rows with and without gaps."""
    case = Case("edges", ((10, 25),), tokens=tokens, sliding_window=window, dim=32)
    q, layer = case.build(DEVICE)
    layer.positions[layer.start[0] : layer.start[0] + 10] = torch.arange(40, 50, device=DEVICE)
    assert_close(attend(q, layer, **case.options(q)), truth(case, q, layer), FP32)


@device
def test_many_rows():
    """More rows than shares, and many of them empty."""
    q, layer = MANY.build(DEVICE)
    assert_close(attend(q, layer), truth(MANY, q, layer), FP32)


@device
@pytest.mark.parametrize("pools, queries", [(BF16, FP32), (FP32, BF16), (FP16, BF16)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_queries_of_another_dtype(pools, queries, tokens):
    case = Case("dtypes", ((40, 100),), dtype=pools, tokens=tokens)
    q, layer = case.build(DEVICE)
    q = q.to(queries)
    got = attend(q, layer)
    assert got.dtype == queries
    assert_close(got, truth(case, q, layer), queries)


@device
@pytest.mark.parametrize("tokens", [1, 5])
def test_queries_that_are_views(tokens):
    """Queries as models have them: `[B, T, HQ, D]` in memory, a part of a larger tensor."""
    case = Case("views", ((40, 100), (3, 70)), tokens=tokens)
    q, layer = case.build(DEVICE)
    memory = torch.full((2, tokens + 1, 4, 96), float("nan"), device=DEVICE)
    view = memory[:, :tokens, :, :64].transpose(1, 2)
    view.copy_(q)
    torch.testing.assert_close(attend(view, layer), attend(q, layer), rtol=0, atol=0)


@device
def test_values_apart_along_d_are_made_dense():
    case = Case("apart", ((40, 100),))
    q, layer = case.build(DEVICE)
    apart = q.transpose(2, 3).contiguous().transpose(2, 3)[:, :, 0]
    spread = torch.stack([apart, apart], -1)[..., 0]
    assert spread.stride(-1) == 2
    got = headkv.ragged_decode(spread, layer, backend="triton")
    torch.testing.assert_close(got, attend(q, layer)[:, :, 0], rtol=0, atol=0)


@device
@pytest.mark.parametrize("compensate", [False, True])
def test_queries_stand_where_they_say(compensate):
    """Query positions in any order; one before every entry sees nothing, or what was dropped earlier."""
    window = {"sinks": 2, "recent": 10, "compensate": compensate}
    case = Case("anywhere", ((90, 300),), tokens=1, gaps=False, **window)
    q, layer = case.build(DEVICE)
    layer.positions += 5
    layer.seen += 5
    where = torch.tensor([[304, 3, 250, 0, 17, 299]], device=DEVICE)
    q = torch.randn(1, 4, 6, 64, device=DEVICE)
    got = attend(q, layer, query_positions=where)
    want = headkv.ragged_extend(q, layer, query_positions=where, backend="reference")
    assert_close(got, want, FP32)
    if not compensate:
        assert not got[:, :, [1, 3]].any()


@device
@pytest.mark.parametrize("tokens", [1, 2])
def test_only_the_compensation_entry(tokens):
    """An empty row that dropped entries before gives their mean value; one that dropped none gives 0."""
    case = Case("only", ((0, 0),), tokens=tokens, gaps=False, recent=4, compensate=True)
    q, layer = case.build(DEVICE)
    layer.seen = 9
    assert layer.count.tolist() == [0, 3]
    got = attend(q, layer)
    assert not got[:, :2].any()
    assert_close(got[:, 2:], (layer.value_sum[1] / 3).expand(1, 2, tokens, -1), FP32)


@device
def test_offsets_beyond_32_bits():
    """A row that begins more than 2**31 elements into the pools, of which only a few are ever touched."""
    torch.use_deterministic_algorithms(False)  # so that the pools are reserved, not filled
    dim, slots = 128, 2**31 // 128 + 1000
    keys, values = (torch.empty(slots, dim, dtype=BF16, device=DEVICE) for _ in range(2))
    case = Case("far", ((50, 300),), dim=dim, dtype=BF16)
    q, near = case.build(DEVICE)
    far = slots - 400
    for pool, old in ((keys, near.keys), (values, near.values)):
        pool[:50], pool[far : far + 300] = old[:50], old[near.start[1] : near.start[1] + 300]
    positions = torch.zeros(slots, dtype=torch.int32, device=DEVICE)
    start = torch.tensor([0, far], device=DEVICE)
    layer = RaggedLayer._bare(Pools(keys, values, positions), start, near.length, 2, near.seen)
    layer.sinks, layer.recent = near.sinks, near.recent
    torch.testing.assert_close(attend(q, layer), attend(q, near), rtol=0, atol=0)
    new = torch.randn(1, 2, 1, dim, device=DEVICE).to(BF16)
    backend.kernels().ragged_append(backend.rows_of(layer), layer.capacity + 1, new, new, seen=7)
    assert bool((keys[far + 300] == new[0, 1, 0]).all()) and int(positions[far + 300]) == 7


# In the interpreter float32 is cut off to bfloat16, and scales are rounded.
KINDS = [(FP32, "model"), (BF16, "model"), (FP16, "model"), (FP32, "int8"), (FP16, "int8")]
KINDS += [(FP32, "k8v4"), (FP16, "int4")]
KINDS += [] if INTERPRETED else [(BF16, "int8"), (FP16, "k8v4"), (FP32, "int4"), (BF16, "int4")]


KINDS = [(*kind, 0) for kind in KINDS] + [(FP32, "int8", 6), (FP16, "int4", 32)]


@device
@pytest.mark.parametrize("dtype, newest", [(FP32, 3), (BF16, 0)], ids=str)
def test_heads_in_different_storages(dtype, newest):
    """Each head is what it is in a layer of its storage alone, also once a step has stored a token."""
    names, generator = ("int8", "model", "int8", "int4"), torch.Generator().manual_seed(0)
    batch = sized(2, 1)
    dense = torch.randn(2, batch, 4, 40, 64, generator=generator).to(DEVICE, dtype)
    make = lambda storage: stored_in(RaggedLayer.from_dense(*dense), storage, newest)  # noqa: E731
    mixed, whole = make(names), {name: make(name) for name in set(names)}
    options = {"backend": "triton", "sink_logits": torch.linspace(-1, 1, 8).to(DEVICE)}
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE, dtype)  # noqa: E731
    values = torch.cat([dense[1], value := draw(batch, 4, 1, 64)], 2)
    for run, tensors in (
        (headkv.ragged_step, (draw(batch, 8, 64), draw(batch, 4, 64), value[:, :, 0])),
        (headkv.ragged_extend, (draw(batch, 8, 3, 64),)),
    ):
        got = run(*tensors, mixed, **options)
        every = {name: run(*tensors, layer, **options).unflatten(1, (4, 2)) for name, layer in whole.items()}
        want = torch.stack([every[name][:, h] for h, name in enumerate(names)], 1).flatten(1, 2)
        # The two cut rows into other shares, and each rounds its weights, which sum to one, by half an eps at most.
        assert_close(got, want, dtype, torch.finfo(dtype).eps * float(values.abs().max()))
        assert mixed.seen == 41 and bool((mixed.lengths() == 41).all())


@device
@pytest.mark.parametrize("dtype, storage, newest", KINDS, ids=str)
@pytest.mark.parametrize("tokens, holes", [(1, False), (1, True), (7, False), (70, True)])
def test_append_equals_the_specification(dtype, storage, newest, tokens, holes):
    """Bit for bit, from strided tensors, with the position given as a number or on the device."""
    torch.manual_seed(tokens)
    old = torch.randn(2, 3, 20, 40).to(dtype)
    keep = torch.rand(2, 3, 20) < 0.5
    how = {"storage": storage, "residual_length": newest}
    layer = RaggedLayer.from_dense(old, old + 1, keep=keep, headroom=75, **how)
    layer.to(DEVICE)
    same = RaggedLayer.from_snapshot(layer.snapshot())
    memory = torch.randn(2, 2, tokens, 3, 40, device=DEVICE).to(dtype)
    # What is no number, vectors of zeros, and large and small ones.
    memory[0, 0, 0, :2, 3] = torch.tensor([torch.nan, torch.inf], device=DEVICE)
    memory[1, 1, 0] *= torch.tensor([[0.0], [1e4], [1e-6]], device=DEVICE)
    keys, values = memory.transpose(2, 3)
    valid = torch.rand(2, tokens, device=DEVICE) < 0.6 if holes else None
    moves.append_reference(same, keys, values, valid)
    seen = torch.tensor([20], device=DEVICE) if holes else 20
    backend.kernels().ragged_append(
        backend.rows_of(layer), layer.capacity, keys, values, seen=seen, valid=valid
    )
    for name in stored(layer):
        mine, wanted = getattr(layer, name), getattr(same, name)
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0, equal_nan=True, msg=name)


def stored(layer):
    """The names of what an append writes."""
    return [
        name
        for name, _ in layer.tensors()
        if name in ("keys", "values", "positions", "length", "scales") or name.startswith("residual")
    ]


@device
def test_append_stays_in_its_row():
    """A row without room loses the token, not its neighbour an entry."""
    _, layer = Case("full", ((3, 5),)).build(DEVICE)
    before = layer.snapshot()
    new = torch.ones(1, 2, 5, 64, device=DEVICE)
    backend.kernels().ragged_append(backend.rows_of(layer), layer.capacity, new, new, seen=10)
    assert layer.length.tolist() == [6, 8], "three free slots a row"
    for r, n in enumerate((3, 5)):
        old = slice(int(layer.start[r]), int(layer.start[r]) + n)
        assert torch.equal(layer.keys[old], before.tensors["keys"][old])


@device
def test_steps_in_a_row():
    """Append and decode, again and again, through the kernels alone, equals the reference at every step."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, 2, 60, 64, device=DEVICE)
    window = {"sinks": torch.tensor([[2, 0]]), "recent": torch.tensor([[8, 0]])}
    folded = torch.tensor([[True, False]], device=DEVICE)
    layer = RaggedLayer.from_dense(keys, values, compensate=folded, headroom=20, **window)
    kernels, rows = backend.kernels(), backend.rows_of(layer)
    for _ in range(12):
        new, q = torch.randn(2, 1, 2, 1, 64, device=DEVICE), torch.randn(1, 4, 64, device=DEVICE)
        kernels.ragged_append(rows, layer.capacity, *new, seen=layer.seen)
        layer.seen += 1
        got = kernels.ragged_decode(q, rows, scale=0.2)
        assert_close(got, headkv.ragged_decode(q, layer, scale=0.2, backend="reference"), FP32)


STEPS = [case for case in CASES + WIDE if case.tokens == 1]
STEPS_IN_CODES = as_codes(
    STEPS,
    "int8",
    {"an empty row beside others", "D 128 fp16", "compensation on some rows"},
)
STEPS_IN_CODES += as_codes(STEPS, "int4", {"D 40"})
STEPS_IN_CODES += as_codes(STEPS, "k8v4", {"windowed"})
STEPS_IN_CODES += as_codes(
    STEPS, "int4", {"an empty row beside others", "compensation on some rows"}, newest=3
)
STEPS_IN_CODES += as_codes(STEPS, "int8", {"D 128 fp16", "windowed", "sliding window and softcap"}, newest=64)


RINGS = [
    replace(case, dtype=BF16 if case.dtype == FP32 else case.dtype) for case in STEPS if case.dim in (64, 128)
]
RINGS = [
    replace(case, name=f"ring, {case.name}") for case in RINGS if case.group <= 16 and not case.sliding_window
]
RINGS = [case for case in RINGS if not case.compensate] + [
    Case("ring, D 128", ((700, 0, 90),), dim=128, dtype=FP16)
]
RINGS_OF_CODES = [
    replace(case, name=f"{case.name}, {storage}", storage=storage)
    for case, storage in product(RINGS, ("int8", "k8v4", "int4"))
    if case.group <= 4
]
RINGS_OF_CODES += [
    Case(f"ring, long, {storage}", ((4097, 3, 0),), group=4, dim=128, dtype=BF16, storage=storage)
    for storage in ("int8", "k8v4", "int4")
]


# D whole, padded, and padded to what two programs combine; `test_equals_truth` has the others in the interpreter as well.
if INTERPRETED:
    STEPS = [case for case in STEPS if case.dim in (64, 40, 112)]


@device
@pytest.mark.parametrize("case", STEPS + STEPS_IN_CODES, ids=lambda case: case.name)
def test_fused_steps(case):
    """Append and attention in one go, again and again until no row has room: as append, then the truth."""
    fused_steps(case, None)


# Programs, block, ring, warps, gap.
CUT_RINGS = [(programs, *cut) for cut in ((64, 3, 4, 64), (32, 2, 2, 0)) for programs in (5, 132)]
CUT_RINGS_OF_CODES = [(132, 256, 2, 4, 512), (5, 256, 2, 4, 0), (5, 128, 3, 4, 64), (5, 256, 2, 8, 0)]


@compiled
@pytest.mark.gpu
@pytest.mark.parametrize(
    "case, cut", [*product(RINGS, CUT_RINGS), *product(RINGS_OF_CODES, CUT_RINGS_OF_CODES)], ids=str
)
def test_fused_steps_through_a_ring(case, cut):
    """The kernels for Hopper, which have no interpreter."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0: the kernels are for Hopper")
    programs, block, ring, warps, gap = cut
    config = backend.kernels().DecodeConfig
    fused_steps(case, config(programs, block, warps=warps, early=True, ring=ring, gap=gap))


@compiled
@pytest.mark.gpu
@pytest.mark.parametrize("side", ["key", "value", "query", "infinite query"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("storage", ["int8", "k8v4", "int4"])
def test_what_is_no_number_stays_in_its_row_or_query(storage, softcap, side):
    """With one program, whose blocks have other entries, too."""
    case = Case("no number", ((300, 40),), dim=128, dtype=BF16, storage=storage)
    q, layer = case.build(DEVICE)
    rows = backend.rows_of(layer)
    if "query" in side:
        q[0, 3, 0, 5] = torch.inf if "infinite" in side else torch.nan
    else:
        layer.scales[int(layer.start[1]) + 7, int(side == "value")] = torch.nan
    config = replace(backend.kernels().DecodeConfig.default(rows), programs=1)
    got = backend.kernels().ragged_decode(q[:, :, 0], rows, scale=0.1, softcap=softcap, config=config)[0]
    wrong = [3] if "query" in side else [2, 3]
    assert bool(got[wrong].isnan().all())
    assert bool(got[[head for head in range(4) if head not in wrong]].isfinite().all())


@compiled
@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["int8", "k8v4", "int4"])
def test_small_weights_of_large_values_count(storage):
    """An entry with nearly all of the weight and next to no value, as attention sinks are, beside hundreds of others."""
    torch.manual_seed(0)
    direction = torch.randn(128)
    keys = direction * torch.full((300, 1), 0.2).index_fill(0, torch.tensor([7]), 1.0)
    values = (1 + 0.1 * torch.randn(300, 128)).index_fill(0, torch.tensor([7]), 1e-3)
    layer = RaggedLayer.from_rows([[(keys.to(BF16), values.to(BF16))]])
    layer.quantise(storage)
    layer.to(DEVICE)
    q = (direction * 11.5 / direction.square().sum() / 0.8).to(BF16).expand(1, 4, 128).to(DEVICE).contiguous()
    got = backend.kernels().ragged_decode(q, backend.rows_of(layer), scale=1.0)[0].double()
    keys, values, *_ = layer.row(0, 0)
    weights = (q[0].double() @ keys.double().T).softmax(-1)
    assert weights[0, 7] > 0.99 and float(weights[0].sort().values[-2]) < 2e-5
    torch.testing.assert_close(got, weights @ values.double(), rtol=2**-8, atol=1e-4)


def fused_steps(case, config):
    q, layer = case.build(DEVICE)
    kernels, rule = backend.kernels(), Rule(**case.options(q) | {"scale": case.scale or case.dim**-0.5})
    options = backend._keywords(rule)
    rows, ticket = backend.rows_of(layer), backend.kernels().new_ticket(backend.rows_of(layer))
    generator = torch.Generator().manual_seed(0)
    # In the interpreter, which is slow, two of the steps that fill the rows are appends, and one finds no room, not two.
    for fused in (False, False, True, True) if INTERPRETED else (True,) * 5:
        new = torch.randn(2, *layer.start.view(len(case.lengths), -1).shape, 2, case.dim, generator=generator)
        keys, values = new.to(DEVICE, case.dtype)[..., 1, :]
        seen = torch.tensor([layer.seen], device=DEVICE)
        token = {"keys": keys[:, :, None], "values": values[:, :, None], "seen": seen}
        if not fused:
            kernels.ragged_append(rows, layer.capacity, **token)
            layer.seen += 1
            continue
        same = RaggedLayer.from_snapshot(layer.snapshot())
        kernels.ragged_append(backend.rows_of(same), same.capacity, **token)
        same.seen += 1
        step = (q[:, :, 0], keys, values, rows, layer.capacity, ticket, seen)
        # No launch that starts the next one early has written these rows just before.
        got = kernels.ragged_step(*step, ahead=config is not None and config.early, config=config, **options)
        layer.seen += 1
        for name in stored(layer):
            mine, wanted = getattr(layer, name), getattr(same, name)
            torch.testing.assert_close(mine, wanted, rtol=0, atol=0, equal_nan=True)
        assert not ticket.any()
        assert_true(got[:, :, None], case, q, layer)
    assert torch.equal(layer.length, layer.capacity)


@device
@pytest.mark.parametrize("storage", ["model"] if INTERPRETED else ["model", "int8", "k8v4", "int4"])
@pytest.mark.parametrize("cut", combined([1, 2, 5, SHARES], [(16, 1), (16, 4), (64, 2), (128, 8)]), ids=str)
def test_any_cut_of_a_fused_step(storage, cut):
    """The same, however the entries are cut."""
    programs, (block, warps) = cut
    case = Case("cut", (LENGTHS, (40, 2, 1, 5, 9)), group=3, dtype=FP16, gaps=False, storage=storage)
    q, layer = case.build(DEVICE)
    kernels, rows = backend.kernels(), backend.rows_of(layer)
    config = kernels.DecodeConfig(programs, block, warps=warps)
    keys, values = torch.randn(2, 2, 5, 64, device=DEVICE).to(FP16)
    ticket, seen = kernels.new_ticket(rows), torch.tensor([layer.seen], device=DEVICE)
    q_now = q[:, :, 0]
    got = kernels.ragged_step(
        q_now, keys, values, rows, layer.capacity, ticket, seen, scale=0.125, config=config
    )
    layer.seen += 1
    assert_true(got[:, :, None], case, q, layer)
    assert not ticket.any()


SMALL = Case("small", ((5, 9),))
BAD = {
    "q of another D": (lambda k, q, r: k.ragged_decode(q[..., :8], r, scale=1.0), ValueError, r"q must have shape \[B, HQ, 64\]"),
    "q of 4-D": (lambda k, q, r: k.ragged_decode(q[None], r, scale=1.0), ValueError, "q must have shape"),
    "q of float64": (lambda k, q, r: k.ragged_decode(q.double(), r, scale=1.0), TypeError, "q must be float32, bfloat16 or float16"),
    "q elsewhere": (lambda k, q, r: k.ragged_decode(q.to("meta"), r, scale=1.0), ValueError, "q must be on"),
    "q strided": (lambda k, q, r: k.ragged_decode(q.repeat(1, 1, 2)[..., ::2], r, scale=1.0), ValueError, "q must have stride 1 along D"),
    "heads that do not divide": (lambda k, q, r: k.ragged_decode(q[:, :3], r, scale=1.0), ValueError, "HQ a multiple of H"),
    "scale 0": (lambda k, q, r: k.ragged_decode(q, r, scale=0.0), ValueError, "scale must be positive"),
    "softcap 0": (lambda k, q, r: k.ragged_decode(q, r, scale=1.0, softcap=0.0), ValueError, "softcap must be None or positive"),
    "sinks too few": (lambda k, q, r: k.ragged_decode(q, r, scale=1.0, sink_logits=q[0, :3, 0].contiguous()), ValueError, r"sink_logits must be contiguous \[4\] on .*, got \[3\]"),
    "sinks of float64": (lambda k, q, r: k.ragged_extend(q[:, :, None], r, query_positions=r.length[:1, None], scale=1.0, sink_logits=q[0, :, 0].double()), TypeError, "sink_logits must be float32, bfloat16 or float16, got torch.float64"),
    "window 0": (lambda k, q, r: k.ragged_decode(q, r, scale=1.0, sliding_window=0), ValueError, "sliding_window must be"),
    "window without positions": (lambda k, q, r: k.ragged_decode(q, r, scale=1.0, sliding_window=3), ValueError, "query_positions must be given"),
    "positions of floats": (lambda k, q, r: k.ragged_extend(q[:, :, None], r, query_positions=torch.ones(1, 1), scale=1.0), TypeError, "query_positions must be int32 or int64"),
    "positions too few": (lambda k, q, r: k.ragged_extend(q[:, :, None], r, query_positions=torch.ones(2, 1).long(), scale=1.0), ValueError, r"shape \[1, 1\]"),
    "queries of 8": (lambda k, q, r: k.ExtendConfig(8, 64, 2, 4), ValueError, "queries must be a power of two from 16 to 1024, got 8"),
    "blocks of 24": (lambda k, q, r: k.ExtendConfig(16, 24, 2, 4), ValueError, "block must be a power of two"),
    "3 warps": (lambda k, q, r: k.ExtendConfig(16, 64, 2, 3), ValueError, "warps must be a power of two from 1 to 32"),
    "no stages": (lambda k, q, r: k.ExtendConfig(16, 64, 0, 4), ValueError, "stages must be a whole number from 1 to 64, got 0"),
    "cuts below 0": (lambda k, q, r: k.ExtendConfig(16, 64, 2, 4, -1), ValueError, "cuts must be a whole number from 0 to 65535, got -1"),
    "half a cut": (lambda k, q, r: k.ExtendConfig(16, 64, 2, 4, 1.5), ValueError, "cuts must be a whole number"),
    "fewer queries than heads": (lambda k, q, r: k.ragged_extend(q[:, :1, None].repeat(1, 40, 1, 1), r, query_positions=r.length[:1, None], scale=1.0, config=k.ExtendConfig(16, 64, 2, 4)), ValueError, "config must have at least 32 queries"),
    "compensation, cut": (lambda k, q, r: k.ragged_extend(q[:, :, None], replace(r, count=r.length, key_sum=torch.zeros(2, 64, device=DEVICE), value_sum=torch.zeros(2, 64, device=DEVICE)), query_positions=r.length[:1, None], scale=1.0, config=k.ExtendConfig(16, 64, 2, 4, 2)), ValueError, "with compensation entries, no cuts"),
    "keys of float64": (lambda k, q, r: replace(r, keys=r.keys.double()), TypeError, "keys must be float32, bfloat16 or float16"),
    "keys of D 513": (lambda k, q, r: replace(r, keys=torch.zeros(9, 513)), ValueError, "D from 1 to 512"),
    "codes without scales": (lambda k, q, r: replace(r, keys=r.keys.char(), values=r.values.char()), TypeError, "keys must be float32, bfloat16 or float16, got torch.int8"),
    "scales without codes": (lambda k, q, r: replace(r, scales=r.keys[:, :2].contiguous()), TypeError, "keys must be int8 or uint8 where there are scales, got torch.float32"),
    "values that are no codes": (lambda k, q, r: replace(r, keys=r.keys.char(), scales=r.keys[:, :2].contiguous()), TypeError, "values must be int8 or uint8 where there are scales, got torch.float32"),
    "values of as many bytes as channels": (lambda k, q, r: replace(r, keys=r.keys.char(), values=r.values.byte(), scales=r.keys[:, :2].contiguous()), ValueError, r"values must have shape \[20, 32\], got \[20, 64\]"),
    "4 bits of an odd D": (lambda k, q, r: replace(r, keys=r.keys[:, :5].char(), values=r.values[:, :2].byte(), scales=r.keys[:, :2]), ValueError, "values must be int8 where D is odd, got torch.uint8 and D 5"),
    "keys of D 514 in 4 bits": (lambda k, q, r: replace(r, keys=torch.zeros(9, 257, dtype=torch.uint8), scales=r.keys[:, :2]), ValueError, r"D from 1 to 512 \(in 4 bits \[slots, D // 2\]\), got \[9, 257\]"),
    "scales of float64": (lambda k, q, r: replace(r, keys=r.keys.char(), values=r.values.char(), scales=r.keys[:, :2].double()), TypeError, "scales must be float32, bfloat16 or float16, got torch.float64"),
    "keys strided": (lambda k, q, r: replace(r, keys=r.keys.repeat(1, 2)[:, :64]), ValueError, "keys must be contiguous"),
    "values of another dtype": (lambda k, q, r: replace(r, values=r.values.half()), TypeError, "values must be a tensor of torch.float32"),
    "length of int32": (lambda k, q, r: replace(r, length=r.length.int()), TypeError, "length must be a tensor of torch.int64"),
    "first entries of too few": (lambda k, q, r: replace(r, sinks=r.sinks[:1]), ValueError, r"sinks must have shape \[2\]"),
    "count without sums": (lambda k, q, r: replace(r, count=r.length), TypeError, "key_sum must be a tensor"),
    "append of another D": (lambda k, q, r: k.ragged_append(r, r.length, q[:, :2, None, :8], q[:, :2, None, :8], seen=0), ValueError, "keys must have shape"),
    "append of another dtype": (lambda k, q, r: k.ragged_append(r, r.length, *[q[:, :2, None].half()] * 2, seen=0), TypeError, "keys must be torch.float32"),
    "append elsewhere": (lambda k, q, r: k.ragged_append(r, r.length, q[:, :2, None], q[:, :2, None].to("meta"), seen=0), TypeError, "values must be torch.float32 on"),
    "step with keys of another dtype": (lambda k, q, r: k.ragged_step(q, *[q[:, :2].half()] * 2, r, r.length, k.new_ticket(r), r.length[:1], scale=1.0), TypeError, "new_keys must be torch.float32"),
    "step with keys of T 1": (lambda k, q, r: k.ragged_step(q, *[q[:, :2, None]] * 2, r, r.length, k.new_ticket(r), r.length[:1], scale=1.0), ValueError, r"new_keys must have shape \[1, 2, 64\]"),
    "step with a number seen": (lambda k, q, r: k.ragged_step(q, *[q[:, :2]] * 2, r, r.length, k.new_ticket(r), r.length, scale=1.0), ValueError, r"seen must be int64 \[1\]"),
    "step without a ticket": (lambda k, q, r: k.ragged_step(q, *[q[:, :2]] * 2, r, r.length, k.new_ticket(r)[1:], r.length[:1], scale=1.0), ValueError, r"ticket must be int32 \[1\]"),
    "valid of ints": (lambda k, q, r: k.ragged_append(r, r.length, *[q[:, :2, None]] * 2, seen=0, valid=torch.ones(1, 1)), ValueError, "valid must be bool"),
}  # fmt: skip


@device
@pytest.mark.parametrize("call, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named_before_any_launch(call, error, message):
    q, layer = SMALL.build(DEVICE)
    with pytest.raises(error, match=message):
        call(backend.kernels(), q[:, :, 0], backend.rows_of(layer))


ARGUMENTS = {
    "ragged_decode": ("q", "query_positions", "sink_logits"),
    "ragged_step": ("q", "new_keys", "new_values", "capacity", "ticket", "seen", "sink_logits"),
    "ragged_extend": ("q", "query_positions", "sink_logits"),
    "ragged_append": ("capacity", "keys", "values", "seen", "valid"),
}
ROWS = (
    "keys",
    "values",
    "scales",
    "positions",
    "start",
    "length",
    "sinks",
    "recent",
    "key_sum",
    "value_sum",
    "count",
)
FAULTS = {
    "elsewhere": lambda x: x.to("meta"),
    "of another dtype": lambda x: x.int() if x.dtype == torch.bool else x.bool(),
    "apart": lambda x: torch.stack([x, x], -1)[..., 0],
    "of another D": lambda x: x[..., :8],
    "of nothing": lambda x: x[:0],
}
if not INTERPRETED:
    FAULTS["on the CPU"] = lambda x: x.cpu()
FREE = {  # what has no D, and what is read by its strides or made dense
    "of another D": ("sink_logits", "query_positions", "capacity", "ticket", "seen", "valid"),
    "apart": ("query_positions", "ticket", "seen", "valid", "ragged_append capacity"),
}
FAULTY = [
    (launcher, name, fault)
    for launcher, names in ARGUMENTS.items()
    for name in names
    for fault in FAULTS
    if not {name, f"{launcher} {name}"} & set(FREE.get(fault, ()))
]


def call_of(launcher):
    """A call that is right: the launcher, its arguments and options, and the layer they are of."""
    kernels, (q, layer) = backend.kernels(), SMALL.build(DEVICE)
    rows, new = backend.rows_of(layer), torch.ones(1, 2, 64, device=DEVICE)
    last = torch.tensor([layer.seen - 1], device=DEVICE)
    given = {"new_keys": new, "new_values": new, "keys": new[:, :, None], "values": new[:, :, None]}
    given |= {"capacity": layer.capacity, "ticket": kernels.new_ticket(rows), "seen": last + 1}
    given |= {
        "q": q[:, :, 0],
        "query_positions": last,
        "valid": last[None] > 0,
        "sink_logits": q[0, :, 0, 0] * 1,
    }
    if launcher == "ragged_extend":
        given |= {"q": q, "query_positions": last[None]}
    options = {} if launcher == "ragged_append" else {"scale": 1.0, "sliding_window": 9}
    return getattr(kernels, launcher), {name: given[name] for name in ARGUMENTS[launcher]}, options, layer


@device
@pytest.mark.parametrize("launcher", ARGUMENTS)
def test_without_a_fault_it_runs(launcher):
    run, given, options, layer = call_of(launcher)
    run(rows=backend.rows_of(layer), **given, **options)


@device
@pytest.mark.parametrize("launcher, name, fault", FAULTY, ids=map(" ".join, FAULTY))
def test_each_argument_is_checked_before_any_launch(launcher, name, fault):
    """Spoilt one at a time, of a call that runs without a fault."""
    run, given, options, layer = call_of(launcher)
    length = layer.length.clone()
    with pytest.raises((TypeError, ValueError), match=f"^{'' if fault == 'of nothing' else name}.* must "):
        run(rows=backend.rows_of(layer), **given | {name: FAULTS[fault](given[name])}, **options)
    assert torch.equal(layer.length, length)


@device
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "of another D"])
@pytest.mark.parametrize("name", ROWS)
def test_each_tensor_of_the_rows_is_checked(name, fault):
    rows = backend.rows_of(replace(WINDOWS, storage="k8v4").build(DEVICE)[1])
    with pytest.raises((TypeError, ValueError), match=" must "):
        replace(rows, **{name: FAULTS[fault](getattr(rows, name))})


@compiled
def test_a_cpu_layer_is_refused_without_the_interpreter():
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    q, layer = SMALL.build()
    with pytest.raises(ValueError, match="keys must be on a CUDA device, got cpu .*TRITON_INTERPRET=1"):
        headkv.ragged_decode(q[:, :, 0], layer, backend="triton")


@compiled
def test_missing_kernels_name_the_install_line(monkeypatch):
    q, layer = SMALL.build()
    monkeypatch.setitem(sys.modules, "headkv_kernels", None)
    backend.kernels.cache_clear()
    try:
        with pytest.raises(ImportError, match="pip install headkv-kernels .*pip install -e ./kernels"):
            headkv.ragged_decode(q[:, :, 0], layer, backend="triton")
        assert not backend.available()
    finally:
        backend.kernels.cache_clear()


@compiled
def test_kernels_know_nothing_of_headkv():
    code = "import sys, headkv_kernels; sys.exit('headkv' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels")}
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT.parent).returncode == 0


@compiled
@pytest.mark.parametrize("wrong", [{"programs": 0}, {"gap": -1}], ids=str)
def test_a_cut_that_can_not_be(wrong):
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    with pytest.raises(ValueError, match="programs must be at least 1 and gap at least 0, got"):
        backend.kernels().DecodeConfig(**{"programs": 4, "block": 64} | wrong)
