"""What the tuned SmolLM2 can do beside the plain one, each with its full cache.

    headkv documents --model smollm2-tuned --tasks niah_single_1 ruler_vt --limit 100 --out ruler.jsonl.gz
    python benchmarks/tuned.py --documents ruler.jsonl.gz --lengths 1024 --only niah_single_1 ruler_vt

Four tables: RULER's offline tasks on lm-evaluation-harness's documents (without --documents they are left out),
headkv's own forms of question (`headkv.data.tasks`, words and names that were not tuned on), the loss on prose and on
the plain model's own answers, neither of them trained on, and a few answers to everyday questions. Replies are greedy;
a score is the mean share of the reference answers that stand in the reply.
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
from torch import Tensor

import headkv
from headkv.data.haystacks import chat_frame
from headkv.data.tasks import FORMS, Source, make_task, own_prose, token_counter
from headkv.data.words import Words
from headkv.evaluation.documents import read_documents
from headkv.evaluation.harness import OFFLINE, Sample
from headkv.models.smollm2 import MODEL_ID
from headkv.models.tuned import TUNED_ID, add_low_rank

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
from tune import manual, questions, sampled  # noqa: E402

CHATS = (
    "What is the capital of France?",
    *(q for q in questions(held_out=True) if q.startswith(("Describe", "Why"))),
)


def ruler_tasks(
    path: Path, tokenizer: Any, lengths: Sequence[int], count: int, only: Sequence[str] | None
) -> dict[str, list[Sample]]:
    """Read lm-eval's documents."""
    give = read_documents(path, tokenizer)
    names = {f"{task}@{length}": (task, length) for task in OFFLINE for length in lengths}
    return {
        name: list(give(*what, 0, count))
        for name, what in names.items()
        if not only or any(part in name for part in only)
    }


def own_tasks(tokenizer: Any, words: Words, lengths: Sequence[int], count: int) -> dict[str, list[Sample]]:
    """Make documents of every form, from the words of the validation part."""
    counter, prose = token_counter(tokenizer), own_prose()
    header, footer = chat_frame(tokenizer)

    def make(form: str, length: int, number: int) -> Sample:
        source = Source(random.Random(f"validation-{number}"), words, counter, prose)
        task = make_task(form, source, length - 150)
        question, most = task.question + footer + task.prefix, 128 if form == "common_words" else 64
        where = (form, length, 0, number)
        return Sample(*where, header + task.text, question, task.answers, most, task.score)

    return {
        f"{form}@{length}": [make(form, length, number) for number in range(count)]
        for form in FORMS
        for length in lengths
    }


@torch.inference_mode()
def replies(
    model: Any, tokenizer: Any, asked: Sequence[tuple[str, str]], new_tokens: int, tokens: int
) -> list[str]:
    """Answer contexts with their questions greedily, some `tokens` tokens a batch.

    Prompts of one length are read together, without a mask; their caches are then put side by side, padded on the
    left, for the steps."""
    prompts = [
        [i for part in parts for i in tokenizer(part, add_special_tokens=False)["input_ids"]]
        for parts in asked
    ]
    said = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    rows = max(1, tokens // max(map(len, prompts)))
    for at in range(0, len(order), rows):
        some = order[at : at + rows]
        written = decode(model, *read(model, [prompts[i] for i in some]), new_tokens)
        for i, ids in zip(some, written, strict=True):
            said[i] = tokenizer.decode(ids)
    return said


def read(model: Any, prompts: Sequence[list[int]]) -> tuple[Any, Tensor, Tensor]:
    """Return the cache, which entries of it are there [B, n], and each prompt's next token [B]. Sorted by length."""
    from transformers import DynamicCache

    width, parts, tokens = max(map(len, prompts)), [], []
    for length, group in itertools.groupby(prompts, key=len):
        ids = torch.tensor(list(group), device=model.device)
        out = model(ids, use_cache=True, logits_to_keep=1)
        tokens.append(out.logits[:, -1].argmax(-1))
        pad = (0, 0, width - length, 0)
        parts.append(
            [
                [torch.nn.functional.pad(x, pad) for x in (layer.keys, layer.values)]
                for layer in out.past_key_values.layers
            ]
        )
    cache = DynamicCache()
    for layer in range(len(parts[0])):
        keys, values = (torch.cat([part[layer][kind] for part in parts]) for kind in (0, 1))
        cache.update(keys, values, layer)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    seen = torch.arange(width, device=model.device) >= width - lengths[:, None]
    return cache, seen, torch.cat(tokens)


def decode(model: Any, cache: Any, seen: Tensor, token: Tensor, new_tokens: int) -> list[list[int]]:
    """Go on greedily until every row has ended its turn."""
    end, written = model.generation_config.eos_token_id, [token]
    for _ in range(new_tokens - 1):
        ended = (torch.stack(written) == end).any(0)
        if bool(ended.all()):
            break
        place = seen.sum(1, keepdim=True)
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
        out = model(token[:, None], past_key_values=cache, attention_mask=seen.long(), position_ids=place)
        token = out.logits[:, -1].argmax(-1)
        written.append(token)
    rows = torch.stack(written, dim=1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


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
    header, footer = chat_frame(tokenizer)
    pages = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in manual(held_out=True)]
    return {
        "prose of headkv, 1,000 tokens at a time": [
            (prose[i : i + 1000], 0) for i in range(0, len(prose) - 200, 1000)
        ],
        "Python's manual, topics held out": [(page[:1000], 0) for page in pages],
        "the plain model's answers, topics held out": sampled(
            model, tokenizer, [header + question + footer for question in questions(held_out=True)], seed=1
        ),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; --json keeps the figures and the replies."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--documents", type=Path, help="what headkv documents wrote")
    options.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096], help="of these")
    options.add_argument("--models", nargs="+", choices=("plain", "tuned"), default=["plain", "tuned"])
    options.add_argument(
        "--weights", type=Path, help="low-rank weights in place of those that come with headkv"
    )
    options.add_argument(
        "--count", type=int, default=100, help="documents of each task and length (default: 100)"
    )
    options.add_argument(
        "--own-count", type=int, help="tasks of each of headkv's forms (default: as --count)"
    )
    options.add_argument("--own-lengths", type=int, nargs="*", default=[1000, 4000])
    options.add_argument("--no-speech", action="store_true", help="leave the losses out")
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
    ruler = (given.documents, tokenizer, given.lengths, given.count, given.only)
    tasks = ruler_tasks(*ruler) if given.documents else {}
    own = own_tasks(tokenizer, validation, given.own_lengths, given.own_count or given.count)
    tasks |= {k: v for k, v in own.items() if not given.only or any(part in k for part in given.only)}
    texts = {} if given.no_speech else speech(plain, tokenizer)
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
        header, footer = chat_frame(tokenizer)
        chats = [(header, question + footer) for question in CHATS]
        said[name]["chat"] = replies(model, tokenizer, chats, 60, given.tokens)
        for task, some in tasks.items():
            parts = [(sample.context, sample.question) for sample in some]
            said[name][task] = replies(model, tokenizer, parts, some[0].max_new_tokens, given.tokens)
            each = [one.score(reply) for one, reply in zip(some, said[name][task], strict=True)]
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
