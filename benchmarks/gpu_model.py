"""One decode step of an 8B-shaped decoder on a GPU: headkv with a fifth of the cache, beside transformers' own caches.

    PYTHONPATH=.:kernels python3 benchmarks/gpu_model.py [--cases 8192 32768x8] [--static] [--options NAME]

Llama-3.1-8B's shape, random weights, bfloat16. The caches are filled with noise, as only time and memory are measured;
a layer's heads keep `--share` of the context together, shared out by a Dirichlet draw. The bound is the bytes of
weights and stored entries over the bandwidth of a copy on the same machine. A second table says what the kernels of a
recorded step spend their time on.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from unittest.mock import patch

import torch
from measure import add_json, finish
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import headkv
from headkv.cache import RaggedLayer
from headkv.integrations import compiled
from headkv.integrations.joined import joined_weights

LAYERS, HEADS, KV_HEADS, DIM = 32, 32, 8, 128


def make_model(layers: int = LAYERS) -> LlamaForCausalLM:
    """Random weights, made where they are needed."""
    config = LlamaConfig(
        **{
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": layers,
            "vocab_size": 128256,
        },
        **{"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 140_000},
        rope_theta=5e5,
        attn_implementation="sdpa",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def fill(cache: headkv.RaggedCache, batch: int, context: int, share: float) -> None:
    """As if every layer had read `context` tokens and kept `share` of them."""
    for layer in cache.layers:
        parts = torch.distributions.Dirichlet(torch.ones(batch, KV_HEADS)).sample()
        lengths = (parts * KV_HEADS * share * context).long().clamp(min=1, max=context)
        lengths = torch.full_like(lengths, context) if share == 1 else lengths
        rows = [[noise(int(n)) for n in heads] for heads in lengths]
        positions = [[torch.arange(context - int(n), context) for n in heads] for heads in lengths]
        layer.ragged = RaggedLayer.from_rows(rows, positions=positions, headroom=256)
        layer.is_initialized = True


def noise(entries: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one row."""
    keys, values = torch.randn(2, entries, DIM, device="cuda", dtype=torch.bfloat16)
    return keys, values


