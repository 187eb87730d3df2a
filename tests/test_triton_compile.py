"""The Triton kernels compile for GPUs that are not here. Triton's interpreter forgives types that its compiler does not.

A launch is caught on its way, and what it would have run is compiled for the target instead.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from attention_cases import Case

from headkv.attention import triton as backend

triton = pytest.importorskip("triton", reason="needs Triton: pip install triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not compile"
    ),
]
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"} | {
    **{torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8", torch.uint8: "*u8", torch.bool: "*i1"}
}
# What a program may use on the smallest of the supported GPUs, compute capability 8.6 and 8.9.
SHARED = 99 * 1024
HOPPER = (132, True, 227 * 1024)  # multiprocessors, early starts, a program's shared memory
LOAD = re.compile(r"\bld\.global|\bcp\.async\.c[ag]\.")
BF16, FP16 = torch.bfloat16, torch.float16


class Compiler:
    """Stands for a kernel: `kernel[grid](*args, **options)` compiles it for a target and keeps the result."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel, self.capability, self.compiled = kernel, capability, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(self, *args: Any, **options: Any) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        given = dict(zip(self.kernel.arg_names, args, strict=False)) | options
        self.constants, self.attributes = {}, {}
        signature = {
            parameter.name: self.describe(given.pop(parameter.name), parameter, (i,))
            for i, parameter in enumerate(self.kernel.params)
        }
        if self.kernel.is_gluon():
            from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
        source = ASTSource(self.kernel, signature, self.constants, self.attributes)
        self.compiled.append(triton.compile(source, GPUTarget("cuda", self.capability, 32), given))

    def describe(self, value: Any, parameter: Any, path: tuple[int, ...]) -> Any:
        """The type of an argument, or of the one at that path within it; notes what is constant or aligned."""
        if isinstance(value, tuple):
            return type(value)(*(self.describe(x, parameter, (*path, i)) for i, x in enumerate(value)))
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            self.constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (special and isinstance(value, int) and value % 16 == 0):
            self.attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return TYPES[value.dtype]
        return "fp32" if isinstance(value, float) else "i32"


@pytest.fixture(params=[80, 90], ids="sm_{}".format)
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Compiler]:
    """The kernels' stand-ins, by name; on a CPU's tensors."""
    from headkv_kernels import append, decode, extend, rows

    monkeypatch.setattr(rows, "on_device", lambda name, tensor: None)
    for module in (decode, extend):
        monkeypatch.setattr(module, "device_traits", lambda device: (100, request.param >= 90, 0))
    # The portable kernel; the ring's test is below.
    monkeypatch.setattr(decode, "ring_serves", lambda *arguments: False)
    stands = {}
    for module, names in (
        (decode, ("decode_shares", "combine_segments")),
        (extend, ("extend_rows", "merge_rows")),
        (append, ("append_rows",)),
    ):
        monkeypatch.setattr(module, "guard", lambda tensor: nullcontext())
        for name in names:
            stands[name] = Compiler(getattr(module, name), request.param)
            monkeypatch.setattr(module, name, stands[name])
    return stands


ROWS = ((9, 40), (1, 7))
WINDOW = {"sinks": 2, "recent": 8, "compensate": True}
CASES = [
    Case("float32, D 512", ROWS, dim=512),
    Case("bfloat16", ROWS, group=4, dim=128, dtype=BF16),
    Case("float32, compensation, softcap", ROWS, dim=80, softcap=3.0, **WINDOW),
    Case("float16, sliding window, D 256", ROWS, group=1, dim=256, dtype=FP16, sliding_window=5),
    Case("bfloat16, compensation, D 64", ROWS, group=16, dtype=BF16, **WINDOW),
    Case(
        "bfloat16, sinks, sliding window",
        ROWS,
        group=8,
        dtype=BF16,
        sliding_window=5,
        sink_logits=(1.0,),
        sink_dtype=BF16,
    ),
    Case("float32, sinks, compensation, D 80", ROWS, dim=80, sink_logits=(1.0,), **WINDOW),
]


# An older card compiles the same code with less room: two of the cases show that it does.
ON = [(90, case) for case in CASES] + [(80, case) for case in (CASES[1], CASES[3])]


