"""What it costs to decide once the whole prompt is read: passes over the text, time beside the prefill, peak memory.

    python benchmarks/whole_prompt.py [--tokens 2000 4000] [--share 0.2] [--device cuda] [--json FILE]

SmolLM2 reads one text. `AdaKV` decides a layer at a time, `AdaKV(scope="model")` once all layers are read, and KVzip
reads the text again for its scores. All take turns. The peak is what a prefill holds at most beyond the weights: the
allocator's on a GPU; on Linux without one the system's, each measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from measure import Row, add_json, finish, in_turns
from torch import Tensor

import headkv
from headkv.data import haystack
from headkv.data.chat import REPEAT
from headkv.evaluation.resident import resident_bytes
from headkv.scorers import KVzipScorer

FULL = "full cache"


def main() -> None:
    """Measure and print."""
    given = parse()
    model, tokenizer = headkv.load_smollm2()
    model.to(given.device)
    if given.only is not None:
        print(json.dumps(peak(model, tokenizer, given, given.only, given.tokens[0])))
        return
    tables = {}
    for n in given.tokens:
        ids = haystack(tokenizer, n).context_ids.to(given.device)
        calls = {
            name: partial(prefill, model, ids, method)
            for name, method in methods(tokenizer, given.share).items()
        }
        read = {name: passes(model, ids, call) for name, call in calls.items()}
        seconds = in_turns({name: synchronised(call) for name, call in calls.items()}, given.rounds)
        held = (
            partial(peak_apart, given=given)
            if given.device == "cpu"
            else partial(peak, model, tokenizer, given)
        )
        rows: list[Row] = [
            {
                "method": name,
                "tokens read": f"{read[name]:.2f} n",
                "prefill, s": round(seconds[name], 2),
                "of the full cache's": f"{seconds[name] / seconds[FULL]:.2f} x",
                "peak, MB": round(held(name, n) / 1e6),
                "stored, MB": round(call().nbytes / 1e6),
            }
            for name, call in calls.items()
        ]
        tables[f"SmolLM2, {ids.shape[1]} tokens, {given.share:.0%} kept, {chip(given.device)}"] = rows
    finish(given.json, tables, [])


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[2000, 4000], help="of the text (2000 4000)")
    parser.add_argument("--share", type=float, default=0.2, help="to keep (0.2)")
    parser.add_argument("--rounds", type=int, default=3, help="timed, each runs every method once (3)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # measures the peak of this one, and prints it
    add_json(parser)
    return parser.parse_args()


def methods(tokenizer: Any, share: float) -> dict[str, Any]:
    """By the name in the table."""
    request = tokenizer(REPEAT, add_special_tokens=False)["input_ids"]
    return {
        FULL: headkv.FullCache(),
        "AdaKV": headkv.AdaKV(share),
        'AdaKV(scope="model")': headkv.AdaKV(share, scope="model"),
        "KVzip, chunks of 512": headkv.KVzip(share, KVzipScorer(request, chunk=512)),
        "KVzip, chunks of 2000": headkv.KVzip(share, KVzipScorer(request)),
    }


@torch.inference_mode()
def prefill(model: Any, ids: Tensor, method: Any) -> headkv.RaggedCache:
    """The text read, and compressed."""
    cache = headkv.RaggedCache.for_model(model, method)
    model(ids, past_key_values=cache, logits_to_keep=1)
    return cache


def passes(model: Any, ids: Tensor, call: Any) -> float:
    """Tokens that pass the model, over the tokens of the text."""
    read = 0

    def count(module: Any, args: tuple[Tensor, ...]) -> None:
        nonlocal read
        read += args[0].shape[-1]

    hook = model.get_input_embeddings().register_forward_pre_hook(count)
    try:
        call()
    finally:
        hook.remove()
    return read / ids.shape[1]


def synchronised(call: Any) -> Any:
    """A call that has ended when it returns."""

    def run() -> None:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def peak(model: Any, tokenizer: Any, given: argparse.Namespace, name: str, n: int) -> int:
    """Bytes that one prefill holds at most beyond what was there before."""
    ids = haystack(tokenizer, n).context_ids.to(given.device)
    method = methods(tokenizer, given.share)[name]
    prefill(model, ids[:, :200], method)
    if given.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        prefill(model, ids, method)
        return torch.cuda.max_memory_allocated() - before
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    prefill(model, ids, method)
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024 - before


def peak_apart(name: str, n: int, given: argparse.Namespace) -> float:
    """The same on a CPU, in a process of its own, whose allocator gives freed blocks back; NaN where nobody knows."""
    if not psutil.LINUX:
        return float("nan")
    command = [sys.executable, __file__, "--only", name, "--tokens", str(n)]
    command += ["--share", str(given.share), "--device", given.device]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def chip(device: str) -> str:
    """What it ran on."""
    return f"{os.cpu_count()} CPU cores" if device == "cpu" else torch.cuda.get_device_name(device)


if __name__ == "__main__":
    main()
