"""Tune SmolLM2-135M-Instruct to find needles: the low-rank weights of `headkv.load_smollm2(tuned=True)`.

    python tools/tune.py --seconds 420 --out smollm2-needles.safetensors

Minutes on a GPU. Every text is made by seed while training goes on (`headkv.data.tasks`), none is seen twice, and the
loss is taken at the replies alone. Beside it the model is held to its own former self, by the KL divergence on its own
answers to everyday questions and on passages of Python's manual, so that it goes on speaking English.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import platform
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Value
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import headkv
from headkv.data.haystacks import chat_frame
from headkv.data.tasks import Source, Task, make_task, own_prose, sentences, token_counter
from headkv.data.words import Words
from headkv.models.smollm2 import GGUF_SHA256, MODEL_ID, REQUIREMENT
from headkv.models.tuned import linear_layers, save_low_rank

# How often each form is drawn.
MIXTURE = {
    "number_lines": 11, "uuid_lines": 9, "number_noise": 4, "number_prose": 5, "variables": 12, "common_words": 20,
    "frequent_words": 8, "facts": 8, "pairs": 8, "two_hops": 12, "sayings": 3,
}  # fmt: skip

TOPICS = [
    "rain", "bread", "the moon", "bicycles", "honey", "volcanoes", "libraries", "chess", "salt", "trains", "sleep",
    "music", "gardens", "rivers", "money", "cats", "glass", "winter", "tea", "maps", "whales", "bridges", "clocks",
    "painting", "the heart", "soup", "swimming", "stars", "wool", "friendship", "dreams", "apples", "elections",
    "photography", "deserts", "dancing", "the internet", "medicine", "paper", "football", "forests", "plastic",
    "cheese", "lightning", "history", "mathematics", "cities", "bees", "running", "poetry", "holidays", "languages",
]  # fmt: skip
OTHER_TOPICS = ["mountains", "coffee", "dogs", "the sun", "ships", "cooking", "gravity", "birthdays"]
REQUESTS = (
    "What is interesting about {}?",
    "Explain {} to a child.",
    "Write a short poem about {}.",
    "Give me three facts about {}.",
    "Tell me a story in which {} matter.",
    "Why do people care about {}?",
    "Write a polite letter about {}.",
    "What should a beginner know about {}?",
    "Describe {} in two sentences.",
    "List five words that have to do with {}.",
)
OPENINGS = (
    "A short history of {}\n\n",
    "Most people know little about {}.",
    "It was late when she thought of {} again.",
    "In this chapter we look at {}.",
    "There are several kinds of {}:",
)


# --- Texts --------------------------------------------------------------------------------------------------------


def manual(held_out: bool = False) -> list[str]:
    """Return topics of Python's manual: every tenth is held out, and never trained on."""
    names = [name for name in sorted(topics) if len(topics[name]) > 800]
    return [topics[name] for i, name in enumerate(names) if (i % 10 == 5) == held_out]


def questions(held_out: bool = False) -> list[str]:
    """Return everyday questions."""
    return [request.format(topic) for topic in (OTHER_TOPICS if held_out else TOPICS) for request in REQUESTS]


@dataclass(frozen=True)
class Encoded:
    """A task as tokens.

    Attributes:
        ids: the whole text, reply included.
        targets: for each token of the reply, where the token before it stands and which tokens are right there:
            one, or the beginnings of all answers not yet given if they may come in any order.
    """

    ids: list[int]
    targets: list[tuple[int, list[int]]]


def encode(tokenizer: Any, task: Task) -> Encoded:
    """Write a task as tokens, cut where `headkv.pipeline` would cut: before the question."""

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    header, footer = chat_frame(tokenizer)
    ids = tokens(header + task.text) + tokens(task.question + footer + task.prefix)
    end = tokens(footer)[0]  # a turn ends as the chat template ends it
    answers = [tokens(" " + answer) for answer in task.answers]
    targets = []

    def say(said: Sequence[int], first: list[int] | None = None) -> None:
        for i, token in enumerate(said):
            targets.append((len(ids) - 1, first if first and i == 0 else [token]))
            ids.append(token)

    for at, (lead, answer) in enumerate(zip(task.leads, answers, strict=True)):
        say(tokens(lead))
        say(answer, sorted({rest[0] for rest in answers[at:]}) if task.any_order else None)
    say([*tokens("."), end])
    return Encoded(ids, targets)


@dataclass(frozen=True, eq=False)
class Batch:
    """Tasks of about one length, padded on the right.

    Attributes:
        ids: [B, n] int64.
        at: [K] int64, places of the targets in the flattened `ids`.
        right: [K, R] int64, the tokens that are right there; -1 is none.
        form: [K] int64, of which form each target is, as in `MIXTURE`.
    """

    ids: Tensor
    at: Tensor
    right: Tensor
    form: Tensor

    def to(self, device: str) -> Batch:
        return Batch(*(x.to(device, non_blocking=True) for x in (self.ids, self.at, self.right, self.form)))


