"""Questions unseen: every method at the same shares, on SmolLM2 as it is or tuned.

    python benchmarks/unseen.py --model tuned --documents ruler.jsonl.gz --lengths 4096
    python benchmarks/unseen.py --model plain --needles 16

The text is compressed before any question is known. Documents are RULER's as lm-evaluation-harness writes them
(`headkv documents`), needles are `headkv.data.needles`, the validation part. A score is the mean share of the answers
that stand in the reply; the share stored is counted in entries, without head room. All methods of a text decode
together, from one reading of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import headkv
from headkv.allocators import AdaptiveAllocator, ProfileAllocator, UniformAllocator
from headkv.data.chat import repeat_request
from headkv.data.needles import needle_texts
from headkv.evaluation.documents import read_documents
from headkv.evaluation.harness import OFFLINE
from headkv.evaluation.remembered import Remembered
from headkv.evaluation.unseen import Question, judge
from headkv.heads import HeadProfile
from headkv.methods import ScoredMethod
from headkv.scorers import ExpectedAttentionScorer, KeyDiffScorer, KVzipScorer, SnapKVScorer

# They end sooner than lm-eval's 128.
LIMITS = {
    "niah_single_1": 16,
    "niah_multikey_2": 16,
    "niah_multikey_3": 48,
}


def readers(request: Sequence[int]) -> dict[str, Remembered]:
    """KVzip's scorers; each reads a text again once, whatever the share."""
    made = {
        "KVzip": KVzipScorer(request, 512, window=32),
        "KVzip w8": KVzipScorer(request, 512, window=8),
        "KVzip w2": KVzipScorer(request, 512, sinks=2, window=2),
        "KVzip 2000": KVzipScorer(request, 2000, window=8),
        "KVzip no request": KVzipScorer((), 512, window=8),
    }
    return {name: Remembered(scorer) for name, scorer in made.items()}


def configurations(
    share: float,
    length: int,
    zips: Mapping[str, Remembered],
    profiles: dict[str, HeadProfile],
    only: Sequence[str] | None,
) -> dict[str, Any]:
    """Every method at `share` of a text of `length` tokens."""
    snap = SnapKVScorer(32, kernel_size=21)
    made: dict[str, Any] = {
        "SnapKV": headkv.SnapKV(share, snap),
        "AdaKV": headkv.AdaKV(share, snap),
        "AdaKV, model": headkv.AdaKV(share, snap, scope="model"),
        "DefensiveKV": headkv.DefensiveKV(share),
        "Layer-DefensiveKV": headkv.DefensiveKV(share, scope="model"),
        "CriticalAdaKV": headkv.CriticalKV(share, snap, adaptive=True),
        "Expected Attention": ScoredMethod(share, ExpectedAttentionScorer(epsilon=0.02)),
        "Expected Attention, AdaKV": ScoredMethod(
            share, ExpectedAttentionScorer(epsilon=0.02), AdaptiveAllocator()
        ),
        "KeyDiff": ScoredMethod(share, KeyDiffScorer()),
        "StreamingLLM": headkv.StreamingLLM(share),
    }
    for name, scorer in zips.items():
        made[f"{name}, uniform"] = ScoredMethod(share, scorer, UniformAllocator())
        made[f"{name}, layer"] = ScoredMethod(share, scorer, AdaptiveAllocator(0.2))
        for safeguard in (0.0, 0.1, 0.2):
            made[f"{name}, model s{safeguard}"] = ScoredMethod(
                share, scorer, AdaptiveAllocator(safeguard), scope="model"
            )
    for kind, profile in profiles.items():
        for beta in (1.1, 1.3, 2.0):
            allocator = ProfileAllocator(profile.scores.clamp(min=0), beta, reduce="max")
            made[f"SnapKV by {kind} b{beta}"] = ScoredMethod(share, snap, allocator)
            for name, scorer in zips.items():
                made[f"{name} by {kind} b{beta}"] = ScoredMethod(share, scorer, allocator)
            flat = ProfileAllocator(profile.scores.clamp(min=0), beta, 0.5, reduce="max")
            made[f"KVzip w8 by {kind} b{beta} p0.5"] = ScoredMethod(share, zips["KVzip w8"], flat)
        for safeguard in (0.3, 0.6):
            for beta in (1.1, 1.5):
                base = ProfileAllocator(profile.scores.clamp(min=0), beta, reduce="max")
                made[f"KVzip w8, model + {kind} b{beta} s{safeguard}"] = ScoredMethod(
                    share, zips["KVzip w8"], AdaptiveAllocator(safeguard, base), scope="model"
                )
        made[f"DuoAttention by {kind}"] = headkv.DuoAttention.for_share(share, length, profile)
        made[f"Duo16 by {kind}"] = headkv.DuoAttention.for_share(
            share, length, profile, sinks=4, recent=max(8, round(share / 4 * length))
        )
    if only:
        made = {name: method for name, method in made.items() if any(part in name for part in only)}
    return made


