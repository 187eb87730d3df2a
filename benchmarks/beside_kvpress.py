"""A method does not beat its baseline: is it us? kvpress's own presses on the same documents, entry by entry.

    make test-kvpress       # once: makes kvpress's own environment
    python benchmarks/beside_kvpress.py --documents ruler.jsonl.gz --python .venv-kvpress/bin/python

The tuned SmolLM2 is written to a folder, where `kvpress_presses.py` reads it with kvpress and the transformers that
kvpress pins. *Alike* is headkv's method with the settings and the counting that kvpress has, *here* the one of the
tables in README.md, at the same share. *Same* is the share of the entries that kvpress keeps which that method keeps,
too, over all heads: 1 where the sets are equal. An answer is what the full cache answers; *right* and *nats* are those
of `turned_around.py`.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from measure import Row, add_json, finish
from torch import Tensor
from whole_answers import documents, judged

import headkv
from headkv.allocators import FixedAllocator
from headkv.evaluation.reading import Reading
from headkv.evaluation.roster import roster
from headkv.methods import CriticalKV, ScoredMethod
from headkv.models.smollm2 import load_smollm2
from headkv.scorers import ExpectedAttentionScorer, KeyDiffScorer, SnapKVScorer

WINDOW, KERNEL, BETA = 64, 5, 20  # kvpress's defaults
HERE = {  # kvpress's name of it, and the roster's
    "StreamingLLM": "StreamingLLM",
    "SnapKV": "SnapKV",
    "PyramidKV": "PyramidKV",
    "PyramidKV, window 4": "PyramidKV",
    "AdaKV": "AdaKV",
    "AdaKV, question at once": "AdaKV",
    "CriticalKV": "CriticalKV",
    "CriticalAdaKV": "CriticalAdaKV",
    "ExpectedAttention": "ExpectedAttention",
    "KeyDiff": "KeyDiff",
}


@dataclass(frozen=True)
class WindowFirst(CriticalKV):
    """CriticalKV as kvpress counts: the half that scores alone fill holds the window, too."""

    def second_look(self, scores: Tensor, norms: Tensor, budgets: Tensor) -> Tensor:
        again = (scores.float() + self.epsilon) * norms
        rank = scores.float().sort(dim=1, descending=True, stable=True).indices.argsort(1)
        fixed = ((budgets + WINDOW) // 2 - WINDOW).to(scores.device)
        return torch.where(rank < fixed[:, None], again.max() + 1, again)


def pyramid_sizes(kept: float, n: int, window: int, num_layers: int) -> list[int]:
    """Entries a head in each layer of kvpress's pyramid: the window is in them, and a narrow one is none.

    headkv, and the paper's code, make a pyramid of the entries beside the window. Where the last layer would have less
    than the window, which at small shares it has, kvpress falls back to equal budgets.
    """
    low = kept / BETA
    high = 2 * kept - low
    if high >= n - window:
        high, low = n - window, 2 * kept - (n - window)
    if not n >= high >= low >= window:
        return [max(1, round(kept))] * num_layers
    step = (high - low) / max(1, num_layers - 1)
    return [round(high - i * step) for i in range(num_layers)]


def alike(share: float, n: int, num_layers: int, num_heads: int) -> dict[str, Any]:
    """headkv's methods, set as kvpress has them; a comment says where headkv differs."""
    ratio = 1 - share
    entries = max(1, int(n * (1 - ratio)))  # rounded down; headkv rounds
    snap = SnapKVScorer(WINDOW, KERNEL, pooling="avg")
    # The window counts in a head's safe fifth, which it fills.
    ada = headkv.AdaKV(entries, snap, safeguard=0)
    kept = (WINDOW + n * (1 - ratio)) - WINDOW

    def pyramid(window: int) -> ScoredMethod:
        sizes = [[max(0, size - window)] * num_heads for size in pyramid_sizes(kept, n, window, num_layers)]
        return ScoredMethod(entries, SnapKVScorer(window, KERNEL, pooling="avg"), FixedAllocator(sizes))

    return {
        "StreamingLLM": headkv.StreamingLLM(entries),
        "SnapKV": headkv.SnapKV(entries, snap),
        "PyramidKV": pyramid(WINDOW),
        "PyramidKV, window 4": pyramid(4),
        "AdaKV": ada,
        "AdaKV, question at once": ada,
        "CriticalKV": WindowFirst(entries, snap),
        "CriticalAdaKV": WindowFirst(entries, snap, adaptive=True, safeguard=0),
        "ExpectedAttention": ScoredMethod(entries, ExpectedAttentionScorer(epsilon=0)),
        "KeyDiff": ScoredMethod(entries, KeyDiffScorer()),
    }


@dataclass(frozen=True, eq=False)
class Prompt:
    """What is compressed, what is fed after it `[1, m]`, and the answer `[1, a]` that should come."""

    reading: Reading
    ids: Tensor
    tokens: Tensor
    answer: Tensor


