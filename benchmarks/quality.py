"""What the book's quality map shows: every method of `headkv demo` at several shares, questions seen and unseen.

    python benchmarks/quality.py plain --out book/data/quality.json

Texts, questions and what is right are those of `headkv demo`: a word and a number hidden in each text. A text is read
once for all methods and shares. On a CPU a model takes about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import headkv
from headkv.data import needle_texts
from headkv.data.chat import repeat_request
from headkv.evaluation.compare import compare, smollm2_methods
from headkv.evaluation.roster import reader

SHARES = (0.05, 0.1, 0.2, 0.4)
TEXTS = 10
TOKENS = 800


def quality(kind: str, texts: int, device: str) -> dict[str, Any]:
    """Right answers of every method at every share, of one model ("plain" or "tuned")."""
    model, tokenizer = headkv.load_smollm2(tuned=kind == "tuned")
    model.to(device)
    again = reader(repeat_request(tokenizer))
    entries = {
        f"{name} @{share}": entry
        for share in SHARES
        for name, entry in smollm2_methods(share, again, tuned=kind == "tuned").items()
    }
    asked = needle_texts(
        tokenizer, texts=texts, lengths=[TOKENS], kinds=("words", "numbers"), split="validation"
    )
    rows: list[dict[str, Any]] = []
    for result in compare(model, asked, entries):
        name, _, share = result.name.partition(" @")
        rows.append(
            {
                "method": name,
                "heads": result.heads,
                "share": float(share or 1),
                "stored": round(result.stored_share, 4),
                "nbytes": result.nbytes,
                "seen": sum(result.seen),
                "unseen": sum(result.unseen),
            }
        )
        print(f"{kind}, {result.name}: {rows[-1]}", file=sys.stderr, flush=True)
    tokens = asked[0].context_ids.shape[1]
    return {"texts": texts, "questions": len(result.seen), "tokens": tokens, "rows": rows}


def main() -> int:
    """Measure the models that are asked for, and put them into the file."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("models", nargs="+", choices=("plain", "tuned"))
    options.add_argument("--texts", type=int, default=TEXTS)
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options.add_argument("--out", type=Path, required=True)
    given = options.parse_args()
    made = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    for kind in given.models:
        command = f"python benchmarks/quality.py {kind} --texts {given.texts} --out book/data/quality.json"
        chip = "CPU" if given.device == "cpu" else torch.cuda.get_device_name(given.device)
        made[kind] = {"command": command, "device": chip, **quality(kind, given.texts, given.device)}
        given.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
