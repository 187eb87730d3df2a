"""Ablation: what an answer loses when one head alone streams, and which heads together give it back.

A causal score: no attention pattern is looked at, only the answer's log-probability. With every other head full, one
head is shut; the drop is its score. Heads that stand in for one another hide each other there, so a greedy choice can
be put on top: all heads stream, and the one that helps most is opened, again and again.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headkv import _checks
from headkv._config import class_or_name
from headkv.data import NEEDLE_KINDS, Needle, NeedleText, needle_texts
from headkv.heads.choice import Head, Value, add_heads, gates_of
from headkv.heads.contexts import Asker, Context, Stream, asking, read
from headkv.heads.journal import Journal
from headkv.heads.profile import HeadProfile
from headkv.heads.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FLOOR = -12.0  # an answer as unlikely as this is lost: below it nothing counts


def profile_ablation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kinds: Sequence[str] = NEEDLE_KINDS,
    lengths: Sequence[int] = (1000, 2000),
    texts: int = 8,
    each: int = 1,
    sinks: int = 16,
    recent_share: float = 0.06,
    greedy: int = 0,
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> HeadProfile:
    """Measure what the answers lose when a KV head streams, over texts with hidden facts.

    Args:
        model: a transformers decoder; layers with a sliding window score 0.
        tokenizer: its tokenizer.
        kinds: of the facts, see `headkv.data.needle_texts`.
        lengths: of the texts, in tokens, in turn.
        texts: how many.
        each: facts of each kind in each text.
        sinks: first entries that a streaming head keeps.
        recent_share: share of the text, at its end, that it keeps too.
        greedy: so many heads are chosen one after another on top.
        seed: of the texts.
        journal: a file that holds what is done while the measurement runs; a second run goes on from it.
        progress: show a progress bar.

    Returns:
        A profile of KV heads, see `ablate`.

    Raises:
        ValueError: an option is out of range, or the journal is of another run.
        RuntimeError: the model answered no question right, so that its heads can not be scored.
    """
    _checks.whole("greedy", greedy)
    made = needle_texts(tokenizer, texts=texts, lengths=lengths, kinds=kinds, each=each, seed=seed)
    options: dict[str, Any] = {
        "kinds": list(kinds),
        "lengths": list(lengths),
        "texts": texts,
        "each": each,
        "sinks": sinks,
        "recent_share": recent_share,
        "greedy": greedy,
        "seed": seed,
    }
    name = class_or_name(model)
    notes = Journal(journal, {"kind": "ablation", "model": name, **options})
    scores, found = ablate(
        model, made, Stream(sinks, recent_share), greedy=greedy, journal=notes, progress=progress
    )
    return HeadProfile(name, "ablation", "kv", scores, options | found)


def ablate(
    model: PreTrainedModel,
    texts: Sequence[NeedleText],
    stream: Stream,
    *,
    greedy: int = 0,
    journal: Journal | None = None,
    progress: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    """Score every KV head on these texts; only questions that the full model answers right count.

    A score is the mean drop of the answer's log-probability (no answer falls below `FLOOR`) when this head alone
    streams, and 0 for a head without which the answers get better: budgets can not be negative. Heads that the greedy
    choice takes stand above all others, between 2 (the first) and 1, and the others between 0 and 1.

    Returns:
        Scores [layers, H], float32; and what was found on the way, as plain JSON values: how many answers of each kind
        were asked and counted, and the greedy order with the answers' mean log-probability after each head.

    Raises:
        RuntimeError: the model answered no question right.
    """
    notes = Journal(None, {}) if journal is None else journal
    with asking(model, stream) as asker:
        shape = asker.shape
    done = [piece for piece in notes.pieces if "drops" in piece]
    for text in track(texts[len(done) :], "Leave one out", progress):
        context = read(model, text.context_ids)
        with asking(model, stream) as asker:
            piece = _leave_one_out(asker, context, text)
        notes.add(piece)
        done.append(piece)
    asked, counted = (
        sum((Counter(piece[name]) for piece in done), Counter()) for name in ("asked", "counted")
    )
    if not counted.total():
        raise RuntimeError(
            f"the model answered none of {asked.total()} questions, so its heads can not be scored"
        )
    scores = sum((torch.tensor(piece["drops"]) for piece in done), torch.zeros(shape)) / counted.total()
    scores = scores.clamp_min(0)
    found: dict[str, Any] = {"samples": dict(asked), "samples_counted": dict(counted)}
    if greedy:
        order = _greedy(model, texts, stream, greedy, notes, progress)
        for rank, piece in enumerate(order):
            layer, head = piece["chosen"]
            scores[layer, head] = -1 - rank
        scores = torch.where(scores < 0, 2 + (1 + scores) / len(order), scores / scores.max().clamp_min(1e-9))
        found["order"] = [[*piece["chosen"], round(piece["worth"], 4)] for piece in order]
    return scores, found


@dataclass(frozen=True, eq=False)
class Held:
    """A text that was read, with the questions that the full model answers right."""

    context: Context
    needles: tuple[Needle, ...]


def hold(
    model: PreTrainedModel, texts: Sequence[NeedleText], stream: Stream, progress: bool = False
) -> list[Held]:
    """Read all texts and keep them, each with the questions that count."""
    held = []
    for text in track(texts, "Reading", progress):
        context = read(model, text.context_ids)
        with asking(model, stream) as asker:
            right = asker.try_all(context, text.needles, torch.ones(1, *asker.shape)).right
        needles = tuple(
            needle for needle, is_right in zip(text.needles, right.tolist(), strict=True) if is_right
        )
        if needles:
            held.append(Held(context, needles))
    return held


def worth(asker: Asker, held: Sequence[Held]) -> Value:
    """What a configuration is worth: the mean log-probability of all answers, none below `FLOOR`."""
    count = sum(len(text.needles) for text in held)

    def value(gates: Tensor) -> Tensor:
        total = torch.zeros(len(gates))
        for text in held:
            found = asker.try_all(text.context, text.needles, gates).total.clamp_min(FLOOR)
            total += found.view(len(text.needles), -1).sum(0)
        return total / count

    return value


def _leave_one_out(asker: Asker, context: Context, text: NeedleText) -> dict[str, Any]:
    """Drops [layers, H], summed over the questions that count, and how many of each kind that were."""
    full = asker.try_all(context, text.needles, torch.ones(1, *asker.shape))
    needles = [needle for needle, right in zip(text.needles, full.right.tolist(), strict=True) if right]
    drops = torch.zeros(asker.shape)
    if needles:
        heads = context.heads()
        without = 1 - gates_of([[head] for head in heads], asker.shape)
        found = asker.try_all(context, needles, without).total.clamp_min(FLOOR).view(len(needles), -1)
        lost = (full.total[full.right].clamp_min(FLOOR)[:, None] - found).sum(0)
        for (layer, head), drop in zip(heads, lost.tolist(), strict=True):
            drops[layer, head] = drop
    asked, counted = (dict(Counter(needle.kind for needle in some)) for some in (text.needles, needles))
    return {"drops": drops.tolist(), "asked": asked, "counted": counted}


def _greedy(
    model: PreTrainedModel,
    texts: Sequence[NeedleText],
    stream: Stream,
    count: int,
    notes: Journal,
    progress: bool,
) -> list[dict[str, Any]]:
    """The heads in the order in which they are chosen: {"chosen": [layer, head], "worth": ...}."""
    order = [piece for piece in notes.pieces if "chosen" in piece]
    held = hold(model, texts, stream, progress)
    heads = held[0].context.heads()
    count = min(count, len(heads))
    chosen: list[Head] = [(layer, head) for layer, head in (piece["chosen"] for piece in order)]
    with asking(model, stream) as asker:
        steps = add_heads(worth(asker, held), asker.shape, heads, count, chosen)
        for _ in track(range(len(order), count), "Greedy choice", progress):
            head, value = next(steps)
            piece = {"chosen": list(head), "worth": value}
            notes.add(piece)
            order.append(piece)
    return order
