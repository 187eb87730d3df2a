"""A method does not beat its baseline: is it the model? Its own idea, bounded, taken apart and turned around.

    python benchmarks/turned_around.py --documents ruler.jsonl.gz

The tuned SmolLM2 reads RULER documents, as `headkv documents` writes them. What the full cache answers, if it is right,
is what every other cache should answer: its *nats* are the log-probability of that answer, a token, and it is *right*
where each token is the first choice. *better : worse* counts the documents on which a method gives the answer more, or
less, than the first of its table does, by more than a hundredth of a nat a token.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from measure import Row, add_json, finish
from torch import Tensor
from turned_methods import Earlier, LeastNorms, Pooled, Together
from whole_answers import Document, documents, judged

import headkv
from headkv.allocators import AdaptiveAllocator, ProfileAllocator
from headkv.allocators.adaptive import global_top_counts
from headkv.data.chat import repeat_request
from headkv.data.needles import Needle, NeedleText
from headkv.evaluation.reading import Reading
from headkv.evaluation.roster import EXPECTED, KEY_DIFF, SNAP, reader
from headkv.heads import HeadProfile
from headkv.heads.ablation import ablate
from headkv.heads.contexts import Stream
from headkv.methods import CriticalKV, ScoredMethod
from headkv.methods.selection import budget_entries, prompt_scores
from headkv.scorers import ExpectedAttentionScorer, KeyDiffScorer, SnapKVScorer
from headkv.scorers.defensive import DefensiveScorer

TASKS = ("niah_multikey_2", "ruler_fwe")
GROUPS = (1, 5, 30)  # layers whose heads share a budget
NOISE = 0.01  # nats a token
SLOPES = (1.0, 0.05, 0.5, 1.5, 1.95)  # the last layer's budget over the mean; 1 is flat, .05 published
Methods = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Bench:
    """One way to ask about a document: what the studies are made of.

    Attributes:
        reading: of what is compressed.
        asked: tokens of the question in it: 0 where it comes later.
        drops: what the answer loses without each head, `[L, H]`: nats, at least 0.
        profile: the same, of other texts.
    """

    reading: Reading
    asked: int
    drops: Tensor
    profile: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.drops.shape[0], self.drops.shape[1]


def layers(bench: Bench, share: float, scorer: Any) -> Methods:
    """PyramidKV: budgets that fall over the layers, that rise, and as much a layer as its heads are worth."""

    def of(weights: Tensor, beta: float = 1) -> ScoredMethod:
        return ScoredMethod(share, scorer, ProfileAllocator(weights.expand(bench.shape), beta))

    slopes = {last: torch.linspace(2 - last, last, bench.shape[0])[:, None] for last in SLOPES}
    made: Methods = {f"{2 - last:g} to {last:g} of the mean": of(slope) for last, slope in slopes.items()}
    return made | {"as the ablation profile's layers": of(bench.profile.sum(1, keepdim=True), 1.1)}


def heads(bench: Bench, share: float, scorer: Any) -> Methods:
    """Ada-KV: in a layer, over more layers, and with each layer's split, or all budgets, by what the answer needs."""

    def by(worth: Tensor) -> ScoredMethod:
        return ScoredMethod(
            share, scorer, ProfileAllocator(worth, beta=1.25)
        )  # a fifth is safe, as in Ada-KV

    num_layers, num_heads = bench.shape
    needed = bench.drops + 1e-9
    made: Methods = {"uniform": ScoredMethod(share, scorer)}
    for k in (k for k in GROUPS if num_layers % k == 0):
        made[f"Ada-KV, {k * num_heads} heads together"] = Together(share, scorer, k)
    made["each layer by this answer's ablation"] = by(needed / needed.sum(1, keepdim=True))
    return made | {"all layers by this answer's ablation": by(needed)}


