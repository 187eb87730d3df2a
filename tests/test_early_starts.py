"""Kernels that start before the one before them has ended read nothing of it too early: thousands of rounds on a GPU.

A producer lets the next kernel start at once, dawdles, and only then writes. What is not yet written is NaN, so that a
load which a compiler moved above the wait for the producer shows: in an output, or in the bits of the rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import headkv
from headkv.attention import triton as backend
from headkv.cache.ragged import Storage
from headkv.cache.residual import NAMES as RESIDUAL

triton = pytest.importorskip("triton", reason="needs Triton: pip install triton")
tl = triton.language
pytestmark = pytest.mark.gpu

ROUNDS = 4000
HEADS, GROUP, DIM = 2, 4, 128
# Of a round: P writes the next query, key and value; A and B are steps over either layer with the last of them.
TURNS = "PABABPAPBPBA"
NEW = (HEADS * GROUP + 2 * HEADS) * DIM  # numbers that a producer writes


@triton.jit
def produce(source, target, clock, number, BLOCK: tl.constexpr):
    """Writes the round's numbers, up to 7 microseconds after it has let the next kernel start."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    at, now = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.load(clock)
    numbers = tl.load(source + now * number + at, mask=at < number)
    began = tl.extra.cuda.globaltimer()
    time = began
    while time - began < now % 8 * 1000:
        time = tl.extra.cuda.globaltimer()
    tl.store(target + at, numbers, mask=at < number)


@triton.jit
def consume(target, results, clock, number, WAIT: tl.constexpr, BLOCK: tl.constexpr):
    """Reads what a producer writes, after it has waited for it or before."""
    if WAIT:
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    numbers = tl.load(target + at, mask=at < number)
    if not WAIT:
        tl.extra.cuda.gdc_wait()
    tl.store(results + tl.load(clock) * number + at, numbers, mask=at < number)


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs a GPU of compute capability 9.0: launches start early from there on")


def rounds(play: Any, clock: Tensor) -> None:
    """`play` records one round, which reads its number from `clock`; all of them are replayed."""
    play()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        play()
        clock.add_(1)
    for _ in range(ROUNDS):
        graph.replay()
    torch.cuda.synchronize()


@pytest.mark.parametrize("waits", [False, True], ids=["without a wait", "with a wait"])
def test_who_does_not_wait_reads_nan(waits: bool) -> None:
    """What the other test relies on: launches do start early, and then there is NaN to be seen."""
    torch.manual_seed(0)
    source = torch.randn(ROUNDS, NEW, device="cuda")
    target, results = torch.empty(NEW, device="cuda"), torch.empty_like(source)
    clock = torch.zeros(1, dtype=torch.int64, device="cuda")
    blocks = (triton.cdiv(NEW, 256),)

    def play() -> None:
        target.fill_(torch.nan)
        produce[blocks](source, target, clock, NEW, BLOCK=256, launch_pdl=True)
        consume[blocks](target, results, clock, NEW, WAIT=waits, BLOCK=256, launch_pdl=True)

    rounds(play, clock)
    assert torch.equal(results, source) == waits
    assert bool(results.isnan().any()) != waits


@pytest.mark.parametrize("fresh", ["as it was", "NaN"])
@pytest.mark.parametrize("kernel", ["ring", "portable", "int8", "int4", "portable int4", "int4 and 8"])
def test_steps_that_read_at_once(kernel: str, fresh: str) -> None:
    """Right after their producer, and right after one another, steps are to the bit what they are one at a time.

    `fresh` is what memory holds that a step asks for. Filling it takes a launch between the producer and the step, but
    there the step's second kernel would read NaN from the first.
    """
    kernels = backend.kernels()
    storage, _, newest = kernel.removeprefix("portable ").partition(" and ")
    how = ("model" if storage in ("ring", "portable") else storage, int(newest or 0))
    rows = backend.rows_of(layers(*how)[0])
    config = kernels.DecodeConfig.default(rows, ring=not kernel.startswith("portable"))
    if not config.early:
        pytest.skip("needs a Triton whose kernels can wait for the launch before: gdc_wait")
    assert bool(config.ring) == (kernel in ("ring", "int8", "int4"))
    torch.use_deterministic_algorithms(fresh == "NaN", warn_only=True)
    try:
        got, want = (steps(replace(config, early=early), *how) for early in (True, False))
    finally:
        torch.use_deterministic_algorithms(False)
    assert bool(want["outputs"].isfinite().all())
    wrong = (got["outputs"] != want["outputs"]).flatten(1).any(1).nonzero()[:, 0].tolist()
    assert not wrong, f"{len(wrong)} of {ROUNDS} rounds, first {wrong[0]}"
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


