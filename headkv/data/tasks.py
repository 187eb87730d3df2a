"""Questions about long texts, made by seed: what the tuned SmolLM2 learned from, and is judged by.

Five forms follow RULER (Hsieh et al. 2024, https://arxiv.org/abs/2404.06654) in how the question is put and how the
answer begins: needles among needles, in repeated sentences and in prose, chains of variables, common words, frequent
words. Words, names, keys, filler and the way the texts are put together are this module's own.
"""

from __future__ import annotations

import random
import re
import string
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING

from headkv.data.answers import share_found
from headkv.data.haystacks import _INTRODUCTION
from headkv.data.words import Words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILLERS = (
    "The bread is warm. The milk is cold. The table is set. Come and sit. Eat and rest a while.",
    "The snow is deep. The pond is still. The trees are bare. On we walk. Up the hill and down.",
    "The lamp is lit. The door is shut. The fire is low. All is calm. Night has come again.",
    "The sand is hot. The sea is near. The boats are out. Gulls cry loud. Waves come and go.",
    "The road is long. The bag is light. The day is young. Let us start. One step and another.",
    "The corn is high. The barn is full. The cart is old. So it goes. Work and play by turns.",
)
_ADJECTIVES = ("secret", "favourite", "hidden", "first", "last")


@dataclass(frozen=True)
class Task:
    """A text, a question about it, and the reply that is wanted.

    Attributes:
        form: a name in `FORMS`.
        text: what is read first; ends with a line break.
        question: what is asked behind it, in the same turn of the chat.
        prefix: how the reply begins; given to the model.
        answers: what the reply must contain, in order.
        leads: what stands before each answer in the reply, as many as there are answers.
        any_order: the answers are a set, in whatever order they are given.
    """

    form: str
    text: str
    question: str
    prefix: str
    answers: tuple[str, ...]
    leads: tuple[str, ...]
    any_order: bool = False

    @property
    def reply(self) -> str:
        """The reply behind the prefix: every answer with a space before it, and a full stop at the end.

        >>> Task("pairs", "a: 1\\n", "What is the value of a?", "The value of a is", ("1",), ("",)).reply
        ' 1.'
        """
        return (
            "".join(f"{lead} {answer}" for lead, answer in zip(self.leads, self.answers, strict=True)) + "."
        )

    def score(self, reply: str) -> float:
        """Return the share of the answers that stand in `reply`, in any order and case: RULER's string match."""
        return share_found(self.answers, reply)


@dataclass(frozen=True, eq=False)
class Source:
    """Where a task's random choices come from.

    Attributes:
        random: decides everything.
        words: the part to choose from: training or validation.
        count: the number of tokens of a text.
        prose: sentences, each with the white space before it.
    """

    random: random.Random
    words: Words
    count: Callable[[str], int]
    prose: Sequence[str]

    def word(self) -> str:
        """A word; one in four is made of two."""
        first, second = self.random.choices(self.words.words, k=2)
        return first + second if self.random.random() < 0.25 else first

    def key(self) -> str:
        """Two words with a hyphen, as RULER's keys look."""
        return f"{self.word()}-{self.random.choice(self.words.words)}"

    def number(self, digits: int) -> str:
        """A number of so many digits."""
        return str(self.random.randrange(10 ** (digits - 1), 10**digits))

    def uuid(self) -> str:
        """A random UUID, version 4."""
        return str(uuid.UUID(int=self.random.getrandbits(128), version=4))


Form = Callable[[Source, int], Task]


def token_counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    """Return a function that counts the tokens of a text, and remembers the last 100,000."""
    return lru_cache(100_000)(lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]))


def own_prose() -> tuple[str, ...]:
    """Return the sentences of the prose written for headkv."""
    return sentences((resources.files("headkv.data") / "prose.txt").read_text(encoding="utf-8"))


def sentences(text: str) -> tuple[str, ...]:
    """Split a text where its sentences end; each keeps the white space before it, the first has a blank line.

    >>> sentences("One. Two!\\n\\nThree?")
    ('\\n\\nOne.', ' Two!', '\\n\\nThree?')
    """
    found = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        head, *rest = re.split(r"(?<=[.!?])\s+", paragraph.strip())
        found += ["\n\n" + head, *(" " + sentence for sentence in rest)]
    return tuple(found)