def collate(encoded: Sequence[Encoded], forms: Sequence[int]) -> Batch:
    """Pad to a multiple of 64 tokens, so that few lengths occur. What it is padded with is never looked at."""
    width = math.ceil(max(len(one.ids) for one in encoded) / 64) * 64
    ids = torch.tensor([one.ids + [0] * (width - len(one.ids)) for one in encoded])
    targets = [(row * width + at, right) for row, one in enumerate(encoded) for at, right in one.targets]
    most = max(len(right) for _, right in targets)
    return Batch(
        ids,
        torch.tensor([at for at, _ in targets]),
        torch.tensor([right + [-1] * (most - len(right)) for _, right in targets]),
        torch.tensor([form for form, one in zip(forms, encoded, strict=True) for _ in one.targets]),
    )


class Batches(IterableDataset):
    """Batches without end. Worker w of W makes the batches w, w + W, ...

    The seed and the number of a batch decide it, and how far the training is, which sets the greatest length: by the
    number if `steps` are given, else by the clock of the training, `done`."""

    def __init__(
        self, tokenizer: Any, words: Words, *, tokens: int, seed: int, steps: int, done: Any
    ) -> None:
        self.tokenizer, self.words, self.tokens, self.seed = tokenizer, words, tokens, seed
        self.steps, self.done = steps, done

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        count = token_counter(self.tokenizer)
        prose = (*own_prose(), *itertools.chain.from_iterable(map(sentences, manual())))
        for number in itertools.count(first, every):
            chance = random.Random(f"{self.seed}-{number}")
            done = number / self.steps if self.steps else self.done.value
            yield self.batch(Source(chance, self.words, count, prose), done)

    def batch(self, source: Source, done: float) -> Batch:
        """Make one batch; the greatest length grows over the first half of the training."""
        most = 1200 + (4400 - 1200) * min(1.0, 2 * done)
        room = int(math.exp(source.random.uniform(math.log(300), math.log(most))))
        if done > 0.4 and source.random.random() < 0.1:
            room = source.random.randint(4400, 7600)
        forms = list(MIXTURE)
        drawn = source.random.choices(
            range(len(forms)), list(MIXTURE.values()), k=max(2, self.tokens // (room + 150))
        )
        encoded = [
            encode(
                self.tokenizer,
                make_task(forms[form], source, max(200, int(room * source.random.uniform(0.9, 1.0)))),
            )
            for form in drawn
        ]
        return collate(encoded, drawn)


class Speech:
    """What the plain model says and reads: its answers to everyday questions, texts that it makes up, and passages of
    Python's manual."""

    def __init__(self, model: Any, tokenizer: Any, *, seed: int, tokens: int, answers: int) -> None:
        self.random, self.tokens = random.Random(seed), tokens
        header, footer = chat_frame(tokenizer)
        asked = [header + question + footer for question in self.random.sample(questions(), answers)]
        begun = [opening.format(topic) for opening in OPENINGS for topic in TOPICS][: answers // 2]
        self.texts = sampled(model, tokenizer, asked, seed=seed)
        self.texts += [
            (ids, 0) for ids, _ in sampled(model, tokenizer, begun, seed=seed + 1, temperature=1.0)
        ]
        self.long: list[tuple[list[int], int]] = []
        for text in manual():
            ids = tokenizer(re.sub(r"\n{3,}", "\n\n", text), add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
            self.texts += [(ids[i : i + 600], 0) for i in range(0, len(ids) - 100, 600)]
            self.long += [(ids[i : i + 3000], 0) for i in range(0, len(ids) - 2000, 3000)]

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return texts [B, n] int64 and the places [K] of the tokens that count in the flattened texts."""
        rows: list[tuple[list[int], int]] = []
        texts = self.long if self.random.random() < 0.2 else self.texts
        while not rows or sum(len(ids) for ids, _ in rows) < self.tokens:
            rows.append(self.random.choice(texts))
        width = math.ceil(max(len(ids) for ids, _ in rows) / 64) * 64
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
        at = [
            i * width + j
            for i, (text, start) in enumerate(rows)
            for j in range(max(start - 1, 0), len(text) - 1)
        ]
        return ids, torch.tensor(at)


@torch.inference_mode()
def sampled(
    model: Any,
    tokenizer: Any,
    begun: Sequence[str],
    *,
    seed: int,
    temperature: float = 0.8,
    new_tokens: int = 160,
    rows: int = 260,
) -> list[tuple[list[int], int]]:
    """Let the model go on with texts; returns the tokens of each, and where the model's own begin."""
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in begun]
    end, texts = model.generation_config.eos_token_id, []
    torch.manual_seed(seed)
    for at in range(0, len(prompts), rows):
        some = prompts[at : at + rows]
        width = max(map(len, some))
        ids = torch.tensor([[end] * (width - len(p)) + p for p in some], device=model.device)
        seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some], device=model.device)
        out = model.generate(
            ids, attention_mask=seen, max_new_tokens=new_tokens, do_sample=True, temperature=temperature, top_p=0.95,
            top_k=0, pad_token_id=end,
        )  # fmt: skip
        for prompt, said in zip(some, out[:, width:].tolist(), strict=True):
            said = said[: said.index(end) + 1] if end in said else said
            texts.append((prompt + said, len(prompt)))
    return texts