def layers(storage: Storage, newest: int) -> list[headkv.RaggedLayer]:
    """Two of them, with room for a round."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for lengths in ((700, 33), (5, 1300)):
        rows = [tuple(torch.randn(2, n, DIM, generator=generator).bfloat16()) for n in lengths]
        made.append(headkv.RaggedLayer.from_rows([rows], headroom=len(TURNS)))
        made[-1].quantise(storage, newest)
        made[-1].to("cuda")
    return made


def steps(config: Any, storage: Storage, newest: int) -> dict[str, Tensor]:
    """The outputs of all rounds, and the rows after the last."""
    kernels, both = backend.kernels(), layers(storage, newest)
    rows = [backend.rows_of(layer) for layer in both]
    changed = ("length", *(RESIDUAL if newest else ()))
    begun = [{name: getattr(layer, name).clone() for name in changed} for layer in both]
    tickets = [kernels.new_ticket(row) for row in rows]
    free = [headroom(layer) for layer in both]
    clock = torch.zeros(1, dtype=torch.int64, device="cuda")
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (TURNS.count("P"), ROUNDS, NEW)
    sources = torch.randn(shape, device="cuda", generator=generator).bfloat16()
    targets = torch.empty(len(sources), NEW, device="cuda", dtype=torch.bfloat16)
    taken = len(TURNS) - len(sources)
    outputs = torch.full((ROUNDS, taken, HEADS * GROUP, DIM), torch.nan, device="cuda").bfloat16()
    launch = {"launch_pdl": True} if config.early else {}

    def play() -> None:
        targets.fill_(torch.nan)
        for row, old, slots in zip(rows, begun, free, strict=True):
            for name, tensor in old.items():
                getattr(row, name).copy_(tensor)
            for pool in (row.keys, row.values) if row.scales is None else (row.scales,):
                pool.index_fill_(0, slots, torch.nan)
        producers, found = iter(zip(sources, targets, strict=True)), []
        for turn in TURNS:
            if turn == "P":
                source, target = next(producers)
                produce[(triton.cdiv(NEW, 256),)](source, target, clock, NEW, BLOCK=256, **launch)
                q, new = target.split([HEADS * GROUP * DIM, 2 * HEADS * DIM])
                q, new = q.view(1, -1, DIM), new.view(2, 1, HEADS, DIM)
                continue
            i = "AB".index(turn)
            step = (q, *new, rows[i], both[i].capacity, tickets[i], clock)
            found.append(kernels.ragged_step(*step, scale=DIM**-0.5, ahead=config.early, config=config))
        outputs.index_copy_(0, clock, torch.cat(found)[None])

    rounds(play, clock)
    names = ("keys", "values", "length", *(() if rows[0].scales is None else ("scales",)))
    kept = {f"{name} {i}": getattr(row, name) for i, row in enumerate(rows) for name in names}
    return {"outputs": outputs, "tickets": torch.cat(tickets)} | kept


def headroom(layer: headkv.RaggedLayer) -> Tensor:
    """The slots that no entry has."""
    taken = torch.zeros(layer.keys.shape[0], dtype=torch.bool, device="cuda")
    for begin, n in zip(layer.start.tolist(), layer.length.tolist(), strict=True):
        taken[begin : begin + n] = True
    return (~taken).nonzero()[:, 0]