def make_task(form: str, source: Source, room: int) -> Task:
    """Make one task.

    Args:
        form: one of `FORMS`.
        source: of all choices.
        room: about how many tokens the text has; at least 200.

    Raises:
        ValueError: `form` is unknown or `room` is too small.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if room < 200:
        raise ValueError(f"room must be at least 200 tokens, got {room}")
    return FORMS[form](source, room)


# --- Needles: a value for a key -----------------------------------------------------------------------------------


def _needles(form: str, kind: str, key: str, value: str, context: str, hidden: int) -> Task:
    """The task that asks for one needle, in RULER's words; those for one needle and for many differ."""
    some, are = (f"A special magic {kind}", "is") if hidden == 1 else (f"Some special magic {kind}s", "are")
    about = kind if hidden == 1 else f"{kind}s"
    return Task(
        form,
        f"{some} {are} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {about} afterwards.\n{context}\n",
        f"What is the special magic {kind} for {key} mentioned in the provided text?",
        f"The special magic {kind} for {key} mentioned in the provided text is",
        (value,),
        ("",),
    )


def _among_needles(
    form: str, kind: str, source: Source, room: int, pair: Callable[[], tuple[str, str]]
) -> Task:
    pairs: dict[str, str] = {}
    while room > 0:
        key, value = pair()
        if key in pairs:
            continue
        pairs[key] = value
        room -= source.count(f"One of the special magic {kind}s for {key} is: {value}.\n")
    key = source.random.choice(list(pairs))
    context = "\n".join(f"One of the special magic {kind}s for {k} is: {v}." for k, v in pairs.items())
    # RULER says "a number is hidden" also where every line is a needle.
    return _needles(form, kind, key, pairs[key], context, source.random.choice((1, 1, 1, 2)))


def number_lines(source: Source, room: int) -> Task:
    """Every line is a needle: a number for a key of two words."""
    digits = 7 if source.random.random() < 0.8 else source.random.randint(4, 9)
    return _among_needles(
        "number_lines", "number", source, room, lambda: (source.key(), source.number(digits))
    )


def uuid_lines(source: Source, room: int) -> Task:
    """Every line is a needle: a UUID for a UUID."""
    return _among_needles("uuid_lines", "uuid", source, room, lambda: (source.uuid(), source.uuid()))


def _hidden_needles(form: str, source: Source, room: int, pieces: list[str], gap: str) -> Task:
    kind = "uuid" if source.random.random() < 0.25 else "number"
    count = 1 if source.random.random() < 0.5 else source.random.randint(2, 4)
    value = source.uuid if kind == "uuid" else lambda: source.number(7)
    pairs = {source.key(): value() for _ in range(count)}
    needles = [f"{gap}One of the special magic {kind}s for {k} is: {v}." for k, v in pairs.items()]
    key = source.random.choice(list(pairs))
    return _needles(form, kind, key, pairs[key], _mix(source, pieces, needles).strip(), count)


