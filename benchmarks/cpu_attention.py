"""Ragged decode in Rust beside torch's own attention at equal tokens, and what an append costs, on this CPU.

Everything that is compared runs in turns within one process, so that a busy machine slows all of it alike: read the
ratios, and the medians only beside each other. The read bandwidth is that of `torch.sum` with the same threads.

    python benchmarks/cpu_attention.py
    python benchmarks/cpu_attention.py --entries 8192 --threads 1 --csv cpu_attention.csv
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

import headkv
from headkv.cache import RaggedLayer

Row = dict[str, str | float]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call; every round runs each of them once, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: median(times) for name, times in seconds.items()}


def skewed_layer(entries: int, kv_heads: int, dim: int, dtype: torch.dtype) -> RaggedLayer:
    """One sequence whose heads keep `entries` entries on average, shared out by a Dirichlet draw."""
    share = torch.distributions.Dirichlet(torch.full((kv_heads,), 0.7)).sample()
    lengths = (share * entries * kv_heads).long().clamp(min=1)
    lengths[lengths.argmax()] += entries * kv_heads - int(lengths.sum())
    rows = [tuple(torch.randn(n, dim).to(dtype) for _ in range(2)) for n in lengths.tolist()]
    return RaggedLayer.from_rows([rows])


def attention(
    dtypes: Sequence[str], *, entries: int, heads: int, kv_heads: int, dim: int, rounds: int
) -> list[Row]:
    """Ragged decode (Rust) against torch's scaled_dot_product_attention, called both ways, and the read bandwidth."""
    rows: list[Row] = []
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
            "read (torch.sum)": memory.sum,
            "ragged_decode, rust": lambda q=q, layer=layer: headkv.ragged_decode(q, layer, backend="rust"),
            "torch SDPA, grouped": lambda q=dense_q, k=keys, v=values: F.scaled_dot_product_attention(
                q, k, v, enable_gqa=True
            ),
            "torch SDPA, groups folded": lambda q=folded_q, k=keys, v=values: F.scaled_dot_product_attention(
                q, k, v
            ),
        }
        seconds = in_turns(calls, rounds)
        size = 2 * keys.numel() * keys.element_size()
        read = memory.numel() * memory.element_size() / seconds["read (torch.sum)"]
        for call, took in seconds.items():
            bandwidth = read if call.startswith("read") else size / took
            rows.append(
                {
                    "dtype": name,
                    "call": call,
                    "ms": round(took * 1e3, 2),
                    "GB/s": round(bandwidth / 1e9, 1),
                    "of read": round(bandwidth / read, 2),
                    "rust is faster by": ""
                    if call.startswith("read")
                    else round(took / seconds["ragged_decode, rust"], 1),
                }
            )
    return rows


def append(lengths: Sequence[int], *, kv_heads: int, dim: int, dtype: str, rounds: int) -> list[Row]:
    """The cost of storing one token: in place, the pool's rewrite when head room is used up, both per token, and
    `torch.cat`, which copies everything at every step."""
    rows: list[Row] = []
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
        rows.append(
            {
                "stored a head": stored,
                "in place, us": round(in_place * 1e6, 1),
                "rewrite, ms": round(median(rewrites) * 1e3, 2),
                "tokens between rewrites": room + 1,
                "a token, us": round((in_place + median(rewrites) / (room + 1)) * 1e6, 1),
                "torch.cat, us": round(cat * 1e6, 1),
            }
        )
    return rows


def show(title: str, rows: Sequence[Row]) -> None:
    """Prints a table, with rich where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(
            title, *("\t".join(map(str, line)) for line in [rows[0], *(r.values() for r in rows)]), sep="\n"
        )
        return
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
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
    parser.add_argument("--csv", help="also write the rows here (the append table beside it, with -append)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    shape = f"{options.heads} query / {options.kv_heads} KV heads, D {options.dim}, {options.threads} threads"
    shared = {"kv_heads": options.kv_heads, "dim": options.dim, "rounds": options.rounds}
    tables = {
        "": attention(options.dtypes, entries=options.entries, heads=options.heads, **shared),
    }
    show(f"Decode over {options.entries} entries a head, {shape}", tables[""])
    if options.append:
        tables["-append"] = append(options.append, dtype=options.dtypes[-1], **shared)
        show(f"Append one token, {options.dtypes[-1]}, {shape}", tables["-append"])
    for suffix, rows in tables.items() if options.csv else ():
        path = options.csv.removesuffix(".csv") + f"{suffix}.csv"
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        print(f"written: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
