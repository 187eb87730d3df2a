"""One layer's decode step on a GPU, beside a launch that only reads, dense attention, and others' kernels.

    PYTHONPATH=.:kernels python3 benchmarks/gpu_attention.py [--search [entries] [codes]] [--json FILE] [--profile NAME]

Shape of Llama-3.1-8B: 8 KV heads, 4 query heads each, D 128, bfloat16, and the same entries as codes of 8 or 4 bits, by
the names of their storages. The rows' lengths are skewed (Dirichlet 1), as head-specific budgets leave them; dense
attention gets as many entries, in rows of equal length. Medians of CUDA graph replays over 16 layers of their own, so
that no layer is found in the L2 cache; a step appends the new token, attends, and combines; of the others, those do
whose name says so. What reads ragged rows is held against float64 before it is timed and after, but for torch's varlen
attention as published code calls it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from measure import NOT_COUNTED, in_turns, replay_microseconds
from rivals import RIVALS, Rival
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from headkv.cache.layout import rows_of_slots
from headkv.cache.quantised import BITS, bits_of, quantised, quantised_pools, restored
from headkv.cache.quantised import entries as entries_at
from headkv.cache.rows import Pools
from headkv_kernels import DecodeConfig, Rows, new_ticket, ragged_step

HEADS, GROUP, DIM, LAYERS, HEADROOM = 8, 4, 128, 16, 512
ENTRIES = (26214, 6553, 1638)  # kept entries a head: 20% of 128k, 32k and 8k
SCALE = 1 / math.sqrt(DIM)
WRONG = 1e-2  # a relative distance from float64 that 16 bits do not explain
DENSE = {"dense, cuDNN": SDPBackend.CUDNN_ATTENTION, "dense, flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Layer:
    """One layer's rows, the room they have, and what a step brings."""

    rows: Rows
    capacity: Tensor
    q: Tensor
    new: Tensor
    seen: Tensor
    ticket: Tensor
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
    return Layer(rows, capacity.to(device), q, new, seen, new_ticket(rows), rows.length.clone())


def pools_of(layer: Layer) -> Pools:
    """What the rows hold, as headkv has it."""
    return Pools(layer.rows.keys, layer.rows.values, layer.rows.positions, layer.rows.scales)


def as_codes(layer: Layer, storage: str) -> Layer:
    """The same entries as codes, with a length of their own."""
    pools = quantised_pools(pools_of(layer), BITS[storage])._asdict()
    rows = replace(layer.rows, **pools, length=layer.begun.clone())
    return replace(layer, rows=rows, ticket=new_ticket(rows))


def of_heads(layer: Layer, heads: slice) -> Layer:
    """These heads' rows of the layer, by themselves, with a length of their own."""
    names = ("start", "length", "sinks", "recent")
    rows = replace(layer.rows, **{name: getattr(layer.rows, name)[heads].clone() for name in names})
    q = layer.q.unflatten(1, (HEADS, GROUP))[:, heads].flatten(1, 2)
    own = {
        "q": q,
        "new": layer.new[:, :, heads],
        "capacity": layer.capacity[heads],
        "begun": layer.begun[heads],
    }
    return replace(layer, rows=rows, ticket=new_ticket(rows), **own)


def entry_bytes(layer: Layer) -> int:
    """Of an entry's key and value, with scales."""
    pools = (layer.rows.keys, layer.rows.values, layer.rows.scales)
    return sum(pool[0].nbytes for pool in pools if pool is not None)


Step = Callable[[Layer], Tensor]


def truth(layer: Layer, new: bool = False) -> Tensor:
    """`[HQ, D]`: attention in float64 over what the rows hold; `new`: and over the new entries behind that."""
    found = []
    for r, (begin, n) in enumerate(zip(layer.rows.start.tolist(), layer.rows.length.tolist(), strict=True)):
        keys, values = (x.double() for x in entries_at(pools_of(layer), slice(begin, begin + n)))
        if new:
            keys, values = (torch.cat([x, layer.new[i, :, r]]) for i, x in enumerate((keys, values)))
        q = layer.q[0, r * GROUP : (r + 1) * GROUP].double()
        found.append((q @ keys.T * SCALE).softmax(-1) @ values)
    return torch.cat(found)


