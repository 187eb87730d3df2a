"""One layer's decode step on a GPU, beside a launch that only reads the same bytes and dense attention.

    PYTHONPATH=.:kernels python3 benchmarks/gpu_attention.py [--out FILE.json] [--only PART] [--profile NAME]

Shape of Llama-3.1-8B: 8 KV heads, 4 query heads each, D 128, bfloat16. The rows' lengths are skewed (Dirichlet 1), as
head-specific budgets leave them; dense attention gets as many entries, in rows of equal length. Medians of CUDA graph
replays over 16 layers of their own, so that no layer is found in the L2 cache; a step appends the new token, attends,
and combines. Every variant is held against float64 before it is timed and after.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from two_launches import decode_in_two

from headkv_kernels import DecodeConfig, Rows, new_tickets, ragged_append, ragged_step

HEADS, GROUP, DIM, LAYERS, HEADROOM = 8, 4, 128, 16, 512
ENTRIES = (26214, 6553, 1638)  # kept entries a head: 20% of 128k, 32k and 8k
SCALE = 1 / math.sqrt(DIM)
DENSE = {"dense, cuDNN": SDPBackend.CUDNN_ATTENTION, "dense, flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Layer:
    """One layer's rows, the room they have, and what a step brings."""

    rows: Rows
    capacity: Tensor
    q: Tensor
    new: Tensor
    seen: Tensor
    tickets: Tensor
    begun: Tensor

    def rewind(self) -> None:
        """Back to the length it began with."""
        self.rows.length.copy_(self.begun)


def make_layer(entries: int, device: str) -> Layer:
    """8 rows with `entries` entries on average."""
    share = torch.distributions.Dirichlet(torch.ones(HEADS)).sample()
    length = (share * entries * HEADS).long().clamp(min=64)
    capacity = length + HEADROOM
    start, slots = capacity.cumsum(0) - capacity, int(capacity.sum())
    pools = torch.randn(2, slots, DIM, device=device).to(torch.bfloat16)
    whole = {"length": length, "start": start, "sinks": torch.zeros(HEADS), "recent": torch.zeros(HEADS)}
    whole = {name: tensor.long().to(device) for name, tensor in whole.items()}
    rows = Rows(*pools, torch.zeros(slots, dtype=torch.int32, device=device), **whole)
    q = torch.randn(1, HEADS * GROUP, DIM, device=device).to(torch.bfloat16)
    new = torch.randn(2, 1, HEADS, DIM, device=device).to(torch.bfloat16)
    seen = torch.tensor([int(length.max())], device=device)
    return Layer(rows, capacity.to(device), q, new, seen, new_tickets(rows), rows.length.clone())


Step = Callable[[Layer], Tensor]


def error(layer: Layer, step: Step) -> float:
    """Relative distance of one step from attention in float64, over what the rows hold after it."""
    before = layer.rows.length.clone()
    got = step(layer)[0].double()
    if not torch.equal(layer.rows.length, before + 1) or layer.tickets.any():
        raise AssertionError(
            f"lengths {before.tolist()} -> {layer.rows.length.tolist()}, {layer.tickets.tolist()}"
        )
    want = []
    for r, (begin, n) in enumerate(zip(layer.rows.start.tolist(), layer.rows.length.tolist(), strict=True)):
        keys, values = (pool[begin : begin + n].double() for pool in (layer.rows.keys, layer.rows.values))
        if not torch.equal(torch.stack([keys[-1], values[-1]]), layer.new[:, 0, r].double()):
            raise AssertionError(f"row {r} did not get its new entry")
        q = layer.q[0, r * GROUP : (r + 1) * GROUP].double()
        want.append((q @ keys.T * SCALE).softmax(-1) @ values)
    return float((got - torch.cat(want)).norm() / torch.cat(want).norm())


