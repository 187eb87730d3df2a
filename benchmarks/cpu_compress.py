"""What compression costs beside the prefill that it follows: one layer of SmolLM2's shape, 32k tokens, on this CPU.

    python benchmarks/cpu_compress.py [--tokens 32768] [--share 0.2]

The prefill counted here is its attention alone, so that the printed share is an upper bound.
"""

from __future__ import annotations

import argparse
import time

import torch
from measure import Goal, add_json, finish

import headkv
from headkv.attention.dense import prefill
from headkv.cache import RaggedLayer
from headkv.logits import Rule
from headkv.prefill import Prefill

QUERY_HEADS, KV_HEADS, DIM = 9, 3, 64


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768, help="of the prompt (default: 32768)")
    parser.add_argument("--share", type=float, default=0.2, help="to keep (default: 0.2)")
    add_json(parser)
    options = parser.parse_args()
    torch.manual_seed(0)
    n, scale = options.tokens, DIM**-0.5
    q = torch.randn(1, QUERY_HEADS, n, DIM)
    keys, values = torch.randn(1, KV_HEADS, n, DIM), torch.randn(1, KV_HEADS, n, DIM)
    method = headkv.AdaKV(options.share)
    with torch.inference_mode():
        begin = time.perf_counter()
        prefill(q, keys, values, Rule(scale))
        attention = time.perf_counter() - begin
        seconds = []
        for _ in range(5):
            begin = time.perf_counter()
            keep = method.plan(Prefill(q[0, :, -method.observed_queries :], keys[0], values[0], 0, 30, scale))
            planned = time.perf_counter()
            RaggedLayer.from_dense(keys, values, keep=keep.mask[None])
            seconds.append((planned - begin, time.perf_counter() - planned))
    plan, store = (sorted(part)[2] for part in zip(*seconds, strict=True))
    parts = {
        "prefill's attention": attention,
        "plan (AdaKV)": plan,
        "store": store,
        "compression": plan + store,
    }
    rows = [
        {"part": part, "s": round(took, 3), "of the attention": f"{took / attention:.2%}"}
        for part, took in parts.items()
    ]
    shape = f"one layer, {QUERY_HEADS} query / {KV_HEADS} KV heads, D {DIM}, float32, {n} tokens"
    ratio = (plan + store) / attention
    goal = Goal(f"compression at {n} tokens", "at most 5% of the prefill", f"{ratio:.2%}", ratio <= 0.05)
    finish(options.json, {f"Compression, {shape}, {options.share:.0%} kept": rows}, [goal])


if __name__ == "__main__":
    main()