def compare(
    prompts: Sequence[Prompt],
    here: Mapping[str, Any],
    theirs: Sequence[Mapping[tuple[str, float], Any]],
) -> list[Row]:
    """One row a press and share.

    Args:
        prompts: read by headkv.
        here: from a name of `HERE` to what makes the method, given a share and the tokens of the prompt.
        theirs: of each prompt what `kvpress_presses.pressed` says.
    """
    cells: dict[tuple[str, float], list[dict[str, float]]] = {}
    for prompt, pressed in zip(prompts, theirs, strict=True):
        reading, shares = prompt.reading, sorted({share for _, share in pressed})
        n, (num_layers, num_heads) = (
            reading.cache.seen,
            (len(reading.layers), reading.layers[0].keys.shape[0]),
        )
        for share in shares:
            sets = {"alike": alike(share, n, num_layers, num_heads)}
            sets["here"] = {name: here[name](share, n) for name in sets["alike"]}
            plans = {kind: {name: reading.plan(x) for name, x in made.items()} for kind, made in sets.items()}
            verdicts = {
                kind: dict(zip(made, judged(reading, prompt.tokens, prompt.answer, made), strict=True))
                for kind, made in sets.items()
            }
            for name in sets["alike"]:
                one = pressed[name, share]
                row = {
                    "failed": float("error" in one),
                    "kept": float(one["kept"].sum() / one["kept"].numel()),
                }
                row |= {"right": float(one.get("right", 0)), "nats": one.get("nats", float("nan"))}
                for kind in sets:
                    masks = torch.stack([keep.mask for keep in plans[kind][name]])
                    row[f"same {kind}"] = float((masks & one["kept"]).sum() / one["kept"].sum())
                    row[f"right {kind}"], row[f"nats {kind}"] = map(float, verdicts[kind][name])
                cells.setdefault((name, share), []).append(row)
    return [table_row(name, share, rows) for (name, share), rows in cells.items()]


def table_row(name: str, share: float, rows: Sequence[Mapping[str, float]]) -> Row:
    """The means over all prompts; nats over those that kvpress could ask."""
    asked = [row for row in rows if not row["failed"]]
    made: dict[str, str | float] = {"press": name, "share": f"{share:.0%}"}
    made["kept"] = f"{mean(row['kept'] for row in rows):.4f}"
    for kind in ("alike", "here"):
        made[f"same, {kind}"] = f"{mean(row[f'same {kind}'] for row in rows):.4f}"
    for kind in ("", " alike", " here"):
        made[f"right{kind}" if kind else "right, kvpress"] = (
            f"{sum(row[f'right{kind}'] for row in asked):.0f}/{len(asked)}"
        )
    for kind in ("", " alike", " here"):
        nats = f"{mean(row[f'nats{kind}'] for row in asked):.3f}" if asked else "-"
        made[f"nats{kind}" if kind else "nats, kvpress"] = nats
    failed = sum(row["failed"] for row in rows)
    return made | {"kvpress fails": f"{failed:.0f}"}


def beside(
    model: Any, prompts: Sequence[Prompt], python: str, shares: Sequence[float]
) -> list[dict[tuple[str, float], Any]]:
    """What kvpress makes of the prompts, in the environment of the interpreter `python`."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model")
        given = [{"ids": x.ids, "tokens": x.tokens, "answer": x.answer} for x in prompts]
        torch.save(given, Path(folder) / "prompts.pt")
        script = Path(__file__).with_name("kvpress_presses.py")
        subprocess.run([python, str(script), folder, *map(str, shares)], check=True)
        done: list[dict[tuple[str, float], Any]] = torch.load(Path(folder) / "pressed.pt")
    return done


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=Path, required=True, help="what headkv documents wrote")
    parser.add_argument("--python", required=True, help="of an environment with kvpress")
    parser.add_argument(
        "--tasks", nargs="+", default=["niah_multikey_2", "ruler_fwe"], help="of the documents"
    )
    parser.add_argument("--length", type=int, default=1024, help="of the documents")
    parser.add_argument("--count", type=int, default=20, help="documents of each task")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--question", choices=("seen", "unseen"), default="seen")
    add_json(parser)
    given = parser.parse_args(arguments)
    model, tokenizer = load_smollm2(tuned=True)
    made = roster(tuple(HERE.values()), model, tokenizer)
    here = {name: made[ours] for name, ours in HERE.items()}
    tables = {}
    for task in given.tasks:
        prompts = []
        for document in documents(model, tokenizer, given.documents, [task], given.length, given.count):
            reading, tokens = document.way(given.question)
            prompts.append(Prompt(reading, document.compressed(given.question), tokens, document.answer))
        theirs = beside(model, prompts, given.python, given.shares)
        tables[f"{task}, {given.question}, {len(prompts)} documents"] = compare(prompts, here, theirs)
    finish(given.json, tables, [])


if __name__ == "__main__":
    main()
