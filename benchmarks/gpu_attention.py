"""One layer's decode attention on a GPU, beside a launch that only reads the same bytes and dense attention.

    PYTHONPATH=.:kernels python benchmarks/gpu_attention.py [--skip-tests] [--sweep] [--out FILE.json]

Shape of Llama-3.1-8B: 8 KV heads, 4 query heads each, D 128, bfloat16. The rows' lengths are skewed (Dirichlet 1), as
head-specific budgets leave them; dense attention gets as many entries, in rows of equal length. Medians of CUDA graph
replays over 16 layers of their own, so that no layer is found in the L2 cache. The kernels' tests run first, compiled.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from headkv_kernels import DecodeConfig, Rows, ragged_append, ragged_decode

ROOT = Path(__file__).resolve().parents[1]
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
    new = torch.randn(2, 1, HEADS, 1, DIM, device=device).to(torch.bfloat16)
    return Layer(rows, capacity.to(device), q, new, torch.tensor([int(length.max())], device=device))


def error(layer: Layer) -> float:
    """Relative distance of decode from attention in float64."""
    got = ragged_decode(layer.q, layer.rows, scale=SCALE)[0].double()
    want = []
    for r, (begin, n) in enumerate(zip(layer.rows.start.tolist(), layer.rows.length.tolist(), strict=True)):
        keys, values = (pool[begin : begin + n].double() for pool in (layer.rows.keys, layer.rows.values))
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
    for (block, warps), programs, stages in itertools.product(((4096, 8), (8192, 16)), (1, 2, 4), (1, 3)):
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


def time_decode(
    layers: list[Layer], replays: int, config: DecodeConfig | None = None, append: bool = False
) -> float:
    """Our kernels: first pass and combine, and before them, if asked, the append of the new token."""

    def step() -> None:
        for layer in layers:
            if append:
                ragged_append(layer.rows, layer.capacity, *layer.new, seen=layer.seen)
            ragged_decode(layer.q, layer.rows, scale=SCALE, config=config)

    return microseconds(step, replays)


def sweep(layers: list[Layer], replays: int) -> list[tuple[float, str]]:
    """Other ways to cut the work, fastest first."""
    default, found = DecodeConfig.default(layers[0].rows), []
    blocks = ((32, 4), (64, 4), (64, 8), (128, 4), (128, 8))
    for (block, warps), stages, times in itertools.product(blocks, (2, 3, 4, 5), (1, 2, 3)):
        shared = block * DIM * 2 * 2 * max(stages - 1, 1) * times
        if shared > 200 * 1024 or shared < 32 * 1024:
            continue
        config = DecodeConfig(default.programs * times, block, stages, warps, default.early)
        name = f"block {block}, stages {stages}, warps {warps}, {times} a multiprocessor"
        found.append((time_decode(layers, replays, config), name))
    late = DecodeConfig(default.programs, default.block, default.stages, default.warps, early=False)
    found.append((time_decode(layers, replays, late), "default, but no early start"))
    return sorted(found)


def measure(entries: int, options: argparse.Namespace) -> dict[str, float]:
    """One column of the table, in microseconds a layer."""
    layers = [make_layer(entries, "cuda") for _ in range(LAYERS)]
    size = sum(int(layer.rows.length.sum()) for layer in layers) / LAYERS * DIM * 2 * 2
    column = {"KV megabytes a layer": size / 1e6, "error against float64": error(layers[0])}
    if options.sweep:
        for time, name in sweep(layers, 10)[:10]:
            print(f"  {entries:6d} entries: {time:6.2f} us  {name}", flush=True)
    column["ours: decode"] = time_decode(layers, options.replays)
    # Every replay appends one token to every row, and the headroom must last.
    column["ours: append + decode"] = time_decode(layers, min(options.replays, HEADROOM - 10), append=True)
    del layers
    for name, backend in DENSE.items():
        column[name] = time_dense(entries, backend, options.replays)
    layers = [make_layer(entries, "cuda") for _ in range(LAYERS)]
    column["a launch that only reads"] = time_read(layers, options.replays)
    column["terabytes a second, ours"] = size / column["ours: decode"] / 1e6
    return column


def main() -> None:
    """Check, measure, print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--skip-tests", action="store_true", help="only measure")
    parser.add_argument(
        "--sweep", action="store_true", help="also time other block sizes (a minute or two more)"
    )
    parser.add_argument("--replays", type=int, default=40, help="graph replays, of which the median counts")
    parser.add_argument("--out", type=Path, help="write the table as JSON, with the machine's name")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_attention: needs a CUDA device; torch sees none")
    if not options.skip_tests:
        tests = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-p",
            "no:cacheprovider",
            "tests/test_triton.py",
        ]
        if subprocess.run(tests, cwd=ROOT).returncode != 0:
            sys.exit("gpu_attention: the kernels are wrong, so their times mean nothing")
    torch.manual_seed(0)
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    table = {entries: measure(entries, options) for entries in ENTRIES}
    print(f"\n{machine}; microseconds a layer, median of {options.replays}")
    print(f"{'entries a head':26s}" + "".join(f"{entries:>11d}" for entries in table))
    for name in next(iter(table.values())):
        print(f"{name:26s}" + "".join(f"{column[name]:11.4g}" for column in table.values()))
    if options.out:
        options.out.write_text(json.dumps({"machine": machine, "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
