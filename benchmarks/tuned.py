"""What the tuned SmolLM2 can do beside the plain one, each with its full cache.

    python benchmarks/tuned.py --documents ruler.json

Four tables: RULER's offline tasks on lm-evaluation-harness's documents (`ruler_documents.py` writes them; without
--documents they are left out), headkv's own forms of question (`headkv.data.tasks`, words and names that were not
tuned on), the loss on prose and on the plain model's own answers, neither of them trained on, and a few answers to
everyday questions. Replies are greedy; a score is the mean share of the reference answers that stand in the reply.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import headkv
from headkv.data.haystacks import chat_frame
from headkv.data.tasks import FORMS, Source, Task, make_task, own_prose, token_counter
from headkv.data.words import Words
from headkv.models.smollm2 import MODEL_ID
from headkv.models.tuned import TUNED_ID, add_low_rank

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
from tune import answer, manual, questions  # noqa: E402

# As lm-evaluation-harness 0.4.13 limits the replies.
NEW_TOKENS = {"ruler_vt": 30, "ruler_cwe": 120, "ruler_fwe": 50}
CHATS = (
    "What is the capital of France?",
    *(q for q in questions(held_out=True) if q.startswith(("Describe", "Why"))),
)


def ruler_tasks(path: Path, count: int, only: Sequence[str] | None) -> dict[str, list[Task]]:
    """Read lm-eval's documents as tasks, the question cut off behind the text."""
    tasks = {}
    for name, documents in json.loads(path.read_text(encoding="utf-8"))["documents"].items():
        if only and not any(part in name for part in only):
            continue
        mark = "What is" if name.startswith("niah") else "Question:"
        tasks[name] = []
        for document in documents[:count]:
            at = document["input"].rindex(mark)
            text, question = document["input"][:at], document["input"][at:]
            answers = tuple(document["outputs"])
            tasks[name].append(
                Task(name, text, question, document["gen_prefix"], answers, ("",) * len(answers))
            )
    return tasks


def own_tasks(tokenizer: Any, words: Words, lengths: Sequence[int], count: int) -> dict[str, list[Task]]:
    """Make tasks of every form, from the words of the validation part."""
    counter, prose = token_counter(tokenizer), own_prose()
    return {
        f"{form}@{length}": [
            make_task(
                form, Source(random.Random(f"validation-{number}"), words, counter, prose), length - 150
            )
            for number in range(count)
        ]
        for form in FORMS
        for length in lengths
    }


@torch.inference_mode()
def replies(model: Any, tokenizer: Any, tasks: Sequence[Task], new_tokens: int, tokens: int) -> list[str]:
    """Answer greedily, about `tokens` tokens a batch."""
    header, footer = chat_frame(tokenizer)
    prompts = []
    for task in tasks:
        parts = (header + task.text, task.question + footer + task.prefix)
        prompts.append([i for part in parts for i in tokenizer(part, add_special_tokens=False)["input_ids"]])
    said, end = [""] * len(prompts), tokenizer.eos_token_id
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    rows = max(1, tokens // max(map(len, prompts)))
    for at in range(0, len(order), rows):
        some = [prompts[i] for i in order[at : at + rows]]
        width = max(map(len, some))
        ids = torch.tensor([[end] * (width - len(p)) + p for p in some], device=model.device)
        seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some], device=model.device)
        out = model.generate(
            ids, attention_mask=seen, max_new_tokens=new_tokens, do_sample=False, pad_token_id=end
        )
        for i, row in zip(order[at : at + rows], out[:, width:], strict=True):
            said[i] = tokenizer.decode(row, skip_special_tokens=True)
    return said


@torch.inference_mode()
def loss(model: Any, texts: Sequence[tuple[list[int], int]]) -> float:
    """Return the mean negative log-likelihood of the tokens from where each text counts, in nats."""
    total, number = 0.0, 0
    for ids, start in texts:
        tokens = torch.tensor([ids], device=model.device)
        scores = model(tokens).logits[0, max(start - 1, 0) : -1].float()
        wanted = tokens[0, max(start, 1) :]
        total += float(torch.nn.functional.cross_entropy(scores, wanted, reduction="sum"))
        number += len(wanted)
    return total / number


