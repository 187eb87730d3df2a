"""Needles: texts with several hidden facts, the questions about them, and the tokens of the right answers.

What head profiles are learned from, and judged on. Five kinds of fact, so that no head is chosen for one kind alone:
a word, a number, the value of a key, a whole sentence asked back, and a fact that is reached over another one.
Training and validation have nothing in common but the kinds: other people, other things asked for, in other words,
and prose that begins elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headkv import _checks
from headkv.data.facts import Fact
from headkv.data.haystacks import chat_frame, haystack, num_paragraphs
from headkv.data.pools import POOLS, Pool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEEDLE_KINDS = ("words", "numbers", "pairs", "sentences", "hops")
SPLITS = ("training", "validation")


@dataclass(frozen=True, eq=False)
class Needle:
    """One question about a text, and the right answer.

    Attributes:
        kind: one of `NEEDLE_KINDS`.
        question_ids: [1, m] int64: the question, the chat's turn, the beginning of the answer.
        answer_ids: [1, a] int64: what must follow.
    """

    kind: str
    question_ids: Tensor
    answer_ids: Tensor


@dataclass(frozen=True, eq=False)
class NeedleText:
    """A text with hidden facts, and a question about each.

    Attributes:
        context_ids: [1, n] int64: the chat header, the introduction and the document.
        needles: the questions; those about the same text share nothing but it.
    """

    context_ids: Tensor
    needles: tuple[Needle, ...]

    def to(self, device: torch.device | str) -> NeedleText:
        """The same on another device."""
        moved = [Needle(x.kind, x.question_ids.to(device), x.answer_ids.to(device)) for x in self.needles]
        return NeedleText(self.context_ids.to(device), tuple(moved))


def needle_texts(
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: int,
    lengths: Sequence[int],
    kinds: Sequence[str] = NEEDLE_KINDS,
    each: int = 1,
    seed: int = 0,
    split: str = "training",
) -> list[NeedleText]:
    """Make texts with hidden facts of several kinds, and a question about each fact.

    Args:
        tokenizer: a fast tokenizer; its chat template is used if it has one.
        texts: how many; text i has the length `lengths[i % len(lengths)]`.
        lengths: of the contexts, in tokens at most (see `haystack`).
        kinds: of `NEEDLE_KINDS`.
        each: facts of each kind in each text.
        seed: of everything that is drawn: people, answers, places, and where the prose begins.
        split: "training" or "validation".

    Raises:
        TypeError: a number that is no int.
        ValueError: an argument is not as above, or a length leaves no room for the facts.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if unknown := [kind for kind in kinds if kind not in NEEDLE_KINDS]:
        raise ValueError(f"kinds must be of {', '.join(NEEDLE_KINDS)}, got {unknown[0]!r}")
    if not kinds or not lengths:
        raise ValueError("kinds and lengths must hold at least one each")
    for name, value in (("texts", texts), ("each", each), *(("lengths", length) for length in lengths)):
        _checks.whole(name, value, 1)
    pool = POOLS[split]
    if (wanted := each * len(kinds)) > len(pool.people):
        raise ValueError(
            f"each must leave a person for every fact, of {len(pool.people)}, got {wanted} facts"
        )
    half = num_paragraphs() // 2  # training begins in the first, validation in the second
    made = []
    for index in range(texts):
        source = random.Random(f"{split} {seed} {index}")  # a str is hashed the same way everywhere
        people = source.sample(pool.people, wanted)
        facts = [(kind, fact) for kind in kinds for fact in _MAKERS[kind](pool, people, each, source)]
        depths = sorted(source.uniform(0.02, 0.95) for _ in facts)
        source.shuffle(facts)
        start = source.randrange(half) + half * SPLITS.index(split)
        length = lengths[index % len(lengths)]
        made.append(_text(tokenizer, length, facts, depths, start))
    return made


def _text(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    facts: list[tuple[str, Fact]],
    depths: list[float],
    start: int,
) -> NeedleText:
    hidden = haystack(tokenizer, length, [fact for _, fact in facts], depths, start=start)
    footer = chat_frame(tokenizer)[1]
    needles = tuple(
        Needle(kind, *_split(tokenizer, f"{fact.question}{footer}{fact.prefix} ", fact.answer))
        for kind, fact in facts
        if fact.question
    )
    return NeedleText(hidden.context_ids, needles)


def _split(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> tuple[Tensor, Tensor]:
    """Tokenize both at once: the answer begins with the first token that holds a letter of it."""
    found = tokenizer(question + answer, add_special_tokens=False, return_offsets_mapping=True)
    first = next(i for i, (_, end) in enumerate(found["offset_mapping"]) if end > len(question))
    ids = torch.tensor([found["input_ids"]])
    return ids[:, :first], ids[:, first:]


def _fact(name: str, answer: str) -> Fact:
    return Fact(
        f"{name[0].upper()}{name[1:]} is {answer}.",
        f"What is {name}?",
        f"{name[0].upper()}{name[1:]} is",
        answer,
    )


def _words(pool: Pool, people: list[str], count: int, source: random.Random) -> list[Fact]:
    things = [source.choice(pool.words) for _ in range(count)]
    return [_fact(f"the {thing} of {people.pop()}", source.choice(answers)) for thing, answers in things]


def _numbers(pool: Pool, people: list[str], count: int, source: random.Random) -> list[Fact]:
    return [
        _fact(f"the {pool.number} of {people.pop()}", f"{source.randrange(10**5):05}") for _ in range(count)
    ]


def _pairs(pool: Pool, people: list[str], count: int, source: random.Random) -> list[Fact]:
    facts = []
    for _ in range(count + 1):  # the last one is only there to be confused with the others
        key, value = ("".join(source.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=4)) for _ in range(2))
        sentence, question = (words.format(key=key, value=value) for words in pool.pair)
        facts.append(Fact(sentence, question, sentence.removesuffix(f" {value}."), value))
    return [*facts[:-1], replace(facts[-1], question="")]


def _sentences(pool: Pool, people: list[str], count: int, source: random.Random) -> list[Fact]:
    thing, *parts = pool.wish
    return [
        _fact(f"the {thing} of {people.pop()}", " ".join(source.choice(part) for part in parts))
        for _ in range(count)
    ]


def _hops(pool: Pool, people: list[str], count: int, source: random.Random) -> list[Fact]:
    """Two sentences a fact: who it is, and what is asked about that person; and a second person beside."""
    who, all_of_them, thing, answers = pool.hop
    facts = []
    for role, answer in zip(source.sample(all_of_them, count), source.sample(answers, count), strict=True):
        person, described = people.pop(), who.format(role)
        facts.append(Fact(f"{person} {described}.", "", "", role))
        question = f"Who {described}, and what is the {thing} of that person?"
        prefix = f"{person} {described}, and the {thing} of {person} is"
        facts.append(Fact(f"The {thing} of {person} is {answer}.", question, prefix, answer))
    return facts


_MAKERS: dict[str, Callable[[Pool, list[str], int, random.Random], list[Fact]]] = {
    "words": _words,
    "numbers": _numbers,
    "pairs": _pairs,
    "sentences": _sentences,
    "hops": _hops,
}