def texts(
    given: argparse.Namespace, tokenizer: Any
) -> Iterator[tuple[torch.Tensor, list[tuple[str, Question]]]]:
    """Every text, `context_ids` `[1, n]`, with its questions and what each is called."""

    def ids(text: str) -> torch.Tensor:
        return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])

    for length in given.lengths if given.needles else ():
        for text in needle_texts(tokenizer, texts=given.needles, lengths=[length], split="validation"):
            needles = [needle for needle in text.needles if not given.kinds or needle.kind in given.kinds]
            yield (
                text.context_ids,
                [(f"{needle.kind}@{length}", Question.of(needle, tokenizer)) for needle in needles],
            )
    if not given.documents:
        return
    give = read_documents(given.documents, tokenizer)
    for task in given.tasks:
        for length in given.lengths:
            for sample in give(task, length, 0, given.count):
                limit = LIMITS.get(task, sample.max_new_tokens)
                asked = Question(ids(sample.question), sample.expected, limit)
                yield ids(sample.context), [(f"{task}@{length}", asked)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print one row a method."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", choices=("plain", "tuned"), default="plain")
    options.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    options.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    options.add_argument("--needles", type=int, default=0, help="texts of each length, of all kinds")
    options.add_argument("--kinds", nargs="+", help="of needles (default: all)")
    options.add_argument("--documents", type=Path, help="what headkv documents wrote")
    options.add_argument("--tasks", nargs="+", default=list(OFFLINE), help="of the documents")
    options.add_argument("--count", type=int, default=100, help="documents of each task and length")
    options.add_argument(
        "--profiles", nargs="*", default=[], help="NAME=FILE of head profiles, or shipped names"
    )
    options.add_argument("--only", nargs="+", help="methods whose name holds one of these")
    options.add_argument("--weights", type=Path, help="low-rank weights in place of the shipped ones")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    options.add_argument("--json", type=Path)
    given = options.parse_args(arguments)
    if given.weights:
        from headkv.models.tuned import add_low_rank

        model, tokenizer = headkv.load_smollm2()
        add_low_rank(model, given.weights)
    else:
        model, tokenizer = headkv.load_smollm2(tuned=given.model == "tuned")
    model = model.to(given.device)
    profiles = {}
    for entry in given.profiles:
        name, _, file = entry.partition("=")
        profiles[name] = HeadProfile.load(file) if file else HeadProfile.builtin(name)
    profiles = {name: profile.renamed(model.config._name_or_path) for name, profile in profiles.items()}
    zips = readers(repeat_request(tokenizer))
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    stored: dict[str, list[float]] = defaultdict(list)
    begin, asked = time.monotonic(), 0
    for context, named in texts(given, tokenizer):
        if time.monotonic() - begin > given.seconds:
            break
        n, methods = context.shape[1], {}
        for share in given.shares:
            made = configurations(share, n, zips, profiles, given.only)
            methods |= {f"{name} @{share:g}": method for name, method in made.items()}
        answered = judge(model, tokenizer, context, [question for _, question in named], methods)
        for (what, _), verdicts in zip(named, answered, strict=True):
            for verdict in verdicts:
                found[verdict.method][what].append(verdict.found)
                stored[verdict.method].append(verdict.stored_share)
        asked += len(named)
        print(f"{what}: {asked} questions, {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    print_table(found, stored)
    device = torch.cuda.get_device_name() if given.device.startswith("cuda") else "CPU"
    took = time.monotonic() - begin
    print(f"SmolLM2 {given.model}, {asked} questions, {took:.0f} s on {device}, torch {torch.__version__}")
    if given.json:
        given.json.write_text(json.dumps({"found": found, "stored": stored}), encoding="utf-8")
    return 0


def print_table(found: dict[str, dict[str, list[float]]], stored: dict[str, list[float]]) -> None:
    """One row a method and share: what was found in each kind of text, the mean, and that over the full cache's."""
    kinds = list(found["full"])
    full = sum(sum(found["full"][kind]) / len(found["full"][kind]) for kind in kinds) / len(kinds)
    print(
        "| method | stored | "
        + " | ".join(f"{kind} ({len(found['full'][kind])})" for kind in kinds)
        + " | mean | of full |"
    )
    for name, by_kind in found.items():
        means = [sum(by_kind[kind]) / len(by_kind[kind]) for kind in kinds]
        mean, share = sum(means) / len(means), sum(stored[name]) / len(stored[name])
        cells = " | ".join(f"{m:.2f}" for m in means)
        print(f"| {name} | {share:.1%} | {cells} | {mean:.2f} | {mean / max(full, 1e-9):.2f} |")


if __name__ == "__main__":
    sys.exit(main())
