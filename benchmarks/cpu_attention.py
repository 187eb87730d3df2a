"""Ragged decode in Rust beside torch's own attention at equal tokens, and what an append costs, on this CPU.

Everything that is compared runs in turns within one process, so that a busy machine slows all of it alike: read the
ratios, and the medians only beside each other. The read bandwidth is that of `torch.sum` with the same threads.

    python benchmarks/cpu_attention.py
    python benchmarks/cpu_attention.py --entries 8192 --threads 1
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from measure import Goal, Row, add_json, finish, in_turns
from torch import Tensor

import headkv
from headkv.cache import RaggedLayer
from headkv.cache.quantised import BITS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
READ, RUST, GROUPED = "read (torch.sum)", "ragged_decode, rust", "torch SDPA, grouped"
CODES = {name: f"{RUST}, {name}" for name in BITS}  # the same rows in fewer bits
FASTER = {"float32": 5, "bfloat16": 10}  # than torch's grouped attention, as a goal


def skewed_layer(entries: int, kv_heads: int, dim: int, dtype: torch.dtype) -> RaggedLayer:
    """One sequence whose heads keep `entries` entries on average, shared out by a Dirichlet draw."""
    share = torch.distributions.Dirichlet(torch.full((kv_heads,), 0.7)).sample()
    lengths = (share * entries * kv_heads).long().clamp(min=1)
    lengths[lengths.argmax()] += entries * kv_heads - int(lengths.sum())
    rows = [tuple(torch.randn(n, dim).to(dtype) for _ in range(2)) for n in lengths.tolist()]
    return RaggedLayer.from_rows([rows])


def attention(
    dtypes: Sequence[str], *, entries: int, heads: int, kv_heads: int, dim: int, rounds: int
) -> tuple[list[Row], list[Goal]]:
    """Ragged decode (Rust) against torch's scaled_dot_product_attention, called both ways, and the read bandwidth.

    Of 16-bit layers also over the same rows in 8 bits and in 4, whose bytes are codes and scales."""
    rows: list[Row] = []
    goals: list[Goal] = []
    memory = torch.randn(1 << 27)
    for name in dtypes:
        dtype = DTYPES[name]
        layer = skewed_layer(entries, kv_heads, dim, dtype)
        q = torch.randn(1, heads, dim, dtype=dtype)
        dense_q, keys, values = (
            torch.randn(1, n, m, dim, dtype=dtype)
            for n, m in ((heads, 1), (kv_heads, entries), (kv_heads, entries))
        )
        folded_q = dense_q.view(1, kv_heads, heads // kv_heads, dim)
        calls: dict[str, Callable[[], Tensor]] = {
            READ: memory.sum,
            RUST: lambda q=q, layer=layer: headkv.ragged_decode(q, layer, backend="rust"),
            GROUPED: lambda q=dense_q, k=keys, v=values: F.scaled_dot_product_attention(
                q, k, v, enable_gqa=True
            ),
            "torch SDPA, groups folded": lambda q=folded_q, k=keys, v=values: F.scaled_dot_product_attention(
                q, k, v
            ),
        }
        size = 2 * keys.numel() * keys.element_size()
        sizes = dict.fromkeys(calls, size)
        for storage, call in CODES.items() if dtype.itemsize == 2 else ():
            small = copy.copy(layer)
            small.quantise(storage)
            calls[call] = lambda q=q, small=small: headkv.ragged_decode(q, small, backend="rust")
            sizes[call] = sum(x.nbytes for x in (small.keys, small.values, small.scales))
        seconds = in_turns(calls, rounds)
        read = memory.numel() * memory.element_size() / seconds[READ]
        for call, took in seconds.items():
            bandwidth = read if call == READ else sizes[call] / took
            rows.append(
                {
                    "dtype": name,
                    "call": call,
                    "ms": round(took * 1e3, 2),
                    "GB/s": round(bandwidth / 1e9, 1),
                    "of read": round(bandwidth / read, 2),
                    "rust is faster by": "" if call == READ else round(took / seconds[RUST], 1),
                }
            )
        goals += decode_goals(name, *(size / seconds[call] / read for call in (RUST, GROUPED)))
        for storage, call in CODES.items():
            if call in seconds:
                faster = seconds[RUST] / seconds[call]
                goals.append(
                    Goal(
                        f"ragged decode, {storage} against {name}",
                        "1.6 x",
                        f"{faster:.2f} x",
                        faster >= 1.6,
                        f"it reads {size / sizes[call]:.2f} x fewer bytes",
                    )
                )
    return rows, goals


def decode_goals(dtype: str, rust: float, grouped: float) -> list[Goal]:
    """Goals of one dtype, for the shares of the read bandwidth that Rust and torch's grouped attention reach."""
    bandwidth = Goal(
        f"ragged decode, {dtype}",
        "80% of the read bandwidth",
        f"{rust:.0%}",
        rust >= 0.8,
        "one thread alone tells arithmetic from memory (--threads 1)",
    )
    if dtype not in FASTER:
        return [bandwidth]
    wanted, most = FASTER[dtype], 1 / grouped
    faster = Goal(
        f"ragged decode, {dtype}",
        f"{wanted} x torch's grouped attention",
        f"{rust / grouped:.1f} x",
        rust >= wanted * grouped,
        f"torch {torch.__version__} reads {grouped:.0%} of what memory gives, so that {most:.1f} x is the most",
    )
    return [bandwidth, faster]