def number_noise(source: Source, room: int) -> Task:
    """A few needles between lines that are all the same."""
    line = "\n" + source.random.choice(_FILLERS)
    return _hidden_needles("number_noise", source, room, [line] * max(4, room // source.count(line)), "\n")


def number_prose(source: Source, room: int) -> Task:
    """A few needles between sentences of prose."""
    return _hidden_needles("number_prose", source, room, _prose(source, room), " ")


# --- Chains, common words, frequent words -------------------------------------------------------------------------


def variables(source: Source, room: int) -> Task:
    """A chain of assignments between lines that are all the same; often behind a solved example, as in RULER."""
    chance = source.random
    letters = 5 if chance.random() < 0.8 else chance.randint(3, 6)
    size = 5 if chance.random() < 0.75 else chance.randint(3, 7)
    chains = 1 if chance.random() < 0.75 else 2
    example = ""
    if room > 600 and chance.random() < 0.6:
        solved = _chain(source, chance.randint(150, 350), chance.choice((3, letters)), size, 1)
        example = f"{solved.text}{solved.question} {solved.prefix}  {' '.join(solved.answers)}\n\n\n\n"
    task = _chain(source, room - source.count(example), letters, size, chains)
    return Task("variables", example + task.text, task.question, task.prefix, task.answers, task.leads)


def _chain(source: Source, room: int, letters: int, size: int, chains: int) -> Task:
    names: list[str] = []
    while len(names) < size * chains:
        name = "".join(source.random.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    line = source.random.choice(_FILLERS) + "\n"
    pieces = [line] * max(4, room // source.count(" " + line))
    value, *others = source.random.sample(range(10000, 100000), chains)
    # Each chain stands in order; two chains are woven into one another.
    waiting = [names[i * size : (i + 1) * size] for i in range(chains)]
    values, statements = [value, *others], []
    while any(waiting):
        chain = source.random.choice([i for i in range(chains) if waiting[i]])
        name = waiting[chain].pop(0)
        at = names.index(name)
        statements.append(
            f"VAR {name} = {values[chain]}" if at % size == 0 else f"VAR {name} = VAR {names[at - 1]} "
        )
    context = _mix(source, pieces, statements, " ")
    return Task(
        "variables",
        f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n",
        f"Question: Find all variables that are assigned the value {value} in the text above.",
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{size} variables are assgined the value {value}, they are:",  # spelled as in RULER
        tuple(names[:size]),
        ("",) * size,
    )


def common_words(source: Source, room: int) -> Task:
    """A numbered list in which ten words stand more often than the others."""
    number = 10
    choices = [
        (3, 1),
        (6, 1),
        (6, 1),
        (10, 3),
        (30, 3),
        (source.random.randint(4, 30), source.random.randint(1, 3)),
    ]
    often, seldom = source.random.choice([(c, u) for c, u in choices if c * number * 5 < 0.9 * room])
    common = _distinct(source, number)
    room -= often * sum(_entry_cost(source, word) for word in common)
    others: set[str] = set()
    while room > 0:
        word = source.word()
        if word not in others and word not in common:
            others.add(word)
            room -= seldom * _entry_cost(source, word)
    entries = common * often + sorted(others) * seldom
    source.random.shuffle(entries)
    return Task(
        "common_words",
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
        + " ".join(f"{i}. {word}" for i, word in enumerate(entries, start=1))
        + "\n",
        "Question: What are the 10 most common words in the above list?",
        "Answer: The top 10 words that appear most often in the list are:",
        tuple(common),
        tuple(f" {i}." for i in range(1, number + 1)),
        any_order=True,
    )


def _entry_cost(source: Source, word: str) -> int:
    return source.count(" 100.") + source.count(" " + word)


def _distinct(source: Source, number: int) -> list[str]:
    found: list[str] = []
    while len(found) < number:
        if (word := source.word()) not in found:
            found.append(word)
    return found


def frequent_words(source: Source, room: int) -> Task:
    """Made-up words and dots, drawn so that the k-th stands about k ** -2 as often as the first."""
    chance = source.random
    letters = 6 if chance.random() < 0.75 else chance.randint(4, 8)
    exponent = 2.0 if chance.random() < 0.5 else chance.uniform(1.7, 2.3)
    names = ["...", *_codes(chance, max(9, room // 50), letters)]
    weights = [(k + 1) ** -exponent for k in range(len(names))]
    cost = sum(w * source.count(" " + name) for w, name in zip(weights, names, strict=True))
    counts = [int(room * w / cost) for w in weights]
    # In a short text rounding could make the third and the fourth equal.
    counts[1:5] = [max(n, 5 - k) for k, n in enumerate(counts[1:5], start=1)]
    for k in (3, 2, 1):
        counts[k] = max(counts[k], counts[k + 1] + 1)
    entries = [name for name, n in zip(names, counts, strict=True) for _ in range(n)]
    chance.shuffle(entries)
    return Task(
        "frequent_words",
        "Read the following coded text and track the frequency of each coded word. "
        f"Find the three most frequently appeared coded words. {' '.join(entries)}\n",
        "Question: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?",
        "Answer: According to the coded text above, the three most frequently appeared words are:",
        tuple(names[1:4]),
        ("", ",", ","),
    )


def _codes(chance: random.Random, number: int, letters: int) -> list[str]:
    found: list[str] = []
    while len(found) < number:
        code = "".join(chance.choices(string.ascii_lowercase, k=letters))
        if code not in found:
            found.append(code)
    return found


# --- headkv's own -------------------------------------------------------------------------------------------------


def facts(source: Source, room: int) -> Task:
    """Facts in prose, as `headkv.data.haystack` hides them: a city, an island, a number or a word of somebody."""
    chance = source.random
    number = chance.randint(1, 8)
    kinds = {
        "city": lambda: chance.choice(source.words.cities),
        "island": lambda: chance.choice(source.words.islands),
        "number": lambda: source.number(5),
        "colour": lambda: chance.choice(source.words.colours),
        "word": source.word,
    }
    told: dict[str, str] = {}
    for name in chance.sample(source.words.names, number):
        adjective = "secret" if chance.random() < 0.6 else chance.choice(_ADJECTIVES)
        kind = chance.choice(list(kinds))
        told[f"he {adjective} {kind} of {name}"] = kinds[kind]()
    subject = chance.choice(list(told))
    context = _mix(source, _prose(source, room), [f" T{s} is {a}." for s, a in told.items()]).strip()
    return _about("facts", context, f"What is t{subject}?", f"T{subject} is", told[subject])


def pairs(source: Source, room: int) -> Task:
    """A list of keys and values, written in one of three ways."""
    chance = source.random
    key = chance.choice((source.word, source.key, lambda: source.number(6), lambda: source.uuid()[:8]))
    value = chance.choice((source.word, source.key, lambda: source.number(5), lambda: source.uuid()[:8]))
    line = chance.choice(("{}: {}", '"{}": "{}",', "{} = {}"))
    told: dict[str, str] = {}
    while room > 0:
        name = key()
        if name in told:
            continue
        told[name] = value()
        room -= source.count(line.format(name, told[name]) + "\n")
    name = chance.choice(list(told))
    context = "\n".join(line.format(k, v) for k, v in told.items())
    return Task(
        "pairs",
        f"Here is a list of keys and values. Remember the value of each key.\n{context}\n\n",
        f"What is the value of {name}?",
        f"The value of {name} is",
        (told[name],),
        ("",),
    )


def two_hops(source: Source, room: int) -> Task:
    """Who keeps which thing, and where each thing was made, apart from one another in prose."""
    chance = source.random
    number = chance.randint(2, 5)
    people = chance.sample(source.words.names, number)
    things = chance.sample(source.words.things, number)
    cities = chance.sample(source.words.cities, number)
    told = [f" {name} keeps the {thing}." for name, thing in zip(people, things, strict=True)]
    told += [f" The {thing} was made in {city}." for thing, city in zip(things, cities, strict=True)]
    chance.shuffle(told)
    at = chance.randrange(number)
    context = _mix(source, _prose(source, room), told).strip()
    question = f"In which city was the thing made that {people[at]} keeps?"
    prefix = f"{people[at]} keeps the {things[at]}. It was made in"
    if chance.random() < 0.5:  # the link is not given
        prefix = f"The thing that {people[at]} keeps was made in"
    return _about("two_hops", context, question, prefix, cities[at])


def sayings(source: Source, room: int) -> Task:
    """Somebody's words, to be repeated."""
    chance = source.random
    people = chance.sample(source.words.names, chance.randint(1, 4))
    said = {name: " ".join(source.word() for _ in range(chance.randint(4, 12))) for name in people}
    name = chance.choice(people)
    context = _mix(source, _prose(source, room), [f" {k} wrote: {v}." for k, v in said.items()]).strip()
    return _about("sayings", context, f"What did {name} write?", f"{name} wrote:", said[name])


def _about(form: str, context: str, question: str, prefix: str, answer: str) -> Task:
    return Task(form, f"{_INTRODUCTION}{context}\n\n", question, prefix, (answer,), ("",))


def _prose(source: Source, room: int) -> list[str]:
    at, pieces = source.random.randrange(len(source.prose)), []
    while room > 0:
        pieces.append(source.prose[at % len(source.prose)])
        room -= source.count(pieces[-1])
        at += 1
    return pieces


def _mix(source: Source, pieces: Iterable[str], hidden: Sequence[str], gap: str = "") -> str:
    """Put `hidden`, in their order, at random places between `pieces`."""
    pieces = list(pieces)
    places = Counter(source.random.randrange(len(pieces) + 1) for _ in hidden)
    waiting, mixed = list(hidden), []
    for at in range(len(pieces) + 1):
        mixed += [waiting.pop(0) for _ in range(places[at])]
        mixed += pieces[at : at + 1]
    return gap.join(mixed)


FORMS: dict[str, Form] = {
    form.__name__: form
    for form in (
        number_lines, uuid_lines, number_noise, number_prose, variables, common_words, frequent_words,
        facts, pairs, two_hops, sayings,
    )
}  # fmt: skip