def milliseconds(step: Callable[[], object], rounds: int = 15, warm: int = 4) -> float:
    """Median time of a step, the host's included."""
    times = []
    for turn in range(rounds + warm):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if turn >= warm:
            times.append(1e3 * (time.perf_counter() - begin))
    return median(times)


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy on the device."""
    source = torch.empty(1 << 30, device="cuda", dtype=torch.int32)
    target = torch.empty_like(source)
    took = milliseconds(lambda: target.copy_(source)) / 1e3
    return 2 * source.nbytes / took


def cached_bytes(before: int) -> float:
    """Gigabytes that the allocator holds beyond `before`."""
    return (torch.cuda.memory_allocated() - before) / 1e9


KINDS = {
    "attention and append": ("ring_shares", "decode_shares", "combine_segments"),
    "products with weights": ("nvjet", "splitK", "gemm", "gemv", "_mm_"),
}
REST = "all else: norms, rotary embeddings, sums"


Kinds = dict[str, tuple[int, float]]


def kernel_times(step: Callable[[], object], steps: int = 4, longest: int = 0) -> Kinds:
    """Launches in a step and their milliseconds in all, by kind; what overlaps counts twice.

    The `longest` kernels are printed, with microseconds a launch.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {kind: [] for kind in (*KINDS, REST)}
    named: dict[str, list[float]] = {}
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kinds = (kind for kind, parts in KINDS.items() if any(part in event.name for part in parts))
            found[next(kinds, REST)].append(event.device_time_total)
            named.setdefault(event.name, []).append(event.device_time_total)
    for name, times in sorted(named.items(), key=lambda item: -sum(item[1]))[:longest]:
        print(
            f"    {sum(times) / steps / 1e3:6.3f} ms, {len(times) // steps:4d} x {median(times):7.2f} us  {name[:90]}"
        )
    return {kind: (len(times) // steps, sum(times) / steps / 1e3) for kind, times in found.items()}


@dataclass(frozen=True)
class Way:
    """How a step runs.

    Attributes:
        words: what the table calls it.
        share: of the context, that the rows keep.
        graph, compiled, joined: in a CUDA graph; its layers compiled; projections of one input as one product.
        options: of torch's compiler, that are switched on beyond headkv's own.
    """

    words: str
    share: float
    graph: bool = False
    compiled: bool = False
    joined: bool = False
    options: tuple[str, ...] = ()


def ways(share: float, options: Sequence[str]) -> list[Way]:
    """All that are compared."""
    name = f"headkv, {share:.0%}"
    found = [
        Way(name, share),
        Way(f"{name}, CUDA graph", share, graph=True),
        Way(f"{name}, layers compiled", share, graph=True, compiled=True),
        Way(f"{name}, products joined", share, graph=True, compiled=True, joined=True),
        Way("headkv, all, products joined", 1.0, graph=True, compiled=True, joined=True),
    ]
    for option in options:
        words = f"{name}, products joined, {option}"
        found.append(Way(words, share, graph=True, compiled=True, joined=True, options=(option,)))
    return found


def ragged(
    model: LlamaForCausalLM, token: Tensor, context: int, way: Way
) -> tuple[float, float, float, Kinds]:
    """Milliseconds a step, gigabytes held, bytes of stored keys and values; `kernel_times` of a graph."""
    before = torch.cuda.memory_allocated()
    cache = headkv.RaggedCache.for_model(model, headkv.FullCache())
    fill(cache, token.shape[0], context, way.share)
    held, stored = cached_bytes(before), 4 * DIM * int(cache.lengths().sum())
    if not way.graph:
        return milliseconds(lambda: model(token, past_key_values=cache)), held, stored, {}
    steps = headkv.DecodeGraph(model, cache, compile_layers=way.compiled)
    begin = time.perf_counter()
    with (
        patch.dict(compiled.OPTIONS, dict.fromkeys(way.options, True)),
        joined_weights(model) if way.joined else nullcontext() as groups,
    ):
        if groups == 0:
            raise RuntimeError("no weights were joined")
        for _ in range(3):  # two run unrecorded, and the third is recorded
            steps.step(token)
        torch.cuda.synchronize()
        if way.compiled:
            seconds = time.perf_counter() - begin
            print(f"{way.words}: the first steps, which compile if no other has: {seconds:.1f} s", flush=True)
        took = milliseconds(lambda: steps.step(token))
        return took, held, stored, kernel_times(lambda: steps.step(token), longest=12 * way.compiled)


def measure(
    model: LlamaForCausalLM,
    context: int,
    batch: int,
    share: float,
    static: bool,
    options: Sequence[str],
    bandwidth: float,
) -> tuple[list[dict[str, str | float]], list[dict[str, str | float]]]:
    """The rows of both tables for one context and batch."""
    token = torch.full((batch, 1), 5, device="cuda")
    weights = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    full_bytes = 2 * LAYERS * batch * KV_HEADS * DIM * context * 2
    found: dict[str, tuple[float, float, float]] = {}

    def dense(
        name: str, cache: DynamicCache | StaticCache, call: Callable[..., object], **where: Tensor
    ) -> None:
        shape = (batch, KV_HEADS, context, DIM)
        for i in range(LAYERS):
            new = torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16)
            cache.update(*new, i)
            del new
        held = cached_bytes(before)
        found[name] = (milliseconds(lambda: call(token, past_key_values=cache, **where)), held, full_bytes)

    before = torch.cuda.memory_allocated()
    model.set_attn_implementation("sdpa")
    dense("DynamicCache, sdpa", DynamicCache(config=model.config), model)
    gc.collect()
    torch.cuda.empty_cache()
    if static:
        before = torch.cuda.memory_allocated()
        cache = StaticCache(config=model.config, max_cache_len=context + 64)
        call = torch.compile(model.forward, mode="reduce-overhead")
        dense("StaticCache, compiled", cache, call, position_ids=torch.full_like(token, context))
        del cache
        gc.collect()
        torch.cuda.empty_cache()
    spent: dict[str, Kinds] = {}
    for way in ways(share, options):
        took, held, stored, spent[way.words] = ragged(model, token, context, way)
        found[way.words] = took, held, stored
        gc.collect()
        torch.cuda.empty_cache()
    first = next(iter(found.values()))[0]
    where = {"context": context, "batch": batch}
    kinds = [
        where | {"cache": name, "kernels": kind, "launches": number, "ms": round(ms, 2)}
        for name, kernels in spent.items()
        for kind, (number, ms) in kernels.items()
    ]
    times = [
        where
        | {
            "cache": name,
            "ms a step": round(ms, 2),
            "bound, ms": round(1e3 * (weights + stored) / bandwidth, 2),
            "of bound": f"{1e3 * (weights + stored) / bandwidth / ms:.0%}",
            "faster by": f"{first / ms:.1f} x",
            "cache, GB": round(held, 2),
        }
        for name, (ms, held, stored) in found.items()
    ]
    return times, kinds


def case(text: str) -> tuple[int, int]:
    """`32768x8`: context and batch; `32768`: one sequence."""
    context, _, batch = text.partition("x")
    return int(context), int(batch or 1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases",
        type=case,
        nargs="+",
        default=[(8192, 1), (32768, 1), (131072, 1), (32768, 8)],
        metavar="CONTEXT[xBATCH]",
        help="default: 8192 32768 131072 32768x8",
    )
    parser.add_argument("--share", type=float, default=0.2, help="of the cache to keep (default: 0.2)")
    parser.add_argument(
        "--static", action="store_true", help="also transformers' StaticCache, compiled (slow to start)"
    )
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="NAME",
        help="of torch's compiler, each to be switched on in a row of its own, e.g. triton.enable_pdl",
    )
    add_json(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device; torch sees none")
    torch.manual_seed(0)
    tables: dict[str, list] = {}
    model = make_model()  # outside of inference mode, whose tensors can not be parts of one storage
    with torch.inference_mode():
        bandwidth = copy_bandwidth()
        title = f"One decode step, Llama-3.1-8B's shape, {torch.cuda.get_device_name()}, torch {torch.__version__}; "
        title += f"a copy moves {bandwidth / 1e12:.2f} TB/s"
        tables |= {title: [], "What kernels spend their time on, ms a step": []}
        for context, batch in options.cases:
            found = measure(model, context, batch, options.share, options.static, options.options, bandwidth)
            for table, rows in zip(tables.values(), found, strict=True):
                table += rows
                for row in rows:
                    print(*row.values(), sep="  ", flush=True)
    finish(options.json, tables, [])


if __name__ == "__main__":
    main()
