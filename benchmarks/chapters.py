"""What three chapters of the book show of many questions: full heads, compensation, scores.

    python benchmarks/chapters.py full_heads compensation scores --out book/data/chapters.json

The plain SmolLM2, texts of about 1,000 tokens with five hidden facts (`headkv.data.needles`, the validation part).
A question is answered if the answer stands in what the model writes. On a CPU it takes about fifteen minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import headkv
from headkv import scorers
from headkv.data import NeedleText, needle_texts
from headkv.evaluation.unseen import Question, judge

TEXTS = 10
LENGTH = 1000
COUNTS = (0, 9, 18, 27, 36, 45, 60)
PROFILES = {
    "distilled": "smollm2-gate-published",
    "cached": "smollm2-gate",
    "ablation": "smollm2-ablation",
}
WINDOWS = (25, 50, 100, 200)
SHARES = (0.1, 0.2, 0.4)
SCORERS: dict[str, Any] = {
    "random": scorers.RandomScorer(),
    "key norm": scorers.KeyNormScorer(),
    "KeyDiff": scorers.KeyDiffScorer(window=32),
    "observed attention": scorers.ObservedAttentionScorer(average=True),
    "Expected Attention": scorers.ExpectedAttentionScorer(window=32),
    "SnapKV, kernel 7": scorers.SnapKVScorer(kernel_size=7),
    "SnapKV, kernel 21": scorers.SnapKVScorer(kernel_size=21),
}


def full_heads() -> dict[str, Any]:
    """DuoAttention by three profiles: how many heads keep all; the others keep 16 sinks and the last 64 entries."""
    return {
        f"{name} {count}": headkv.DuoAttention(
            headkv.HeadProfile.builtin(file), 1 - count / 90, sinks=16, recent=64
        )
        for name, file in PROFILES.items()
        for count in COUNTS
    }


def compensation() -> dict[str, Any]:
    """RazorAttention with and without its compensation entry, by the window of the other heads."""
    echo, induction = (headkv.HeadProfile.builtin(f"smollm2-{kind}") for kind in ("echo", "induction"))
    return {
        f"{'with' if with_entry else 'without'} {window}": headkv.RazorAttention(
            echo, induction, min_recent=window, window_share=0, compensation=with_entry
        )
        for with_entry in (True, False)
        for window in WINDOWS
    }


def scores() -> dict[str, Any]:
    """Uniform budgets, by every scorer."""
    return {
        f"{name} {share:g}": headkv.ScoredMethod(share, scorer)
        for name, scorer in SCORERS.items()
        for share in SHARES
    }


def unseen(model: Any, tokenizer: Any, text: NeedleText, methods: Mapping[str, Any]) -> Counter[str]:
    """Answers found, the text compressed before any question is known."""
    found: Counter[str] = Counter()
    questions = [Question.of(needle, tokenizer, spare=2) for needle in text.needles]
    for verdicts in judge(model, tokenizer, text.context_ids, questions, methods):
        found.update({verdict.method: int(verdict.found) for verdict in verdicts})
    return found


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "full_heads": full_heads,
    "compensation": compensation,
    "scores": scores,
}


def main() -> int:
    """Measure the parts that are asked for, and put them into the file."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("parts", nargs="+", choices=PARTS)
    options.add_argument("--texts", type=int, default=TEXTS)
    options.add_argument("--device", default="cpu")
    options.add_argument("--out", type=Path, required=True)
    given = options.parse_args()
    model, tokenizer = headkv.load_smollm2()
    model = model.to(given.device)
    texts = needle_texts(tokenizer, texts=given.texts, lengths=[LENGTH], split="validation")
    made = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    for part in given.parts:
        begin, found = time.monotonic(), Counter[str]()
        for text in texts:
            found.update(unseen(model, tokenizer, text, PARTS[part]()))
            print(f"{part}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
        command = f"python benchmarks/chapters.py {part} --texts {given.texts} --out book/data/chapters.json"
        made[f"{part}, unseen"] = {
            "command": command,
            "device": torch.cuda.get_device_name() if given.device != "cpu" else "CPU",
            "asked": sum(len(text.needles) for text in texts),
            "found": dict(found),
        }
        given.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
