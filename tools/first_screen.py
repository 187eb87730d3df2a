"""The book's first picture: one cache, the same bytes, split evenly over the heads or not.

    python tools/first_screen.py --out book/data/first_screen.json
    python tools/first_screen.py --times --out book/data/first_screen.json

Texts of many lines, each a number for a key (the form `number_lines` of `headkv.data.tasks`, validation words), are
read by the tuned SmolLM2 and compressed before it is known which number will be asked for. KVzip's scores keep their
best entries, once with the same budget for every head and once with one budget over all heads; SnapKV stands beside
them. Of the first text the file also holds what every head keeps of it, and how long a decode step then takes;
on a quiet machine `--times` measures these times again, and nothing else. SmolLM2 as it is gets easier questions, the
needles of five kinds of `headkv.data.needles`, which it answers with a full cache.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import headkv
from headkv.allocators import UniformAllocator
from headkv.data.chat import REPEAT, chat_frame
from headkv.data.needles import needle_texts
from headkv.data.tasks import Source, Task, make_task, own_prose, token_counter
from headkv.data.words import Words
from headkv.evaluation.compare import FULL, step_times
from headkv.evaluation.reading import Reading
from headkv.evaluation.remembered import Remembered
from headkv.evaluation.unseen import Question, judge
from headkv.methods import FullCache, ScoredMethod
from headkv.models.tuned import tuned_weights
from headkv.scorers import KVzipScorer, SnapKVScorer

FORM, ROOM, SEED = "number_lines", 900, "first screen"
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
COLUMNS = {"uniform": "Every head keeps the same", "kvzip": "Each head keeps what it needs"}
PLAIN_SHARES = (0.1, 0.2, 0.3)
BYTES_PER_ENTRY = 2 * 64 * 4  # a key and a value of SmolLM2, float32
AROUND = 16  # tokens before and after the fact that the picture shows
STEPS = 48  # decode steps that are timed, of each way and share
LOADED = Any


def ids(tokenizer: LOADED, text: str) -> Tensor:
    """Tokens `[1, n]` of a text, and nothing else."""
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])


def make_text(tokenizer: LOADED, number: int) -> Task:
    """Text `number`: from the words that the tuned model never saw in a question."""
    words = Words.parts(tokenizer.get_vocab())[1]
    source = Source(random.Random(f"{SEED} {number}"), words, token_counter(tokenizer), own_prose())
    return make_task(FORM, source, ROOM)


def prompt(tokenizer: LOADED, task: Task) -> tuple[Tensor, Question]:
    """The text `[1, n]` as the model reads it, and the question that comes after the compression."""
    header, footer = chat_frame(tokenizer)
    asked = ids(tokenizer, task.question + footer + task.prefix)
    return ids(tokenizer, header + task.text), Question(asked, task.answers, max_new_tokens=10)


def methods(tokenizer: LOADED, share: float, scorer: Any = None) -> dict[str, Any]:
    """SnapKV; KVzip's scores with even budgets; KVzip, whose budget is one for all heads of all layers."""
    scorer = scorer or KVzipScorer(ids(tokenizer, REPEAT)[0].tolist(), chunk=512, window=8)
    return {
        "snapkv": headkv.SnapKV(share, SnapKVScorer(32, kernel_size=21)),
        "uniform": ScoredMethod(share, scorer, UniformAllocator()),
        "kvzip": headkv.KVzip(share, scorer),
    }


def measure(model: LOADED, tokenizer: LOADED, task: Task, shares: Sequence[float]) -> dict[str, Any]:
    """Each method's answer at each share: whether it is right, and what was said."""
    context, question = prompt(tokenizer, task)
    scorer: Any = Remembered(methods(tokenizer, 1.0)["kvzip"].scorer)
    asked = {
        f"{name} {share}": method
        for share in shares
        for name, method in methods(tokenizer, share, scorer).items()
    }
    full, *verdicts = judge(model, tokenizer, context, [question], asked)[0]
    said: dict[str, Any] = {"full": [full.found == 1, first_words(full.text)]}
    for verdict in verdicts:
        name, _ = verdict.method.split()
        said.setdefault(name, []).append([verdict.found == 1, first_words(verdict.text)])
    return said


def first_words(text: str) -> str:
    """A reply up to its first full stop or line break."""
    return re.split(r"[.\n]", text.strip())[0] or "(nothing)"


def plain(texts: int) -> dict[str, Any]:
    """How many needles SmolLM2 as it is finds: with the full cache, and of each method at each share."""
    model, tokenizer = headkv.load_smollm2()
    right: dict[str, Any] = {"asked": 0, "shares": list(PLAIN_SHARES), "full": 0}
    for text in needle_texts(tokenizer, texts=texts, lengths=[ROOM], split="validation"):
        scorer: Any = Remembered(methods(tokenizer, 1.0)["kvzip"].scorer)
        asked = {
            f"{name} {i}": method
            for i, share in enumerate(PLAIN_SHARES)
            for name, method in methods(tokenizer, share, scorer).items()
        }
        questions = [Question.of(needle, tokenizer) for needle in text.needles]
        for full, *verdicts in judge(model, tokenizer, text.context_ids, questions, asked):
            right["asked"] += 1
            right["full"] += int(full.found)
            for verdict in verdicts:
                name, at = verdict.method.split()
                right.setdefault(name, [0] * len(PLAIN_SHARES))[int(at)] += int(verdict.found)
    return right