@pytest.mark.parametrize(("launches", "case"), ON, ids=str, indirect=["launches"])
def test_compiles(case: Case, launches: dict[str, Compiler]) -> None:
    for tokens in (1, 3, 100):
        q, layer = replace(case, tokens=min(tokens, 3)).build()
        rows, options = backend.rows_of(layer), case.options(q) | {"scale": case.dim**-0.5}
        where = torch.arange(tokens).expand(2, tokens)
        if tokens == 1:
            backend.kernels().ragged_decode(q[:, :, 0], rows, query_positions=where[:, 0], **options)
            step = (
                *layer.keys.new_zeros(2, 2, 2, case.dim),
                rows,
                layer.capacity,
                backend.kernels().new_ticket(rows),
            )
            fused = backend.kernels().ragged_step
            fused(q[:, :, 0], *step, layer.length[:1], ahead=True, **options)
        else:
            q = q[:, :, :1].repeat(1, 1, tokens, 1)
            extend, config = backend.kernels().ragged_extend, backend.kernels().ExtendConfig.default(q, rows)
            extend(q, rows, query_positions=where, **options)
            cuts = 0 if case.compensate else 2
            extend(q, rows, query_positions=where, config=replace(config, cuts=cuts), **options)
    for tokens, valid in ((1, None), (40, torch.ones(2, 40, dtype=torch.bool))):
        new = torch.zeros(2, 2, tokens, case.dim, dtype=case.dtype)
        backend.kernels().ragged_append(rows, layer.capacity, new, new, seen=7, valid=valid)
    for name, launch in launches.items():
        if name == "merge_rows" and case.compensate:
            continue
        assert launch.compiled, name
        for compiled in launch.compiled:
            assert compiled.metadata.shared <= SHARED, f"{name} needs {compiled.metadata.shared} bytes"
            assert "tf32" not in compiled.asm["ptx"], f"{name} rounds float32 to tf32"
    for decode in launches["decode_shares"].compiled:
        assert "cp.async.cg.shared.global" in decode.asm["ptx"], (
            "keys and values are copied 16 bytes at a time"
        )
    if launches["decode_shares"].capability >= 90:  # where launches start early
        at_once, ahead = launches["decode_shares"].compiled
        assert not LOAD.search(before_the_wait(at_once)), "reads before the launch before has ended"
        assert "cp.async" not in before_the_wait(ahead), "reads more than lengths"
        for combine in launches["combine_segments"].compiled:
            assert ".cg" not in before_the_wait(combine), "segments are read before they are written"


CODES = [
    Case("int8, bfloat16, D 128", ROWS, group=4, dim=128, dtype=BF16, storage="int8"),
    Case("int8, float16, compensation, D 80", ROWS, dim=80, dtype=FP16, storage="int8", **WINDOW),
    Case("int8, a small head", ROWS, dim=8, dtype=BF16, storage="int8"),
    Case("int4, bfloat16, D 128", ROWS, group=4, dim=128, dtype=BF16, storage="int4"),
    Case("k8v4, float16, compensation, D 80", ROWS, dim=80, dtype=FP16, storage="k8v4", **WINDOW),
    Case("int4, a small head", ROWS, dim=8, dtype=BF16, storage="int4"),
    Case("int4 and 32, D 128", ROWS, group=4, dim=128, dtype=BF16, storage="int4", residual_length=32),
    Case("k8v4 and 6, D 80", ROWS, dim=80, dtype=FP16, storage="k8v4", residual_length=6, **WINDOW),
]