def error(layer: Layer, step: Step) -> float:
    """Relative distance of one step from the truth, once it has stored the new entries."""
    before = layer.rows.length.clone()
    got = step(layer)[0]
    if not torch.equal(layer.rows.length, before + 1) or layer.ticket.any():
        raise AssertionError(
            f"lengths {before.tolist()} -> {layer.rows.length.tolist()}, {layer.ticket.tolist()}"
        )
    stored = torch.stack(entries_at(pools_of(layer), layer.rows.start + before))
    new = layer.new[:, 0]
    if layer.rows.scales is not None:
        both = zip(new, bits_of(pools_of(layer)), strict=True)
        new = torch.stack([restored(*quantised(x, bits)) for x, bits in both])
    if not torch.equal(stored, new):
        raise AssertionError("a row did not get its new entry")
    return distance(got, truth(layer))


def distance(got: Tensor, want: Tensor) -> float:
    """Relative; as near as 16 bits come, or it is an error."""
    far = float((got.double() - want).norm() / want.norm())
    if not far < WRONG:
        raise AssertionError(f"wrong by {far:.1e}")
    return far


def microseconds(step: Callable[[], object], replays: int) -> float:
    """Median time of one layer in a CUDA graph whose replay is `step`, which runs all layers."""
    return replay_microseconds(step, replays) / LAYERS


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
    sizes = [int(layer.rows.length.sum()) * entry_bytes(layer) // 4 for layer in layers]
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


def time_varlen(layers: list[Layer], replays: int) -> float:
    """Flash attention over rows as sequences of unequal length, as published code decodes; stored tokens only."""
    q = [layer.q.view(HEADS, GROUP, DIM) for layer in layers]
    one_each = torch.arange(HEADS + 1, device="cuda", dtype=torch.int32)
    rows = []
    for layer in layers:  # rows without free slots between them
        row, offset = rows_of_slots(layer.rows.length)
        slots = layer.rows.start[row] + offset
        pools = [pool[slots, None].expand(-1, GROUP, -1) for pool in (layer.rows.keys, layer.rows.values)]
        ends = F.pad(layer.rows.length.cumsum(0), (1, 0)).to(torch.int32)
        rows.append((*pools, one_each, ends, 1, int(layer.rows.length.max())))

    def step() -> None:
        for query, row in zip(q, rows, strict=True):
            varlen_attn(query, *row)

    return microseconds(step, max(3, replays // 6))


def stepping(config: DecodeConfig, ahead: bool) -> Step:
    """The step under a configuration. Two layers lie in two places, so what `ahead` asks for holds."""

    def step(layer: Layer) -> Tensor:
        tensors = (*layer.new, layer.rows, layer.capacity, layer.ticket, layer.seen)
        return ragged_step(layer.q, *tensors, scale=SCALE, ahead=ahead, config=config)

    return step


# Entries a block, blocks in the ring (0: the portable kernel), warps, programs a multiprocessor, gap.
SEARCH = (
    *(
        (64, 3, 4, 1, 0),
        (64, 3, 4, 1, 128),
        (64, 3, 4, 1, 192),
        (64, 2, 4, 1, 96),
        (64, 4, 4, 1, 96),
        (64, 6, 4, 1, 96),
    ),
    *((64, 3, 4, 2, 64), (64, 2, 4, 2, 64), (32, 3, 2, 2, 96), (32, 6, 2, 1, 96), (32, 6, 2, 2, 96)),
    *((128, 2, 8, 1, 96), (128, 3, 8, 1, 96), (64, 0, 4, 1, 0), (64, 0, 4, 1, 128), (32, 0, 4, 1, 64)),
)


# The same of rows of codes, by storage; without a ring, of the portable kernel, and with three stages.
CUTS_8 = (
    *((256, 2, 4, 1, 128), (256, 3, 4, 1, 512), (256, 2, 8, 1, 512)),
    *((128, 2, 4, 1, 512), (128, 3, 4, 1, 512), (128, 4, 4, 1, 512)),
    *((64, 0, 4, 2, 128), (64, 0, 4, 1, 128)),
)
CUTS_4 = (
    *((256, 2, 4, 1, 128), (256, 3, 4, 1, 512), (256, 2, 8, 1, 512), (512, 2, 4, 1, 512)),
    *((128, 3, 4, 1, 512), (128, 6, 4, 1, 512), (64, 0, 4, 2, 128), (128, 0, 4, 2, 128)),
)


def other_cuts(
    config: DecodeConfig, cuts: Sequence[tuple[int, int, int, int, int]], prefix: str = ""
) -> dict[str, Step]:
    """The step under other cuts than that configuration's, by name."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    found = {}
    for block, ring, warps, times, gap in cuts:
        programs = times * properties.multi_processor_count
        cut = replace(config, block=block, ring=ring, warps=warps, gap=gap, programs=programs)
        name = f"  {prefix}{block} x {ring}, {warps} warps, {times} a SM, gap {gap}"
        found[name] = stepping(cut, ahead=properties.major >= 9)
    return found


def variants(search: bool) -> dict[str, Step]:
    """What is compared, by name: the default, what it is without its parts, and with `search` other cuts."""
    config, hopper = default_config(), torch.cuda.get_device_capability()[0] >= 9
    found = {"headkv": stepping(config, ahead=hopper)}
    if hopper:
        found["headkv, after the launch before"] = stepping(config, ahead=False)
        found["headkv, no early start"] = stepping(replace(config, early=False), ahead=False)
        found["headkv, portable kernel"] = stepping(replace(config, ring=0), ahead=True)
    if search:
        found |= other_cuts(config, SEARCH)
    return found


def variants_of_codes(layer: Layer, storage: str, search: bool) -> dict[str, Step]:
    """The same over rows of codes, as those of `layer`."""
    rows = as_codes(layer, storage).rows
    config, hopper = DecodeConfig.default(rows), torch.cuda.get_device_capability()[0] >= 9
    found = {f"headkv, {storage}": stepping(config, ahead=hopper)}
    if hopper:
        found[f"headkv, {storage}, portable kernel"] = stepping(
            DecodeConfig.default(rows, ring=False), ahead=True
        )
    if search:
        found |= other_cuts(config, CUTS_4 if 4 in BITS[storage] else CUTS_8, f"{storage}, ")
    return found


def default_config() -> DecodeConfig:
    """What `ragged_step` takes for these rows."""
    return DecodeConfig.default(make_layer(64, "cuda").rows)


Note = Callable[..., None]


def measure_ours(name: str, step: Step, layers: list[Layer], replays: int, note: Note) -> None:
    """A step's time in a graph, and its error before and after."""
    for layer in layers:
        layer.rewind()
        layer.ticket.zero_()
    first = error(layers[0], step)
    time = microseconds(lambda: [step(layer) for layer in layers], replays)
    steps = int((layers[1].rows.length - layers[1].begun)[0])
    if steps != replays + NOT_COUNTED:
        raise AssertionError(f"{steps} steps instead of {replays} and {NOT_COUNTED}")
    note(name, time, first, max(error(layer, step) for layer in layers[::5]))


def measure_parts(storages: tuple[str, str], layers: list[Layer], replays: int, note: Note) -> None:
    """Layers whose first half of the heads is stored so, the other so: a launch for each."""
    halves = slice(0, HEADS // 2), slice(HEADS // 2, HEADS)
    parts = [
        as_codes(of_heads(layer, heads), storage)
        for layer in layers
        for heads, storage in zip(halves, storages, strict=True)
    ]
    hopper = torch.cuda.get_device_capability()[0] >= 9
    steps = [stepping(DecodeConfig.default(part.rows), ahead=hopper) for part in parts[:2]] * len(layers)
    furthest = max(error(part, step) for part, step in zip(parts[:2], steps, strict=False))
    time = microseconds(lambda: [step(part) for step, part in zip(steps, parts, strict=True)], replays)
    note(f"headkv, half of the heads {storages[0]}, half {storages[1]}", time, furthest)


def measure_rival(rival: Rival, layers: list[Layer], replays: int, note: Note) -> None:
    """The same; and the host's time for what it has to plan outside a graph, a layer."""
    for layer in layers:
        layer.rewind()
    decoders = [rival.prepare(layer) for layer in layers]

    def furthest() -> float:
        some = list(zip(layers, decoders, strict=True))[::5]
        return max(distance(decoder.step(), truth(layer, rival.appends)) for layer, decoder in some)

    first = furthest()
    note(
        rival.name, microseconds(lambda: [decoder.step() for decoder in decoders], replays), first, furthest()
    )
    if plans := [decoder.plan for decoder in decoders if decoder.plan is not None]:
        seconds = in_turns({"plans": lambda: [plan() for plan in plans]}, replays)["plans"]
        note(f"{rival.name}: its plan", 1e6 * seconds / len(plans))


def measure(entries: int, options: argparse.Namespace) -> dict[str, float]:
    """One column of the table, in microseconds a layer; what fails is NaN, with the reason printed."""
    layers = [make_layer(entries, "cuda") for _ in range(LAYERS)]
    size = sum(int(layer.rows.length.sum()) * entry_bytes(layer) for layer in layers) / LAYERS
    column = {"KV megabytes a layer": size / 1e6}
    print(f"\n{entries} entries a head, {size / 1e6:.1f} MB a layer: microseconds, error before, error after")

    def note(name: str, time: float, *errors: float) -> None:
        column[name] = time
        print(f"  {name:46s}{time:9.2f}" + "".join(f"{e:10.1e}" for e in errors), flush=True)

    def attempt(name: str, measured: Callable[..., None], *what: object) -> None:
        try:
            measured(*what, layers, options.replays, note)
        except Exception as problem:  # the others still count
            column[name] = math.nan
            print(f"  {name:46s} failed: {type(problem).__name__}: {str(problem)[:300]}", flush=True)

    note("a launch that only reads", time_read(layers, options.replays))
    for name, backend in DENSE.items():
        note(name, time_dense(entries, backend, options.replays))
    note("flash varlen, one KV head a sequence", time_varlen(layers, options.replays))
    for rivals in RIVALS:
        try:
            for rival in rivals(layers, SCALE):
                attempt(rival.name, measure_rival, rival)
        except ImportError as missing:
            print(f"  {rivals.__name__} is not installed: {missing}", flush=True)
    for name, step in variants("entries" in options.search).items():
        attempt(name, measure_ours, name, step)
    plain = layers
    for storage in BITS:
        layers = [as_codes(layer, storage) for layer in plain]
        note(f"a launch that only reads {storage}", time_read(layers, options.replays))
        for name, step in variants_of_codes(plain[0], storage, "codes" in options.search).items():
            attempt(name, measure_ours, name, step)
    layers = plain
    attempt("parts", measure_parts, ("int8", "int4"))
    return column


def profile(name: str) -> None:
    """A few launches of one variant at each size, for a profiler to look at."""
    for entries in ENTRIES:
        layers = [make_layer(entries, "cuda") for _ in range(4)]
        steps = variants(search=True)
        for storage in BITS:
            if name not in steps and name in (coded := variants_of_codes(layers[0], storage, search=True)):
                steps, layers = coded, [as_codes(layer, storage) for layer in layers]
        for layer in layers:
            steps[name](layer)
        torch.cuda.synchronize()


def main() -> None:
    """Check, measure, print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replays", type=int, default=30, help="graph replays, of which the median counts")
    parser.add_argument(
        "--search",
        nargs="+",
        default=(),
        choices=("entries", "codes"),
        help="also other ways to cut the work over these rows",
    )
    parser.add_argument(
        "--profile", metavar="NAME", help="only launch this variant a few times, for a profiler"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the table here, with the machine's name"
    )
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
        if options.json:  # what is known so far
            options.json.write_text(json.dumps({"machine": machine, "table": table}, indent=1) + "\n")
    print(f"\n{machine}; microseconds a layer, median of {options.replays}")
    print(f"{'entries a head':48s}" + "".join(f"{entries:>10d}" for entries in table))
    for name in next(iter(table.values())):
        print(f"{name:48s}" + "".join(f"{column.get(name, math.nan):10.2f}" for column in table.values()))


if __name__ == "__main__":
    main()
