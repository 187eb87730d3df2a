"""The prefill of an 8B-shaped decoder on a GPU: time and memory, with heads that see all and with heads that stream.

    PYTHONPATH=.:kernels python3 benchmarks/gpu_prefill.py [--contexts 32768 131072] [--layers 32] [--json FILE]

Llama-3.1-8B's shape, random weights, bfloat16, one prompt of random tokens. Half of the KV heads stream (DuoAttention,
64 sinks and the last 256), chosen by random gates. Memory is the allocator's peak beyond the weights. Then one layer's
attention alone, and what it takes by itself to choose and store a fifth of a prompt. `--device cpu` only shows that
the script runs: a tiny model, no memory.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from gpu_model import LAYERS, make_model
from measure import Goal, add_json, finish
from torch import Tensor
from transformers import DynamicCache

import headkv
from headkv.attention import dense
from headkv.heads import HeadProfile
from headkv.integrations.planning import Observation
from headkv.logits import Rule
from headkv.models.tiny import tiny_model

SINKS, RECENT, SPARSITY, SHARE = 64, 256, 0.5, 0.2
PAPER = 1.63  # times less prefill time with grouped queries and half of the heads, arXiv 2410.10819
DENSE, ONE_SHOT, WHOLE = "DynamicCache, sdpa", "DuoAttention 50%, streaming", "all heads see all"


def seconds_and_peak(call: Callable[[], object], device: str, rounds: int) -> tuple[float, float]:
    """Median time of a call after one that does not count, and the gigabytes that it needs at most."""
    times, peak, cuda = [], 0, device == "cuda"
    for turn in range(rounds + 1):
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        if turn:
            times.append(time.perf_counter() - begin)
    return median(times), peak / 1e9


def gates(model: Any) -> HeadProfile:
    """Random gates of all KV heads."""
    shape = (model.config.num_hidden_layers, model.config.num_key_value_heads)
    return HeadProfile(
        "benchmark", "gate", "kv", torch.rand(shape, generator=torch.Generator().manual_seed(0))
    )


def prefills(model: Any, ids: Tensor, chunk: int) -> dict[str, Callable[[], object]]:
    """Ways to read the prompt `ids` `[1, n]`."""
    profile = gates(model)
    full = headkv.DuoAttention(profile, SPARSITY, SINKS, RECENT)
    streaming = headkv.DuoAttention(profile, SPARSITY, SINKS, RECENT, streaming_prefill=True)

    def plain() -> None:
        model.set_attn_implementation("sdpa")
        model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)

    def ragged(method: Any, size: int) -> None:
        chunked = size < ids.shape[1]
        cache = headkv.RaggedCache.for_model(model, method, chunked_prefill=chunked)
        for part in ids.split(size, 1):
            model(part, past_key_values=cache, logits_to_keep=1)
        cache.finalize_prefill()

    def choosing(method: Any) -> Callable[[], object]:
        return lambda: ragged(method, whole)

    whole = ids.shape[1]
    ways: dict[str, Callable[[], object]] = {
        DENSE: plain,
        "headkv, FullCache": lambda: ragged(headkv.FullCache(), whole),
        "DuoAttention 50%": lambda: ragged(full, whole),
        ONE_SHOT: lambda: ragged(streaming, whole),
    }
    if chunk < whole:
        ways[f"DuoAttention 50%, streaming, chunks of {chunk}"] = lambda: ragged(streaming, chunk)
    return ways | {f"{name}, {SHARE:.0%}": choosing(method) for name, method in scoring(model).items()}


def scoring(model: Any) -> dict[str, Any]:
    """Methods that look at every entry of a prompt and keep a fifth."""
    shape = (model.config.num_hidden_layers, model.config.num_attention_heads)
    profile = HeadProfile("benchmark", "retrieval", "query", torch.rand(shape))
    methods = {"SnapKV": headkv.SnapKV(SHARE), "PyramidKV": headkv.PyramidKV(SHARE)}
    return methods | {"AdaKV": headkv.AdaKV(SHARE), "HeadKV": headkv.HeadKV(SHARE, profile)}


def noise(model: Any, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[1, HQ, n, D]`, keys and values `[1, H, n, D]` of one layer."""
    config, like = model.config, model.lm_head.weight
    counts = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, keys, values = (
        torch.randn(1, heads, n, config.head_dim, device=like.device, dtype=like.dtype) for heads in counts
    )
    return q, keys, values