def microseconds(step: Callable[[], object], replays: int) -> float:
    """Median time of one layer in a CUDA graph whose replay is `step`, which runs all layers."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for _ in range(replays + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / LAYERS)
    return statistics.median(times[3:])


@triton.jit
def read(words, out, number, BLOCK: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr):
    """Reads all words and stores one sum a program: what no attention can undercut."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros([BLOCK], tl.int32)
    blocks = tl.cdiv(number, BLOCK)
    for i in tl.range(program * blocks // programs, (program + 1) * blocks // programs, num_stages=STAGES):
        at = i * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(words + at, mask=at < number, other=0)
    tl.store(out + program, tl.sum(total))


def time_read(layers: list[Layer], replays: int) -> float:
    """The best of a few ways to read as many bytes as the layers' entries have."""
    device = layers[0].q.device
    sizes = [int(layer.rows.length.sum()) * DIM * 2 * 2 // 4 for layer in layers]
    pools = [torch.randint(0, 9, (size,), dtype=torch.int32, device=device) for size in sizes]
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    early = torch.cuda.get_device_capability(device)[0] >= 9
    best = math.inf
    for (block, warps), programs, stages in itertools.product(((4096, 8), (8192, 16)), (1, 2, 4), (3,)):
        out = torch.empty(programs * processors, dtype=torch.int32, device=device)
        launch = {"num_warps": warps} | ({"launch_pdl": True} if early else {})

        def step(block=block, stages=stages, out=out, launch=launch) -> None:
            for pool, size in zip(pools, sizes, strict=True):
                read[(out.numel(),)](pool, out, size, block, stages, early, **launch)

        best = min(best, microseconds(step, replays))
    return best


def time_dense(entries: int, backend: SDPBackend, replays: int) -> float:
    """torch's own attention over equal rows of as many entries; NaN where it refuses."""
    shape = (2, 1, HEADS, entries, DIM)
    pools = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(LAYERS)]
    q = torch.randn(1, HEADS * GROUP, 1, DIM, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        for keys, values in pools:
            F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    try:
        with sdpa_kernel(backend):
            return microseconds(step, replays)
    except RuntimeError:
        return math.nan


def in_two(config: DecodeConfig) -> Step:
    """The step in three launches: append, shares, combine."""

    def step(layer: Layer) -> Tensor:
        ragged_append(layer.rows, layer.capacity, *layer.new[:, :, :, None], seen=layer.seen)
        return decode_in_two(layer.q, layer.rows, SCALE, config)

    return step


def in_one(config: DecodeConfig, ahead: bool) -> Step:
    """The step in one launch. Two layers lie in two places, so what `ahead` asks for holds."""

    def step(layer: Layer) -> Tensor:
        tensors = (*layer.new, layer.rows, layer.capacity, layer.tickets, layer.seen)
        return ragged_step(layer.q, *tensors, scale=SCALE, ahead=ahead, config=config)

    return step


def variants() -> dict[str, Step]:
    """What is compared, by name. C is for Hopper; where it does not exist, it is not listed."""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    hopper = torch.cuda.get_device_capability()[0] >= 9
    base = DecodeConfig(processors, 64, early=hopper)
    shapes = {f"B 64x3 w4, prefetch {n}": replace(base, prefetch=n) for n in (0, 64, 128, 256)}
    shapes |= {
        "B 64x3 w4, warps together": replace(base, split=False, prefetch=128),
        "B 64x4 w4": replace(base, stages=4, prefetch=128),
        "B 128x2 w8": replace(base, block=128, stages=2, warps=8, prefetch=128),
        "B 128x3 w8": replace(base, block=128, warps=8, prefetch=128),
        "B 32x4 w2, 2 a SM": replace(base, programs=2 * processors, block=32, stages=4, warps=2, prefetch=64),
        "B 64x2 w4, 2 a SM": replace(base, programs=2 * processors, stages=2, prefetch=64),
    }
    if hopper:
        for block, ring, warps, times, prefetch in RINGS:
            config = replace(base, programs=times * processors, block=block, warps=warps, prefetch=prefetch)
            more = ("" if times == 1 else f", {times} a SM") + (f", prefetch {prefetch}" if prefetch else "")
            shapes[f"C {block}x{ring} w{warps}{more}"] = replace(config, ring=ring)
    found = {"A two launches + append": in_two(base)}
    if hopper:
        found["A, no early start"] = in_two(replace(base, early=False))
    for name, config in shapes.items():
        found[name] = in_one(config, ahead=hopper)
    for name, config in shapes.items() if hopper else ():
        if name in ("B 64x3 w4, prefetch 0", "C 64x3 w4"):
            found[f"{name}, early but safe"] = in_one(config, ahead=False)
            found[f"{name}, no early start"] = in_one(replace(config, early=False), ahead=False)
    return found


# Of C: entries a block, blocks in the ring, warps, programs a multiprocessor, entries asked for after the ring's.
RINGS = (
    *((64, 3, 4, 1, 0), (64, 3, 4, 1, 64), (64, 3, 4, 1, 256), (64, 2, 4, 1, 128), (64, 6, 4, 1, 0)),
    *((32, 6, 2, 1, 0), (32, 3, 2, 2, 0), (32, 3, 2, 2, 64), (64, 3, 4, 2, 0), (128, 2, 8, 1, 0)),
)


def measure(entries: int, options: argparse.Namespace) -> dict[str, float]:
    """One column of the table, in microseconds a layer; what fails is NaN, with the reason printed."""
    layers = [make_layer(entries, "cuda") for _ in range(LAYERS)]
    size = sum(int(layer.rows.length.sum()) for layer in layers) / LAYERS * DIM * 2 * 2
    column = {"KV megabytes a layer": size / 1e6}
    print(f"\n{entries} entries a head, {size / 1e6:.1f} MB a layer: microseconds, error before, error after")

    def note(name: str, time: float, *errors: float) -> None:
        column[name] = time
        print(f"  {name:42s}{time:9.2f}" + "".join(f"{e:10.1e}" for e in errors), flush=True)

    if not options.only:
        note("a launch that only reads", time_read(layers, options.replays))
        for name, backend in DENSE.items():
            note(name, time_dense(entries, backend, options.replays))
    for name, step in variants().items():
        if not name.startswith(options.only):
            continue
        for layer in layers:
            layer.rewind()
            layer.tickets.zero_()
        try:
            first = error(layers[0], step)
            time = microseconds(lambda step=step: [step(layer) for layer in layers], options.replays)
            steps = int((layers[1].rows.length - layers[1].begun)[0])
            if steps != options.replays + 5:  # two to warm up, three replays that do not count
                raise AssertionError(f"{steps} steps were counted instead of {options.replays + 5}")
            note(name, time, first, max(error(layer, step) for layer in layers[::5]))
        except Exception as problem:  # the others still count
            column[name] = math.nan
            print(f"  {name:42s} failed: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
    return column


def profile(name: str) -> None:
    """A few launches of one variant at each size, for a profiler to look at."""
    for entries in ENTRIES:
        layers = [make_layer(entries, "cuda") for _ in range(4)]
        for layer in layers:
            variants()[name](layer)
        torch.cuda.synchronize()


def main() -> None:
    """Check, measure, print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replays", type=int, default=30, help="graph replays, of which the median counts")
    parser.add_argument("--only", default="", help="only variants whose name begins so")
    parser.add_argument("--profile", help="only launch this variant, by its full name, a few times")
    parser.add_argument("--out", type=Path, help="write the table as JSON, with the machine's name")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_attention: needs a CUDA device; torch sees none")
    torch.manual_seed(0)
    if options.profile:
        return profile(options.profile)
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    table: dict[int, dict[str, float]] = {}
    for entries in ENTRIES:
        table[entries] = measure(entries, options)
        if options.out:  # what is known so far
            options.out.write_text(json.dumps({"machine": machine, "table": table}, indent=1) + "\n")
    print(f"\n{machine}; microseconds a layer, median of {options.replays}")
    print(f"{'entries a head':44s}" + "".join(f"{entries:>10d}" for entries in table))
    for name in next(iter(table.values())):
        print(f"{name:44s}" + "".join(f"{column[name]:10.2f}" for column in table.values()))


if __name__ == "__main__":
    main()