def speech(model: Any, tokenizer: Any) -> dict[str, list[tuple[list[int], int]]]:
    """Return what the loss is measured on. `model` is the plain one: the answers are its own."""
    prose = tokenizer("".join(own_prose()).strip(), add_special_tokens=False)["input_ids"]
    pages = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in manual(held_out=True)]
    return {
        "prose of headkv, 1,000 tokens at a time": [
            (prose[i : i + 1000], 0) for i in range(0, len(prose) - 200, 1000)
        ],
        "Python's manual, topics held out": [(page[:1000], 0) for page in pages],
        "the plain model's answers, topics held out": answer(
            model, tokenizer, questions(held_out=True), seed=1, new_tokens=120
        ),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; --json keeps the figures and the replies."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--documents", type=Path, help="what ruler_documents.py wrote")
    options.add_argument("--models", nargs="+", choices=("plain", "tuned"), default=["plain", "tuned"])
    options.add_argument(
        "--weights", type=Path, help="low-rank weights in place of those that come with headkv"
    )
    options.add_argument(
        "--count", type=int, default=100, help="documents of each task and length (default: 100)"
    )
    options.add_argument("--plain-count", type=int, help="the same for the plain model (default: as --count)")
    options.add_argument("--own-lengths", type=int, nargs="*", default=[1000, 4000])
    options.add_argument("--only", nargs="+", help="only tasks whose names hold one of these, e.g. vt @1024")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument(
        "--tokens", type=int, default=16_000, help="of a batch; a GPU takes 200000 (default: 16000)"
    )
    options.add_argument("--json", type=Path)
    given = options.parse_args(arguments)

    plain, tokenizer = headkv.load_smollm2(getattr(torch, given.dtype))
    plain = plain.to(given.device)
    _, validation = Words.parts(tokenizer.get_vocab())
    tasks = ruler_tasks(given.documents, given.count, given.only) if given.documents else {}
    own = own_tasks(tokenizer, validation, given.own_lengths, given.count)
    tasks |= {k: v for k, v in own.items() if not given.only or any(part in k for part in given.only)}
    texts = speech(plain, tokenizer)
    begin = time.monotonic()
    scores: dict[str, dict[str, float]] = {}
    losses: dict[str, dict[str, float]] = {}
    said: dict[str, dict[str, list[str]]] = {}
    for name in given.models:
        model = plain
        if name == "tuned":
            model, _ = headkv.load_smollm2()
            add_low_rank(model, given.weights)
            model = model.to(given.device, getattr(torch, given.dtype))
        losses[name] = {key: loss(model, some) for key, some in texts.items()}
        print(name, {key: round(value, 3) for key, value in losses[name].items()}, flush=True)
        scores[name], said[name] = {}, {}
        chats = [Task("chat", question, "", "", (), ()) for question in CHATS]
        said[name]["chat"] = replies(model, tokenizer, chats, 60, given.tokens)
        count = given.plain_count if name == "plain" and given.plain_count else given.count
        for task, some in tasks.items():
            kind = task.split("@")[0]
            limit = NEW_TOKENS.get(kind, 128 if kind == "common_words" else 64)
            said[name][task] = replies(model, tokenizer, some[:count], limit, given.tokens)
            each = [one.score(reply) for one, reply in zip(some, said[name][task], strict=False)]
            scores[name][task] = sum(each) / len(each)
            print(f"{name}, {task}: {scores[name][task]:.3f}, {time.monotonic() - begin:.0f} s", flush=True)
        if given.json:
            given.json.write_text(
                json.dumps({"scores": scores, "losses": losses, "replies": said}), encoding="utf-8"
            )
    for question, *both in itertools.zip_longest(CHATS, *(said[name]["chat"] for name in given.models)):
        print(f"\n{question}")
        for name, reply in zip(given.models, both, strict=True):
            print(f"  {name}: {reply!r}")
    table("Loss, nats a token", losses, given.models)
    table(f"Share right with the full cache, {given.dtype}", scores, given.models)
    print(f"plain: {MODEL_ID}; tuned: {TUNED_ID}")
    return 0


def table(title: str, figures: dict[str, dict[str, float]], models: Sequence[str]) -> None:
    """Print one row a key; lengths of one task side by side."""
    print(f"\n{title}")
    rows: dict[str, list[str]] = {}
    for key in figures[models[0]]:
        name, _, length = key.partition("@")
        cell = " / ".join(f"{figures[model][key]:.3f}" for model in models)
        rows.setdefault(name, []).append(f"{length}: {cell}" if length else cell)
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
