"""Long prompts with facts hidden in them, and where in the tokens each fact is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headkv.data.chat import chat_frame
from headkv.data.facts import FACTS, Fact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INTRODUCTION = (
    "Some facts are hidden in the following text. Memorize them: you will be asked about them afterwards.\n\n"
)


@dataclass(frozen=True, eq=False)
class Haystack:
    """A document with hidden facts, as text and as tokens, and a question for each fact.

    The context (chat header, introduction, document) is the same for all questions: it can be compressed
    once, and every question asked on its own (question-agnostic). `prompt` puts one question right behind it
    (question-aware).

    Attributes:
        text: the document.
        facts: the hidden facts, in the order of the text.
        context_ids: [1, n] int64, the chat header, the introduction and the document.
        spans: of each fact's sentence, first and last + 1 token in `context_ids`.
        answer_spans: of each fact's answer, likewise.
        question_ids: for each fact [1, m] int64: the question, the chat's turn, the beginning of the answer.
    """

    text: str
    facts: tuple[Fact, ...]
    context_ids: Tensor
    spans: tuple[tuple[int, int], ...]
    answer_spans: tuple[tuple[int, int], ...]
    question_ids: tuple[Tensor, ...]

    def prompt(self, index: int = 0) -> Tensor:
        """The whole prompt of the question about fact `index`, [1, n + m] int64."""
        return torch.cat([self.context_ids, self.question_ids[index]], dim=1)


def running_example(tokenizer: PreTrainedTokenizerBase) -> Haystack:
    """The book's document: about 1,000 tokens with three facts, at 1/6, 3/6 and 5/6 of its length."""
    return haystack(tokenizer, 1000)


def haystack(
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
    facts: Sequence[Fact] = FACTS,
    depths: Sequence[float] | None = None,
    *,
    seed: int = 0,
    start: int | None = None,
) -> Haystack:
    """Plain prose with facts hidden between its sentences.

    Args:
        tokenizer: a fast tokenizer; its chat template is used if it has one.
        num_tokens: length of the context at most, chat header included. The document ends with a whole
            sentence, so the context may be a sentence shorter. After some 4,000 tokens the prose repeats.
        facts: what to hide.
        depths: for each fact, where: 0 is the beginning, 1 the end. None: evenly, e.g. 1/6, 3/6 and 5/6.
        seed: at which paragraph the prose begins.
        start: that paragraph itself, in place of a seed; counted on from the first one behind the last.

    Raises:
        ValueError: there are no facts, a depth is not in [0, 1], there are not as many depths as facts, or
            the context is too short for the facts.
    """
    if not facts:
        raise ValueError("facts must hold at least one fact, got none")
    if depths is None:
        depths = [(index + 0.5) / len(facts) for index in range(len(facts))]
    if len(depths) != len(facts):
        raise ValueError(f"depths must be as many as facts ({len(facts)}), got {len(depths)}")
    if outside := [depth for depth in depths if not 0 <= depth <= 1]:
        raise ValueError(f"depths must be in [0, 1], got {outside[0]}")
    placed = sorted(zip(depths, facts, strict=True), key=lambda pair: pair[0])
    header, footer = chat_frame(tokenizer)
    header += _INTRODUCTION
    # The next seed begins with another subject.
    sentences = _sentences(seed * 7 if start is None else start)
    room = num_tokens - _count(tokenizer, header) - sum(_count(tokenizer, " " + f.sentence) for f in facts)
    lengths: list[int] = []
    while sum(lengths) < room:
        lengths.append(_count(tokenizer, sentences[len(lengths) % len(sentences)]))
    while lengths:
        # Pieces tokenized alone may count differently from the whole, so the whole decides.
        text, places = _hide(sentences, lengths, placed)
        context = tokenizer(header + text + "\n\n", add_special_tokens=False, return_offsets_mapping=True)
        if len(context["input_ids"]) <= num_tokens:
            break
        lengths.pop()
    else:
        raise ValueError(f"num_tokens must leave room for the facts and some text, got {num_tokens}")
    offsets = context["offset_mapping"]
    ordered = tuple(fact for _, fact in placed)
    starts = [len(header) + place for place in places]
    answers = [at + fact.sentence.rindex(fact.answer) for at, fact in zip(starts, ordered, strict=True)]
    questions = (f"{fact.question}{footer}{fact.prefix}" for fact in ordered)
    return Haystack(
        text=text,
        facts=ordered,
        context_ids=torch.tensor([context["input_ids"]]),
        spans=tuple(_span(offsets, at, len(f.sentence)) for at, f in zip(starts, ordered, strict=True)),
        answer_spans=tuple(_span(offsets, at, len(f.answer)) for at, f in zip(answers, ordered, strict=True)),
        question_ids=tuple(
            torch.tensor([tokenizer(question, add_special_tokens=False)["input_ids"]])
            for question in questions
        ),
    )


def num_paragraphs() -> int:
    """How many paragraphs the prose has."""
    return len(_paragraphs())


def _paragraphs() -> list[str]:
    prose = (resources.files("headkv.data") / "prose.txt").read_text(encoding="utf-8").strip()
    return prose.split("\n\n")


def _sentences(start: int) -> list[str]:
    """The sentences of the prose, each with the white space before it, from a paragraph on."""
    paragraphs = _paragraphs()
    first = start % len(paragraphs)
    sentences = []
    for paragraph in paragraphs[first:] + paragraphs[:first]:
        head, *rest = re.split(r"(?<=[.!?])\s+", paragraph)
        sentences += ["\n\n" + head, *(" " + sentence for sentence in rest)]
    return sentences


def _hide(
    sentences: list[str], lengths: list[int], placed: list[tuple[float, Fact]]
) -> tuple[str, list[int]]:
    """The text, and for each fact at which character its sentence begins."""
    chosen = [sentences[index % len(sentences)] for index in range(len(lengths))]
    text, places, done, total = "", [], 0, sum(lengths)
    waiting = list(placed)
    for index in range(len(chosen) + 1):
        while waiting and (index == len(chosen) or done >= waiting[0][0] * total):
            space = " " if text else ""
            places.append(len(text) + len(space))
            text += space + waiting.pop(0)[1].sentence
        if index < len(chosen):
            text += chosen[index] if text else chosen[index].lstrip()
            done += lengths[index]
    return text, places


def _count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _span(offsets: Sequence[tuple[int, int]], start: int, length: int) -> tuple[int, int]:
    """The tokens that overlap the characters [start, start + length)."""
    inside = [i for i, (a, b) in enumerate(offsets) if a < start + length and b > start]
    return inside[0], inside[-1] + 1
