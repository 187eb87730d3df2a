"""SmolLM2 end to end on a CPU: prefill, compression and decoding with 20% of the cache, beside the full cache.

    python benchmarks/cpu_model.py [--tokens 8000] [--share 0.2] [--steps 24]

The full cache is transformers' own, with its own sdpa attention; the steps of all caches take turns, so that a machine
whose speed drifts treats them alike.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from measure import Goal, add_json, finish

import headkv
from headkv.data import haystack
from headkv.evaluation.resident import resident_bytes

FULL = "full, transformers sdpa"


def main() -> None:
    """Measure and print."""
    options = parse()
    torch.manual_seed(0)
    model, tokenizer = headkv.load_smollm2()
    ids = haystack(tokenizer, options.tokens).context_ids
    n, kept = ids.shape[1], f"AdaKV {options.share:.0%}"
    methods = {FULL: None, "full, headkv": headkv.FullCache(), kept: headkv.AdaKV(options.share)}
    caches, held = {}, {}
    with torch.inference_mode():
        model(ids[:, :64])
        for name, method in methods.items():
            before, begin = resident_bytes(), time.perf_counter()
            if method is None:
                model.set_attn_implementation("sdpa")
                caches[name] = model(ids, logits_to_keep=1).past_key_values
                nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in caches[name].layers)
            else:
                caches[name] = headkv.RaggedCache.for_model(model, method)
                model(ids, past_key_values=caches[name], logits_to_keep=1)
                nbytes = caches[name].nbytes
            seconds, after = time.perf_counter() - begin, resident_bytes()
            held[name] = (seconds, nbytes, after - before)
        steps = {name: [] for name in methods}
        attention = {name: "sdpa" if method is None else "headkv" for name, method in methods.items()}
        token = torch.tensor([[9]])
        for step in range(options.steps + 2):
            for name, cache in caches.items():
                model.set_attn_implementation(attention[name])
                begin = time.perf_counter()
                model(token, past_key_values=cache)
                if step >= 2:
                    steps[name].append(time.perf_counter() - begin)
    decode = {name: median(taken) for name, taken in steps.items()}
    bound = weights_only(model)
    rows = [
        {
            "cache": name,
            "prefill, s": round(seconds, 2),
            "our count, MB": round(nbytes / 1e6, 1),
            "resident, MB": round(resident / 1e6, 1),
            "decode, ms": round(1e3 * decode[name], 1),
            "tokens/s": round(1 / decode[name], 1),
            "against full": f"{decode[FULL] / decode[name]:.2f} x",
            "memory": f"{resident / held[FULL][2]:.1%}",
        }
        for name, (seconds, nbytes, resident) in held.items()
    ]
    faster, memory = decode[FULL] / decode[kept], held[kept][2] / held[FULL][2]
    weights = f"the weights alone take {1e3 * bound:.1f} ms a step, so that {decode[FULL] / bound:.1f} x is the most"
    goals = [
        Goal(
            f"SmolLM2, {n} tokens, {kept}: decode",
            "2 x the full cache",
            f"{faster:.2f} x",
            faster >= 2,
            weights,
        ),
        Goal(
            f"SmolLM2, {n} tokens, {kept}: resident", "25% of the full cache", f"{memory:.1%}", memory <= 0.25
        ),
    ]
    title = f"SmolLM2-135M-Instruct, float32, {n} tokens, {torch.get_num_threads()} threads; {weights}"
    finish(options.json, {title: rows}, goals)


def weights_only(model: torch.nn.Module) -> float:
    """Seconds of a forward call of one token with nothing cached: what no cache can make faster."""
    token, seconds = torch.tensor([[9]]), []
    with torch.inference_mode():
        for _ in range(9):
            begin = time.perf_counter()
            model(token, use_cache=False)
            seconds.append(time.perf_counter() - begin)
    return median(seconds)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8000, help="of the context (default: 8000)")
    parser.add_argument("--share", type=float, default=0.2, help="of the cache to keep (default: 0.2)")
    parser.add_argument("--steps", type=int, default=24, help="decode steps of each (default: 24)")
    add_json(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
