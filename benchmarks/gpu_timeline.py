"""When each part of a decode step happens on a GPU: the kernels of the step, with the GPU's clock read in between.

    PYTHONPATH=.:kernels python3 benchmarks/gpu_timeline.py

Copies of the kernels for Hopper get lines that read the clock, and store it last. Layers, rows and graphs are those of
`gpu_attention.py`. Zero is where the launch before has ended for the first program; the clock ticks in quarters of a
microsecond.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from gpu_attention import ENTRIES, LAYERS, SCALE, default_config, make_layer, microseconds
from torch import Tensor

import headkv_kernels
from headkv_kernels import combine, decode, ring

CLOCK = "tl.extra.cuda.globaltimer()"
# Before which line of a kernel which moment is noted.
SHARES = {
    "started": "    program, programs = gl.program_id(0), gl.num_programs(0)\n    lse =",
    "planned": "    pairs: gl.constexpr = gl.SliceLayout(2, copied)\n",
    "may go on": "    while unit < stop:\n",
    "query asked": "        acc = gl.zeros([WARPS, D, M], gl.float32, layout=mma)\n",
    "entries done": "        # One softmax out of all parts",
    "parts merged": "        place = (program + segment.row) * G + g\n",
    "stored": "        unit = segment.unit_end\n        if unit",
}
COMBINE = {
    "started": "    row, g = tl.program_id(0) // G",
    "planned": "    if EARLY:\n        tl.extra.cuda.gdc_wait()",
    "may go on": "    top, total, acc = -float",
    "combined": "    result = acc",
}


def with_clock(module: ModuleType, kernel: str, language: str, moments: dict[str, str], folder: str) -> Any:
    """The kernel of `module`, its last function, noting the moments and its end in `clock` `[programs, 16]`."""
    source = Path(str(module.__file__)).read_text()
    last = next(name for name in ("partial", "out") if f", {name},\n    PAD: " in source)
    changes = {f", {last},\n    PAD: ": f", {last}, clock,\n    PAD: "}
    for i, line in enumerate(moments.values()):
        indent = line[: len(line) - len(line.lstrip())]
        noted = range(len(moments)) if i == 0 else (i,)  # all have a value, also in programs without a share
        changes[line] = "".join(f"{indent}t{j} = {CLOCK}\n" for j in noted) + line
    for line, changed in changes.items():
        if source.count(line) != 1:
            raise ValueError(
                f"{module.__name__} must have this once, got it {source.count(line)} times: {line!r}"
            )
        source = source.replace(line, changed)
    place = f"({language}.program_id(0) * {language}.num_programs(1) + {language}.program_id(1)) * 16"
    source += f"    end = {CLOCK}\n    where = clock + {place}\n"
    for i, moment in enumerate((*(f"t{i}" for i in range(len(moments))), "end")):
        source += f"    {language}.store(where + {i}, {moment})\n"
    path = Path(folder) / f"{kernel}_with_clock.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = made
    spec.loader.exec_module(made)
    return getattr(made, kernel)


class Clocked:
    """Stands for a kernel: launches the one with a clock, a layer's `clock` after its other arguments."""

    def __init__(self, kernel: Any, clocks: list[Tensor]) -> None:
        self.kernel, self.clocks, self.launched = kernel, clocks, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            clock = self.clocks[self.launched % len(self.clocks)]
            self.launched += 1
            self.kernel[grid](*args, clock, **options)

        return launch


def main() -> None:
    """Run, print."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9:
        sys.exit("gpu_timeline: needs a CUDA device of compute capability 9.0: the kernels are for Hopper")
    torch.manual_seed(0)
    default = default_config()
    with tempfile.TemporaryDirectory() as folder:
        shares = with_clock(ring, "ring_shares", "gl", SHARES, folder)
        combined = with_clock(combine, "combine_segments", "tl", COMBINE, folder)
        for entries in ENTRIES:
            layers = [make_layer(entries, "cuda") for _ in range(LAYERS)]
            clocks = [
                [torch.zeros(1024, 16, dtype=torch.int64, device="cuda") for _ in layers] for _ in range(2)
            ]
            ring.ring_shares, decode.combine_segments = (
                Clocked(kernel, own) for kernel, own in zip((shares, combined), clocks, strict=True)
            )

            def step(layers=layers) -> None:
                for layer in layers:
                    tensors = (*layer.new, layer.rows, layer.capacity, layer.ticket, layer.seen)
                    headkv_kernels.ragged_step(layer.q, *tensors, scale=SCALE, ahead=True, config=default)

            took = microseconds(step, 20)
            print(f"\n{entries} entries a head: {took:.2f} us a layer; first, median and last program, us")
            begins = [float(clock[clock[:, 0] > 0][:, 2].min()) for clock in clocks[0]]
            for name, own, moments in (("shares", clocks[0], SHARES), ("combine", clocks[1], COMBINE)):
                for i, moment in enumerate((*moments, "ended")):
                    found = [
                        (clock[clock[:, 0] > 0][:, i].double() - begin) / 1e3
                        for clock, begin in zip(own[1:-1], begins[1:-1], strict=True)
                    ]
                    three = (
                        statistics.median(float(f(x)) for x in found)
                        for f in (torch.min, torch.median, torch.max)
                    )
                    print(f"  {name:8s} {moment:14s}" + "".join(f"{us:9.2f}" for us in three))


if __name__ == "__main__":
    main()