# --- Weights ------------------------------------------------------------------------------------------------------


class LowRankLinear(nn.Module):
    """A frozen linear layer without bias, and what is learned beside it: W + B A. B begins at zero."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.register_buffer("weight", base.weight.detach())
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(3))
        self.plain = False

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight if self.plain else self.weight + self.B @ self.A)


def make_low_rank(model: Any, rank: int) -> dict[str, LowRankLinear]:
    """Freeze `model` and put a `LowRankLinear` in the place of every linear layer of the decoder's layers."""
    model.requires_grad_(False)
    made = {}
    for name, layer in linear_layers(model).items():
        if layer.bias is not None:
            raise ValueError(f"model must have linear layers without bias, got one at {name}")
        made[name] = LowRankLinear(layer, rank)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made[name])
    return made


@contextmanager
def plain(layers: Sequence[LowRankLinear]) -> Iterator[None]:
    """In this context the model is as it was."""
    for layer in layers:
        layer.plain = True
    try:
        yield
    finally:
        for layer in layers:
            layer.plain = False


# --- Training -----------------------------------------------------------------------------------------------------


def task_loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return for every target the negative log of what the right tokens share [K], and whether the first choice is
    right [K]."""
    hidden = model.model(batch.ids, use_cache=False).last_hidden_state.flatten(0, 1)[batch.at]
    scores = model.lm_head(hidden).float().log_softmax(-1)
    right = scores.gather(1, batch.right.clamp(min=0)).masked_fill(batch.right < 0, float("-inf"))
    return -right.logsumexp(1), (scores.argmax(-1, keepdim=True) == batch.right).any(1)


def speech_loss(model: Any, layers: Sequence[LowRankLinear], ids: Tensor, at: Tensor) -> Tensor:
    """Return the mean KL divergence of the model from its former self, in nats a token."""
    with torch.no_grad(), plain(layers):
        hidden = model.model(ids, use_cache=False).last_hidden_state.flatten(0, 1)[at]
        wanted = model.lm_head(hidden).float().log_softmax(-1)
    hidden = model.model(ids, use_cache=False).last_hidden_state.flatten(0, 1)[at]
    found = model.lm_head(hidden).float().log_softmax(-1)
    return F.kl_div(found, wanted, log_target=True, reduction="batchmean")


def schedule(done: float, warm: float = 0.03) -> float:
    """Return the factor of the learning rate: up, then down to zero in a line.

    >>> [round(schedule(done), 2) for done in (0.0, 0.015, 0.03, 0.515, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    return min(done / warm, max(0.0, 1 - done) / (1 - warm))


@dataclass(frozen=True)
class Recipe:
    """What the training depends on, apart from the card and the versions."""

    seconds: float
    steps: int
    rank: int
    learning_rate: float
    tokens: int
    speech_tokens: int
    speech_weight: float
    seed: int

    def done(self, step: int, seconds: float) -> float:
        """Return how far the training is, from 0 to 1: by steps if they are given, else by the clock."""
        return step / self.steps if self.steps else seconds / self.seconds


def tune(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    out: Path,
    *,
    words: Words,
    workers: int = 0,
    compiled: bool = False,
    answers: int = 520,
    save_every: float = 120,
) -> dict[str, Any]:
    """Train, and write the weights to `out`: at intervals, and at the end.

    Args:
        model: SmolLM2, float32; its linear layers are replaced.
        tokenizer: of the model.
        recipe: how long and how.
        out: the file.
        words: what the tasks are made of.
        workers: processes that make texts.
        compiled: compile the decoder's layers.
        answers: how many everyday questions the model is to answer the way it does.
        save_every: seconds.

    Returns:
        What the file says about itself.
    """
    device = str(model.device)
    kind = device.split(":")[0]
    speech = Speech(model, tokenizer, seed=recipe.seed, tokens=recipe.speech_tokens, answers=answers)
    print(f"{len(speech.texts)} passages of speech", flush=True)
    torch.manual_seed(recipe.seed)
    layers = make_low_rank(model, recipe.rank)
    if compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    weights = [weight for layer in layers.values() for weight in (layer.A, layer.B)]
    optimiser = torch.optim.AdamW(
        weights, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=kind == "cuda"
    )
    progress = Value("d", 0.0)
    batches = DataLoader(
        Batches(tokenizer, words, tokens=recipe.tokens, seed=recipe.seed, steps=recipe.steps, done=progress),
        batch_size=None,
        num_workers=workers,
        pin_memory=kind == "cuda",
        prefetch_factor=4 if workers else None,
    )
    about: dict[str, Any] = {
        "base": MODEL_ID, "source": f"{REQUIREMENT}, SHA-256 {GGUF_SHA256}", "made_by": "tools/tune.py",
        **{key: value for key, value in vars(recipe).items() if key not in ("seconds", "steps")},
        "mixture": MIXTURE, "headkv": headkv.__version__, "torch": torch.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if kind == "cuda" else platform.processor() or "cpu",
    }  # fmt: skip

    def save() -> None:
        save_low_rank(out, {name: (layer.A, layer.B) for name, layer in layers.items()}, about)

    model.train()
    begin = saved = shown = time.monotonic()
    read = 0
    log: dict[str, list[Tensor]] = defaultdict(list)
    for step, batch in enumerate(batches):
        now = time.monotonic()
        if step < 2:  # the first steps compile; at a rate of zero they change nothing
            begin = now
        done = recipe.done(step, now - begin)
        if done >= 1:
            break
        progress.value = done
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * schedule(done)
        batch = batch.to(device)
        with torch.autocast(kind, torch.bfloat16):
            losses, right = task_loss(model, batch)
        losses.mean().backward()
        if step % 2 == 0:
            ids, at = (x.to(device) for x in speech.batch())
            with torch.autocast(kind, torch.bfloat16):
                drift = speech_loss(model, list(layers.values()), ids, at)
            (recipe.speech_weight * drift).backward()
            log["drift"].append(drift.detach())
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        read += batch.ids.numel()
        log["loss"].append(losses.detach())
        log["right"].append(right)
        log["form"].append(batch.form)
        about |= {"steps": step + 1, "seconds": round(now - begin, 1), "tokens_read": read}
        if now - shown > 15 or step < 2:
            shown = now
            report(step, read, now - begin, log)
            log.clear()
        if now - saved > save_every:
            saved = now
            save()
    report(step, read, time.monotonic() - begin, log)
    save()
    return about


def report(step: int, read: int, seconds: float, log: dict[str, list[Tensor]]) -> None:
    """Print one line: how many first choices were right since the last one, by form, and how far the speech drifted."""
    if not log["loss"]:
        return
    right, form = (torch.cat(log[key]).float().cpu() for key in ("right", "form"))
    shares = [
        f"{name} {right[form == i].mean():.2f}" for i, name in enumerate(MIXTURE) if bool((form == i).any())
    ]
    drift = f", drift {torch.stack(log['drift']).mean():.3f}" if log["drift"] else ""
    loss = torch.cat(log["loss"]).mean()
    print(
        f"step {step}, {seconds:.0f} s, {read / 1e6:.1f} M tokens, loss {loss:.3f}{drift}: {', '.join(shares)}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=Path("smollm2-needles.safetensors"))
    length = options.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=420, help="of training (default: 420)")
    length.add_argument("--steps", type=int, default=0, help="of training, in place of --seconds")
    options.add_argument("--rank", type=int, default=32, help="of the weights that are learned (default: 32)")
    options.add_argument("--learning-rate", type=float, default=2e-3, help="the greatest (default: 0.002)")
    options.add_argument("--tokens", type=int, default=32_000, help="of a batch (default: 32000)")
    options.add_argument(
        "--speech-tokens", type=int, default=6_000, help="of a batch of speech (default: 6000)"
    )
    options.add_argument("--speech-weight", type=float, default=2.0, help="of its KL divergence (default: 2)")
    options.add_argument(
        "--answers", type=int, default=520, help="everyday questions answered, 2 to 520 (default: 520)"
    )
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--workers", type=int, default=12, help="processes that make texts (default: 12)")
    options.add_argument(
        "--compile", action="store_true", help="compile the layers: a minute, then twice the speed"
    )
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = options.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = True
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes that make texts are forked
    model, tokenizer = headkv.load_smollm2()
    recipe = Recipe(
        given.seconds, given.steps, given.rank, given.learning_rate, given.tokens, given.speech_tokens,
        given.speech_weight, given.seed,
    )  # fmt: skip
    training, _ = Words.parts(tokenizer.get_vocab())
    about = tune(
        model.to(given.device), tokenizer, recipe, given.out, words=training, workers=given.workers,
        compiled=given.compile, answers=given.answers,
    )  # fmt: skip
    print(f"{given.out}: {given.out.stat().st_size / 1e6:.1f} MB; {about}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