@pytest.mark.parametrize("launches", [90], indirect=True)
@pytest.mark.parametrize("case", CODES, ids=lambda case: case.name)
def test_rows_of_codes_compile(case: Case, launches: dict[str, Compiler]) -> None:
    """Codes are copied 16 bytes at a time, and what a program holds stays in its registers; what newest entries need
    besides is put away once a segment."""
    q, layer = case.build()
    kernels, rows = backend.kernels(), backend.rows_of(layer)
    new = torch.zeros(2, 2, 2, case.dim, dtype=case.dtype)
    step = (rows, layer.capacity, kernels.new_ticket(rows), layer.length[:1])
    kernels.ragged_step(q[:, :, 0], *new, *step, scale=1.0, ahead=True)
    kernels.ragged_append(rows, layer.capacity, *new[:, :, :, None], seen=7)
    kernels.ragged_append(rows, layer.capacity, *new[:, :, :, None], seen=7, valid=torch.ones(2, 1) > 0)
    where, config = torch.zeros(2, 1, dtype=torch.int64), kernels.ExtendConfig.default(q, rows)
    config = replace(config, cuts=0 if case.compensate else 2)
    kernels.ragged_extend(q, rows, query_positions=where, scale=1.0, config=config)
    for name, launch in launches.items():
        for compiled in launch.compiled:
            assert compiled.metadata.shared <= SHARED, f"{name} needs {compiled.metadata.shared} bytes"
            most = 512 if case.residual_length else 0
            assert spilled(compiled) <= most, f"{name} has {spilled(compiled)} bytes beside its registers"
    (decode,) = launches["decode_shares"].compiled
    assert "cp.async" in decode.asm["ptx"]
    assert ("cp.async.cg.shared.global" in decode.asm["ptx"]) == (layer.keys.shape[1] % 16 == 0)
    assert "cp.async" not in before_the_wait(decode), "reads more than lengths"


def spilled(compiled: Any) -> int:
    """Bytes of a thread's stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        return int(re.search(r"STACK:(\d+)", subprocess.check_output(command, text=True))[1])


def before_the_wait(compiled: Any) -> str:
    """The code that runs, maybe, while the launch before still does."""
    before, wait, after = compiled.asm["ptx"].partition("griddepcontrol.wait")
    assert wait and LOAD.search(after)
    return before


RINGS = [
    Case("one row, one head a group", ((40,),), group=1, dim=64, dtype=BF16),
    Case("groups of 4, D 128", ROWS, group=4, dim=128, dtype=BF16),
    Case(
        "groups of 16, softcap, windows", ROWS, group=16, dim=128, dtype=FP16, softcap=2.0, sinks=1, recent=8
    ),
]


@pytest.mark.parametrize("block, ring, warps", [(64, 4, 4), (32, 3, 2)])
@pytest.mark.parametrize("case", RINGS, ids=lambda case: case.name)
def test_the_ring_compiles(
    case: Case, block: int, ring: int, warps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small enough for a multiprocessor's shared memory."""
    at_once, ahead = through_a_ring("ring", "ring_shares", case, (block, ring, warps), monkeypatch)
    assert not LOAD.search(before_the_wait(at_once))
    assert ahead.metadata.shared <= HOPPER[2]
    assert "cp.async.cg.shared.global" in ahead.asm["ptx"]


RINGS_OF_CODES = [
    Case("int8, D 128", ROWS, group=4, dim=128, dtype=BF16, storage="int8"),
    Case(
        "k8v4, D 64, softcap, windows",
        ROWS,
        dim=64,
        dtype=FP16,
        storage="k8v4",
        softcap=2.0,
        sinks=1,
        recent=8,
    ),
    Case("int4, one head a group", ((40,),), group=1, dim=128, dtype=FP16, storage="int4"),
    Case("int4, D 64", ROWS, dim=64, dtype=BF16, storage="int4"),
]