def picture(model: LOADED, tokenizer: LOADED, task: Task, shares: Sequence[float]) -> dict[str, Any]:
    """What each head keeps of a text: how many entries, and which around the fact."""
    context, question = prompt(tokenizer, task)
    tokens = [tokenizer.decode(token) for token in context[0]]
    text = "".join(tokens)
    line = text.rindex("\n", 0, text.index(task.answers[0])) + 1
    starts = [0]
    for token in tokens:
        starts.append(starts[-1] + len(token))
    first = starts.index(line)
    answer = [i for i in range(first, len(tokens)) if starts[i] >= text.index(task.answers[0])]
    answer = answer[: len(ids(tokenizer, task.answers[0])[0])]
    span = [first, answer[-1] + 2]  # with the full stop
    shown = [span[0] - AROUND, span[1] + AROUND]
    reading = Reading(model, torch.cat([context, question.ids[:, :1]], 1))
    scorer: Any = Remembered(methods(tokenizer, 1.0)["kvzip"].scorer)
    columns: dict[str, Any] = {words: {"lengths": [], "kept": []} for words in COLUMNS.values()}
    for share in shares:
        asked = methods(tokenizer, share, scorer)
        for name, words in COLUMNS.items():
            kept = reading.kept(asked[name])  # [layers, H, n]
            columns[words]["lengths"].append(kept.sum(-1).tolist())
            columns[words]["kept"].append(kept[..., shown[0] : shown[1]].int().tolist())
    return {
        "columns": columns,
        "picture": {
            "shares": list(shares),
            "length": len(tokens),
            "tokens": tokens[shown[0] : shown[1]],
            "fact": [i - shown[0] for i in span],
            "answer": [answer[0] - shown[0], answer[-1] + 1 - shown[0]],
            "question": task.question,
            "expected": task.answers[0],
            "bytes_per_entry": BYTES_PER_ENTRY,
        },
    }


def add_times(found: dict[str, Any], model: LOADED, tokenizer: LOADED, steps: int = STEPS) -> None:
    """Note in `found` the median milliseconds of a decode step over its first text, and where they were measured."""
    context, question = prompt(tokenizer, make_text(tokenizer, 0))
    reading = Reading(model, torch.cat([context, question.ids[:, :1]], 1))
    shares = found["picture"]["shares"]
    scorer: Any = Remembered(methods(tokenizer, 1.0)["kvzip"].scorer)
    every: dict[str, Any] = {FULL: FullCache()}
    for share in shares:
        made = methods(tokenizer, share, scorer)
        every |= {f"{name} {share}": made[name] for name in COLUMNS}
    times = {name: round(ms, 2) for name, ms in step_times(reading, every, steps).items()}
    found["picture"]["full_step_ms"] = times[FULL]
    for name, words in COLUMNS.items():
        found["columns"][words]["step_ms"] = [times[f"{name} {share}"] for share in shares]
    threads = torch.get_num_threads()
    found["times"] = {
        "made_by": "python tools/first_screen.py --times",
        "device": f"CPU, {threads} {'thread' if threads == 1 else 'threads'}",
        "steps": steps,
    }


def weights_hash() -> str:
    """Of the tuned weights that ship."""
    return hashlib.sha256(tuned_weights().read_bytes()).hexdigest()


def main() -> None:
    """Measure and write the file."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--texts", type=int, default=12)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument(
        "--times", action="store_true", help="only measure the times of a file that is there again"
    )
    given = options.parse_args()
    if given.times:
        found = json.loads(given.out.read_text("utf-8"))
        if found["weights"] != weights_hash():
            options.error(f"--out must be of the weights that ship, got {given.out}: make it without --times")
        add_times(found, *headkv.load_smollm2(tuned=True))
        print(found["times"], found["picture"]["full_step_ms"], flush=True)
    else:
        found = measured(given.texts)
    given.out.write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")


def measured(texts: int) -> dict[str, Any]:
    """All that the file holds."""
    model, tokenizer = headkv.load_smollm2(tuned=True)
    tasks = [make_text(tokenizer, number) for number in range(texts)]
    found = {
        "made_by": f"python tools/first_screen.py --texts {texts}",
        "model": model.name_or_path,
        "weights": weights_hash(),
        **picture(model, tokenizer, tasks[0], SHARES),
        "texts": [],
    }
    for number, task in enumerate(tasks):
        found["texts"].append(measure(model, tokenizer, task, SHARES))
        print(f"text {number}:", found["texts"][-1], flush=True)
    for name, words in COLUMNS.items():
        found["columns"][words]["answers"] = found["texts"][0][name]
        found["columns"][words]["right"] = [
            sum(text[name][i][0] for text in found["texts"]) for i in range(len(SHARES))
        ]
    found["picture"]["asked"] = len(tasks)
    add_times(found, model, tokenizer)
    found["plain"] = plain(texts)
    print("as it is:", found["plain"], flush=True)
    return found


if __name__ == "__main__":
    main()