def defensive(bench: Bench, share: float, scorer: Any) -> Methods:
    """DefensiveKV: with SnapKV's kernel, a part less, and with a window before the question."""
    wide, ada = DefensiveScorer(kernel_size=21), AdaptiveAllocator(0.0)
    made: Methods = {
        "Ada-KV, kernel 21": headkv.AdaKV(share, scorer),
        "Ada-KV, kernel 7": headkv.AdaKV(share, SnapKVScorer()),
        "DefensiveKV, kernel 5": headkv.DefensiveKV(share),
        "DefensiveKV, kernel 21": ScoredMethod(share, wide, ada),
        "the same, none first": ScoredMethod(share, replace(wide, mass=0), ada),
    }
    if bench.asked:
        skipped = Earlier(DefensiveScorer(window=8), bench.asked)
        made["kernel 5, window of 8 before the question"] = ScoredMethod(share, skipped, ada)
    return made


def norms(bench: Bench, share: float, scorer: Any) -> Methods:
    """CriticalAdaKV: half or nothing by attention alone, and norms turned around."""
    del bench
    made: Methods = {"Ada-KV": headkv.AdaKV(share, scorer)}
    for kind, name in ((CriticalKV, "CriticalAdaKV"), (LeastNorms, "norms turned around")):
        made[name] = kind(share, scorer, adaptive=True)
        made[f"{name}, from the first entry"] = kind(share, scorer, adaptive=True, first_share=0)
    return made


def windows(bench: Bench, share: float, scorer: Any) -> Methods:
    """Expected Attention and KeyDiff: with a window, as StreamingLLM has, and with neighbours kept together."""
    del bench
    made: Methods = {"StreamingLLM": headkv.StreamingLLM(share), "SnapKV": headkv.SnapKV(share, scorer)}
    windowed = {
        "Expected Attention": ExpectedAttentionScorer(epsilon=0.02, window=32),
        "KeyDiff": KeyDiffScorer(32),
    }
    for (name, with_window), plain in zip(windowed.items(), (EXPECTED, KEY_DIFF), strict=True):
        made[name] = ScoredMethod(share, plain)
        made[f"{name}, window 32"] = ScoredMethod(share, with_window)
        made[f"{name}, kernel 21"] = ScoredMethod(share, Pooled(plain))
    return made


# What is asked, of which scores, whether the question was seen, and the methods; the first is the baseline.
STUDIES: Mapping[str, tuple[Any, str, str]] = {
    "PyramidKV seen": (layers, "SnapKV", "seen"),
    "PyramidKV unseen, KVzip's scores": (layers, "KVzip", "unseen"),
    "Ada-KV seen": (heads, "SnapKV", "seen"),
    "Ada-KV unseen": (heads, "SnapKV", "unseen"),
    "Ada-KV unseen, KVzip's scores": (heads, "KVzip", "unseen"),
    "DefensiveKV seen": (defensive, "SnapKV", "seen"),
    "DefensiveKV unseen": (defensive, "SnapKV", "unseen"),
    "CriticalAdaKV seen": (norms, "SnapKV", "seen"),
    "Expected Attention and KeyDiff unseen": (windows, "SnapKV", "unseen"),
}


def given_to_the_needed(bench: Bench, share: float, scorer: Any) -> tuple[float, float]:
    """Of each layer's slots, those that the scores give its largest head, and the head that the answer needs most.

    The second is a mean over layers, each weighed by what its heads are worth; a third is chance among three.
    """
    scores = [x.cpu() for x in prompt_scores(bench.reading.prompt, scorer)]
    n, num_heads = bench.reading.cache.seen, bench.shape[1]
    total = num_heads * (budget_entries(share, n) - scorer.window)
    parts = torch.stack([global_top_counts(x, total) / total for x in scores]).float()
    first, worth = bench.drops.argmax(1, keepdim=True), bench.drops.sum(1)
    needed = (parts.gather(1, first)[:, 0] * worth).sum() / worth.sum()
    return float(parts.amax(1).mean()), float(needed)


