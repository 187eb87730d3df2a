"""SmolLM2 end to end on a CPU: prefill, compression and decoding with 20% of the cache, beside the full cache.

    python benchmarks/cpu_model.py [--tokens 8000] [--share 0.2] [--steps 24]

Prints one table. The full cache is transformers' own, with its own sdpa attention; the steps of all caches take turns,
so that a machine whose speed drifts treats them alike.
"""

from __future__ import annotations

import argparse
import gc
import time
from statistics import median

import torch

import headkv
from headkv.data import haystack
from headkv.evaluation.compare import _resident_bytes


def main() -> None:
    """Measure and print."""
    options = parse()
    torch.manual_seed(0)
    model, tokenizer = headkv.load_smollm2()
    ids = haystack(tokenizer, options.tokens).context_ids
    n = ids.shape[1]
    methods = {
        "full, transformers sdpa": None,
        "full, headkv": headkv.FullCache(),
        f"AdaKV {options.share:.0%}": headkv.AdaKV(options.share),
    }
    caches, rows = {}, {}
    with torch.inference_mode():
        model(ids[:, :64])
        for name, method in methods.items():
            gc.collect()
            before, begin = _resident_bytes(), time.perf_counter()
            if method is None:
                model.set_attn_implementation("sdpa")
                caches[name] = model(ids, logits_to_keep=1).past_key_values
                nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in caches[name].layers)
            else:
                caches[name] = headkv.RaggedCache.for_model(model, method)
                model(ids, past_key_values=caches[name], logits_to_keep=1)
                nbytes = caches[name].nbytes
            seconds = time.perf_counter() - begin
            gc.collect()
            after = _resident_bytes()
            resident = None if before is None or after is None else after - before
            rows[name] = [seconds, nbytes, resident]
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
    print(
        f"SmolLM2-135M-Instruct, float32, {n} tokens, {torch.get_num_threads()} threads, {options.steps} steps"
    )
    headings = ("prefill s", "count MB", "resident MB", "decode ms", "speed-up", "memory")
    columns = zip(headings, (10, 10, 13, 11, 10, 9), strict=True)
    print(f"{'cache':26}" + "".join(f"{name:>{width}}" for name, width in columns))
    full_ms, full_bytes = median(steps["full, transformers sdpa"]), rows["full, transformers sdpa"][1]
    for name, (seconds, nbytes, resident) in rows.items():
        ms = median(steps[name])
        shown = "-" if resident is None else f"{resident / 1e6:.1f}"
        print(
            f"{name:26}{seconds:>10.2f}{nbytes / 1e6:>10.1f}{shown:>13}{1000 * ms:>11.1f}{full_ms / ms:>9.2f}x"
            f"{nbytes / full_bytes:>9.1%}"
        )
    print(f"bound: a step without any cache takes {1000 * weights_only(model):.1f} ms (weights alone)")


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
    return parser.parse_args()


if __name__ == "__main__":
    main()