def cold(sizes: Sequence[int], *, heads: int, kv_heads: int, dim: int, dtype: str, rounds: int) -> list[Row]:
    """What a call through Python costs where other code ran before it, as in a model."""
    memory, rows = torch.randn(1 << 27), []
    for entries in sizes:
        layer = skewed_layer(entries, kv_heads, dim, DTYPES[dtype])
        q = torch.randn(1, heads, dim).to(DTYPES[dtype])
        call = partial(headkv.ragged_decode, q, layer, backend="rust")
        again = in_turns({"call": call}, rounds)["call"]
        after = in_turns({"other": memory.sum, "call": call}, rounds)["call"]
        rows.append(
            {
                "entries": entries,
                "one after another, ms": round(again * 1e3, 2),
                "after torch.sum of 512 MB, ms": round(after * 1e3, 2),
            }
        )
    return rows


def append(
    lengths: Sequence[int], *, kv_heads: int, dim: int, dtype: str, rounds: int
) -> tuple[list[Row], list[Goal]]:
    """The cost of storing one token: in place, the pool's rewrite when head room is used up, both per token, and
    `torch.cat`, which copies everything at every step."""
    rows: list[Row] = []
    amortised = []
    for stored in lengths:
        keys = torch.randn(1, kv_heads, stored, dim).to(DTYPES[dtype])
        new = torch.randn(1, kv_heads, 1, dim).to(keys.dtype)
        rewrites = []
        for _ in range(3):
            layer = RaggedLayer.from_dense(keys, keys, headroom=0)
            begin = time.perf_counter()
            layer.append(new, new)
            rewrites.append(time.perf_counter() - begin)
        room = int((layer.capacity - layer.length).min())
        steps = min(room, 20 * rounds)
        calls = {
            "append": lambda layer=layer, new=new: layer.append(new, new),
            "cat": lambda keys=keys, new=new: (torch.cat([keys, new], 2), torch.cat([keys, new], 2)),
        }
        cat = in_turns({"cat": calls["cat"]}, 3)["cat"]
        in_place = in_turns({"append": calls["append"]}, steps - 1)["append"]
        amortised.append(in_place + median(rewrites) / (room + 1))
        rows.append(
            {
                "stored a head": stored,
                "in place, us": round(in_place * 1e6, 1),
                "rewrite, ms": round(median(rewrites) * 1e3, 2),
                "tokens between rewrites": room + 1,
                "a token, us": round(amortised[-1] * 1e6, 1),
                "torch.cat, us": round(cat * 1e6, 1),
            }
        )
    growth = amortised[-1] / amortised[0]
    goal = Goal(
        f"append, {lengths[-1]} stored against {lengths[0]}",
        "no step's cost grows with what is stored (amortised; under 2 x)",
        f"{growth:.2f} x the time, torch.cat {rows[-1]['torch.cat, us'] / rows[0]['torch.cat, us']:.0f} x",
        growth < 2,
        "the rewrite of the pool",
    )
    return rows, [goal] if len(lengths) > 1 else []


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=int, default=32768, help="entries a KV head, on average")
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128, help="head dimension D")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="torch's and Rust's alike"
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed turns; the median counts")
    parser.add_argument(
        "--append", type=int, nargs="*", default=[1024, 4096, 16384, 65536, 131072], metavar="STORED"
    )
    add_json(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    shape = f"{options.heads} query / {options.kv_heads} KV heads, D {options.dim}, {options.threads} threads"
    shared = {"kv_heads": options.kv_heads, "dim": options.dim, "rounds": options.rounds}
    rows, goals = attention(options.dtypes, entries=options.entries, heads=options.heads, **shared)
    tables = {f"Decode over {options.entries} entries a head, {shape}": rows}
    sizes = [64, 1024, options.entries]
    tables[f"A call, {options.dtypes[-1]}, {shape}"] = cold(
        sizes, heads=options.heads, dtype=options.dtypes[-1], **shared
    )
    if options.append:
        rows, more = append(options.append, dtype=options.dtypes[-1], **shared)
        tables[f"Append one token, {options.dtypes[-1]}, {shape}"] = rows
        goals += more
    finish(options.json, tables, goals)


if __name__ == "__main__":
    main()