def attentions(model: Any, n: int) -> dict[str, Callable[[], object]]:
    """Ways to attend over the prompt in one layer."""
    q, keys, values = noise(model, n)
    heads, rule = keys.shape[1], Rule(q.shape[3] ** -0.5)

    def call(streaming: int, sinks: int = SINKS, recent: int = RECENT, compensate: bool = False) -> Any:
        streams = (torch.arange(heads) < streaming)[None].long()
        rows = {"sinks": streams * sinks, "recent": streams * recent, "compensate": streams * compensate}
        return lambda: dense.prefill(q, keys, values, rule, **rows)

    return {
        WHOLE: lambda: dense.prefill(q, keys, values, rule),
        f"half stream, {SINKS} + {RECENT}": call(heads // 2),
        f"all stream, {SINKS} + {RECENT}": call(heads),
        "all stream, a fifth of the prompt": call(heads, 4, n // 5),
        "all stream, a fifth and compensation": call(heads, 4, n // 5, True),
    }


def compressions(model: Any, n: int) -> dict[str, Callable[[], object]]:
    """Ways to choose and store a fifth of a prompt that was read: all layers, on keys and queries of noise."""
    q, keys, values = noise(model, n)
    methods = scoring(model) | {"DuoAttention": headkv.DuoAttention.for_share(SHARE, n, gates(model))}

    def call(method: Any) -> Callable[[], object]:
        def run() -> None:
            cache = headkv.RaggedCache.for_model(model, method)
            for layer in cache.layers:
                seen = Observation.of(q, None, method.observed_queries, Rule(q.shape[3] ** -0.5))
                layer.restore(layer._compressed(keys, values, None, seen))

        return run

    return {name: call(method) for name, method in methods.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--chunk", type=int, default=16384, help="tokens of a chunk (default: 16384)")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rounds", type=int, default=2, help="that count, of each prefill (default: 2)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    add_json(parser)
    options = parser.parse_args()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("needs a CUDA device; torch sees none")
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, tiny model"
    where = f"{options.layers} layers, {name}, torch {torch.__version__}"
    tables: dict[str, list] = {}
    measured: dict[tuple[str, int], float] = {}

    def measure(
        title: str,
        context: int,
        ways: dict[str, Callable[[], object]],
        rounds: int,
        against: str,
        compared: Callable[[float, float], dict[str, str]],
    ) -> None:
        """Rows of one table; `compared` is told the seconds of the way `against`, and a row's own."""
        rows = tables.setdefault(f"{title}, {where}", [])
        for way, call in ways.items():
            took, peak = seconds_and_peak(call, device, rounds)
            measured[way, context] = took
            row = {"context": context, "way": way, "ms": round(1e3 * took, 2)}
            rows.append(row | compared(measured[against, context], took) | {"peak, GB": round(peak, 2)})
            print(*rows[-1].values(), sep="  ", flush=True)

    def faster(other: float, took: float) -> dict[str, str]:
        return {"faster by": f"{other / took:.2f} x"}

    def share(other: float, took: float) -> dict[str, str]:
        return {"of the prefill": f"{took / other:.1%}"}

    with torch.inference_mode():
        most = max(options.contexts)
        if device == "cuda":
            model: Any = make_model(options.layers)
        else:
            model = tiny_model("llama", num_hidden_layers=options.layers, max_position_embeddings=most)
        for context in options.contexts:
            ids = torch.randint(3, model.config.vocab_size, (1, context), device=device)
            measure("Prefill", context, prefills(model, ids, options.chunk), options.rounds, DENSE, faster)
            measure("Attention of one layer", context, attentions(model, context), 5, WHOLE, faster)
            alone = f"To choose and store {SHARE:.0%} of a prompt"
            measure(alone, context, compressions(model, context), 3, DENSE, share)

    took = measured[DENSE, most]
    attention = options.layers * measured[WHOLE, most]
    gain = took / measured[ONE_SHOT, most]
    least = took / max(took - SPARSITY * attention, 1e-9)
    least_context = min(options.contexts)
    costs = [measured[f"{way}, {SHARE:.0%}", least_context] for way in scoring(model)]
    worst = max(costs) / measured[DENSE, least_context] - 1
    goals = [
        Goal(
            f"prefill of {most} tokens, half of the heads stream",
            f"{PAPER} x less time (the paper)",
            f"{gain:.2f} x",
            gain >= PAPER,
            f"attention is {attention / took:.0%} of the prefill; without that of half of the heads {least:.2f} x",
        ),
        Goal(
            f"choosing and storing {SHARE:.0%} of {least_context} tokens, what it adds",
            "at most 5% of the prefill",
            f"{worst:.1%}",
            worst <= 0.05,
            "the slowest method that scores entries; by itself it takes what the table says",
        ),
    ]
    finish(options.json, tables, goals)


if __name__ == "__main__":
    main()