class Found:
    """What was found of one study at one share: for each task and method `(right, nats)` a document."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, list[tuple[bool, float]]]] = {}
        self.parts: list[tuple[float, float]] = []

    def add(self, task: str, methods: Methods, results: Sequence[tuple[bool, float]]) -> None:
        """One document's."""
        for name, result in zip(methods, results, strict=True):
            self.cells.setdefault(name, {}).setdefault(task, []).append(result)

    def rows(self) -> list[Row]:
        """One row a method."""
        rows: list[Row] = []
        baseline = next(iter(self.cells.values()))
        for name, by_task in self.cells.items():
            gains = [
                one[1] - other[1]
                for task, results in by_task.items()
                for one, other in zip(results, baseline[task], strict=True)
            ]
            better, worse = sum(gain > NOISE for gain in gains), sum(gain < -NOISE for gain in gains)
            row: dict[str, str | float] = {"": name}
            for task, results in by_task.items():
                row[task] = f"{sum(right for right, _ in results)}/{len(results)}"
            nats = mean(mean(nats for _, nats in results) for results in by_task.values())
            rows.append(row | {"nats": round(nats, 3), "better : worse": f"{better} : {worse}"})
        return rows


def measure(
    some: Iterable[Document],
    profile: Tensor,
    request: Sequence[int],
    studies: Sequence[str] = tuple(STUDIES),
    shares: Sequence[float] = (0.1,),
    seconds: float = float("inf"),
) -> dict[str, Found]:
    """Every study at every share over all documents, by a title.

    Args:
        some: documents.
        profile: ablation scores `[L, H]` of other texts.
        request: to repeat the text, for KVzip's scores.
        studies: of `STUDIES`.
        shares: of the entries that are kept.
        seconds: no document is begun after so long.
    """
    found: dict[str, Found] = {}
    begin, again = time.monotonic(), reader(request)
    for number, document in enumerate(some, 1):
        needle = Needle(document.task, document.question, document.answer)
        drops = ablate(document.seen.model, [NeedleText(document.text, (needle,))], Stream())[0].cpu()
        for name in studies:
            study, by, way = STUDIES[name]
            reading, tokens = document.way(way)
            asked = document.question.shape[1] if way == "seen" else 0
            bench, scorer = Bench(reading, asked, drops, profile), again if by == "KVzip" else SNAP
            for share in shares:
                here = found.setdefault(f"{name}, {share:.0%}", Found())
                methods = study(bench, share, scorer)
                here.add(document.task, methods, judged(reading, tokens, document.answer, methods))
                if study is heads and float(drops.sum()) > 0:
                    here.parts.append(given_to_the_needed(bench, share, scorer))
        took = time.monotonic() - begin
        print(f"document {number}, {document.task}: {took:.0f} s", file=sys.stderr, flush=True)
        if took > seconds:
            break
    return found


def shown(found: Mapping[str, Found]) -> dict[str, list[Row]]:
    """A table a study, and one of what each layer's head gets that the answer needs."""
    tables = {title: one.rows() for title, one in found.items()}
    parts: list[Row] = [
        {
            "": title,
            "to the largest head": f"{mean(largest for largest, _ in one.parts):.2f}",
            "to the head that the answer needs": f"{mean(needed for _, needed in one.parts):.2f}",
        }
        for title, one in found.items()
        if one.parts
    ]
    return tables | ({"Of a layer's slots, by the scores alone": parts} if parts else {})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=Path, required=True, help="what headkv documents wrote")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="of the documents")
    parser.add_argument("--length", type=int, default=1024, help="of the documents")
    parser.add_argument("--count", type=int, default=10, help="documents of each task")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1])
    parser.add_argument(
        "--studies",
        nargs="+",
        default=list(STUDIES),
        choices=list(STUDIES),
        metavar="NAME",
        help=f"of {', '.join(STUDIES)}",
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no document after so long")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    add_json(parser)
    given = parser.parse_args(arguments)
    model, tokenizer = headkv.load_smollm2(tuned=True)
    model.to(given.device)
    some = documents(model, tokenizer, given.documents, given.tasks, given.length, given.count)
    profile = HeadProfile.for_model(model, "ablation").scores.clamp(min=0)
    request = repeat_request(tokenizer)
    finish(given.json, shown(measure(some, profile, request, given.studies, given.shares, given.seconds)), [])


if __name__ == "__main__":
    main()