@pytest.mark.parametrize("case", RINGS_OF_CODES, ids=lambda case: case.name)
def test_the_ring_of_codes_compiles(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """It multiplies bytes as they are stored, and holds all it needs in registers: what changes hands does so in
    shared memory once a row, never in its loop."""
    at_once, ahead = through_a_ring("ring_codes", "ring_codes", case, (256, 2, 4), monkeypatch)
    assert not LOAD.search(before_the_wait(at_once))
    for compiled in (at_once, ahead):
        assert 114 * 1024 < compiled.metadata.shared <= HOPPER[2], "one program a multiprocessor"
        assert spilled(compiled) == 0
        before, product, rest = compiled.asm["ptx"].partition(
            "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"
        )
        assert product and "st.shared" not in rest[: rest.rindex(product)]
        assert ".bf16x2" not in compiled.asm["ptx"] and ".f16x2" not in compiled.asm["ptx"], (
            "a code is widened"
        )


def moved(layer: Any, name: str, numbers: int) -> None:
    """The same pool, that many numbers behind the beginning of a storage."""
    pool = getattr(layer, name)
    storage = torch.zeros(pool.numel() + numbers, dtype=pool.dtype)
    setattr(layer, name, storage[numbers:].view(pool.shape))


SERVED = Case("served", ROWS, group=4, dim=128, dtype=BF16, storage="int8")


@pytest.mark.parametrize(
    ("served", "case", "cut", "change"),
    [
        (True, SERVED, (256, 2, 4), None),
        (True, replace(SERVED, storage="model", group=16), (64, 4, 4), None),
        (True, SERVED, (256, 2, 4), ("keys", 16)),
        (True, SERVED, (256, 2, 4), ("scales", 2)),
        (False, SERVED, (256, 2, 4), ("keys", 8)),
        (False, SERVED, (256, 2, 4), ("scales", 1)),
        (False, replace(SERVED, storage="model"), (64, 4, 4), ("values", 4)),
        (False, SERVED, (256, 4, 4), None),  # more than a multiprocessor's memory
        (True, replace(SERVED, storage="int4"), (256, 4, 4), None),
        (False, SERVED, (512, 2, 16), None),
        (False, SERVED, (64, 2, 4), None),
        (False, SERVED, (256, 1, 4), None),
        (False, replace(SERVED, group=5), (256, 2, 4), None),
        (False, replace(SERVED, dim=80), (256, 2, 4), None),
        (False, replace(SERVED, dtype=torch.float32), (256, 2, 4), None),
        (False, replace(SERVED, residual_length=8), (256, 2, 4), None),
        (False, replace(SERVED, sliding_window=5), (256, 2, 4), None),
        (False, replace(SERVED, **WINDOW), (256, 2, 4), None),
    ],
)
def test_which_rows_go_through_a_ring(
    served: bool, case: Case, cut: tuple[int, int, int], change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headkv_kernels import decode
    from headkv_kernels import rows as tables

    monkeypatch.setattr(tables, "on_device", lambda name, tensor: None)
    monkeypatch.setattr(decode, "device_traits", lambda device: HOPPER)
    q, layer = case.build()
    if change:
        moved(layer, *change)
    (block, ring, warps), rows = cut, backend.rows_of(layer)
    config = decode.DecodeConfig(132, block, warps=warps, ring=ring, early=True)
    assert decode.ring_serves(config, rows, q[:, :, 0], case.group, case.sliding_window) == served


def through_a_ring(
    file: str, name: str, case: Case, cut: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> list[Any]:
    """The kernel of that name, compiled for Hopper: for a launch after the one before, and for a step that starts
    ahead."""
    from headkv_kernels import decode, rows

    module = import_module(f"headkv_kernels.{file}")
    monkeypatch.setattr(rows, "on_device", lambda name, tensor: None)
    monkeypatch.setattr(decode, "guard", lambda tensor: nullcontext())
    monkeypatch.setattr(decode, "device_traits", lambda device: HOPPER)
    stand = Compiler(getattr(module, name), 90)
    monkeypatch.setattr(module, name, stand)
    monkeypatch.setattr(decode, "combine_segments", Compiler(decode.combine_segments, 90))
    q, layer = case.build()
    batch, (block, ring, warps) = layer.batch_size, cut
    kernels, ragged = backend.kernels(), backend.rows_of(layer)
    config = kernels.DecodeConfig(132, block, warps=warps, ring=ring, early=True)
    new = torch.zeros(2, batch, layer.rows // batch, case.dim, dtype=case.dtype)
    options = {"scale": 1.0, "softcap": case.softcap, "config": config}
    kernels.ragged_decode(q[:, :, 0], ragged, **options)
    step = (ragged, layer.capacity, kernels.new_ticket(ragged), layer.length[:1])
    kernels.ragged_step(q[:, :, 0], *new, *step, ahead=True, **options)
    return stand.compiled
