"""A long generation under a decode budget: what the plans cost, and what is stored, on this CPU or a GPU.

    python benchmarks/long_generation.py [--tokens 20000] [--steps 400] [--device cuda] [--json FILE]

The first table: SmolLM2 after a prompt, steps with and without a decode budget in turns. The second: a tiny model over
many tokens, bytes by the cache's count and by the system's.
"""

from __future__ import annotations

import argparse
import time
from statistics import mean

import torch
from measure import Goal, add_json, finish

import headkv
from headkv.data import haystack
from headkv.evaluation.resident import resident_bytes
from headkv.models.tiny import tiny_model

SHARE = 0.2


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", type=int, default=1000, help="tokens of the prompt (1000)")
    parser.add_argument("--steps", type=int, default=400, help="of SmolLM2, timed (400)")
    parser.add_argument("--tokens", type=int, default=20_000, help="of the tiny model (20000)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    add_json(parser)
    given = parser.parse_args()
    with torch.inference_mode():
        cost, share = plans(given)
        stored, grown = memory(given)
    goals = [
        Goal("plans of a decode budget", "at most 5% of the steps", f"{share:.2%}", share <= 0.05),
        Goal(
            "stored in the second half of the tokens",
            "no more than in the first",
            f"{grown:+d} bytes",
            grown <= 0,
        ),
    ]
    finish(given.json, {"Steps of SmolLM2": cost, "Stored by a tiny model": stored}, goals)


def plans(given: argparse.Namespace) -> tuple[list[dict[str, str | float]], float]:
    """Seconds a step, with a budget and without, and which share of its steps the plans take."""
    model, tokenizer = headkv.load_smollm2()
    model.to(given.device)
    ids = haystack(tokenizer, given.prompt).context_ids.to(given.device)
    budget = int(SHARE * given.prompt)
    options = {"grows": {}, f"at most {budget} entries a head": {"decode_budget": budget}}
    caches = {
        name: headkv.RaggedCache.for_model(model, headkv.AdaKV(SHARE), **o) for name, o in options.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    for cache in caches.values():
        model(ids, past_key_values=cache, logits_to_keep=1)
    for step in range(given.steps):
        token = ids[:, step % ids.shape[1], None]
        for name, cache in caches.items():
            begin = time.perf_counter()
            model(token, past_key_values=cache)
            if given.device != "cpu":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    rows: list[dict[str, str | float]] = [
        {
            "cache": name,
            "ms a step, mean": round(1e3 * mean(seconds[name]), 2),
            "longest": round(1e3 * max(seconds[name]), 2),
            "entries a head": round(float(cache.lengths().double().mean()), 1),
            "MB": round(cache.nbytes / 1e6, 2),
        }
        for name, cache in caches.items()
    ]
    bounded = seconds[f"at most {budget} entries a head"]
    usual = sorted(bounded)[len(bounded) // 2]
    # A plan makes one step of `every` long: what such a step takes beyond a usual one.
    every = caches[f"at most {budget} entries a head"].layers[0].options.decode.every
    extra = sum(bounded[i] - usual for i in range(every, len(bounded), every))
    return rows, extra / sum(bounded)


def memory(given: argparse.Namespace) -> tuple[list[dict[str, str | float]], int]:
    """What is stored after each eighth of the tokens, and how much more in the second half than in the first."""
    model = tiny_model("llama", max_position_embeddings=given.tokens + 128).to(given.device)
    cache = headkv.RaggedCache.for_model(model, headkv.AdaKV(0.5), decode_budget=256)
    model(torch.randint(3, 97, (1, 100), device=given.device), past_key_values=cache)
    rows: list[dict[str, str | float]] = []
    most, highest = 0, [0, 0]
    for step in range(given.tokens):
        model(torch.tensor([[3 + step % 90]], device=given.device), past_key_values=cache)
        most = max(most, cache.nbytes)
        half = int(step >= given.tokens // 2)
        highest[half] = max(highest[half], cache.nbytes)
        if (step + 1) % (given.tokens // 8) == 0:
            rows.append(
                {
                    "tokens": step + 1,
                    "most bytes so far": most,
                    "resident, MB": round(resident_bytes() / 1e6, 1),
                }
            )
    return rows, highest[1] - highest[0]


if __name__ == "__main__":
    main()
