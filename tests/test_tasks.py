"""The tasks that the tuned model learned from: forms, seeds, lengths, and that validation words were not trained on."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from headkv.data.tasks import FORMS, Source, Task, make_task, own_prose, sentences
from headkv.data.words import Words

VOCABULARY = [
    f"Ġ{first}{second}" for first in ("bra", "cle", "dro", "fin", "gul", "hom", "jas", "kel") for second in (
        "ad", "bert", "cot", "dun", "erl", "fost", "gam", "hin", "iver", "jon", "kin", "lom", "mus", "nor", "op", "quin",
    )
]  # fmt: skip
TRAINING, VALIDATION = Words.parts(VOCABULARY)
GROUPS = ("names", "cities", "islands", "things", "colours", "words")


def count(text: str) -> int:
    """As SmolLM2 counts, about: words, single digits and signs."""
    return len(re.findall(r"[a-zA-Z]+|[^a-zA-Z\s]", text))


def task(form: str, room: int = 500, seed: int = 0, words: Words = TRAINING) -> Task:
    return make_task(form, Source(random.Random(seed), words, count, own_prose()), room)


@pytest.mark.parametrize("group", GROUPS)
def test_training_and_validation_share_no_word(group: str) -> None:
    ours, theirs = getattr(TRAINING, group), getattr(VALIDATION, group)
    assert len(set(ours)) == len(ours) > len(theirs) == len(set(theirs)) >= 5
    assert not set(ours) & set(theirs)


def test_facts_of_the_book_are_not_trained_on() -> None:
    """The running example asks for Odile's and Bruno's; a tuned model must not have seen them."""
    trained = {word for group in GROUPS for word in getattr(TRAINING, group)}
    assert not trained & {"Odile", "Bruno", "Tamsin", "Quito", "Malta", "Danube"}


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary must hold at least 100 words such as 'Ġriver', got 2"):
        Words.parts(["Ġriver", "Ġstone", "stone", "Ġ12", "Ġat"])


@pytest.mark.parametrize("form", FORMS)
def test_a_seed_decides_a_task(form: str) -> None:
    assert task(form) == task(form)
    assert task(form) != task(form, seed=1)


@pytest.mark.parametrize("room", [200, 600, 3000])
@pytest.mark.parametrize("form", FORMS)
def test_a_text_holds_the_answers_and_has_about_the_length(form: str, room: int) -> None:
    for seed in range(5):
        one = task(form, room, seed)
        assert one.form == form and one.text.endswith("\n") and len(one.leads) == len(one.answers)
        assert all(answer in one.text for answer in one.answers)
        assert 0.6 * room < count(one.text) < 1.15 * room + 150
        assert one.score(one.reply) == 1 and one.score("") == 0 and one.reply.endswith(".")


@pytest.mark.parametrize(
    "form", ["number_lines", "uuid_lines", "number_noise", "number_prose", "pairs", "facts", "sayings"]
)
def test_what_is_asked_stands_in_the_text_once(form: str) -> None:
    for seed in range(10):
        one = task(form, seed=seed)
        asked = re.search(r" (?:for|of|did) ([\w-]+)(?: mentioned| write)?", one.question)
        assert asked and asked[1] in one.prefix + one.question
        told = [
            line
            for line in re.split(r"\n|(?<=\.) ", one.text)
            if re.search(rf"(?<![\w-]){asked[1]}(?![\w-])", line)
        ]
        assert any(one.answers[0] in line for line in told), (one.question, told)


@pytest.mark.parametrize("seed", range(12))
def test_chains_lead_from_the_value_through_all_variables(seed: int) -> None:
    one = task("variables", 900, seed)
    value = re.search(r"value (\d+)", one.question)
    assert value
    told = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", one.text.rpartition("Memorize")[2]))
    known = [name for name, to in told.items() if to == value[1]]
    for name, to in told.items():
        if to in known:
            known.append(name)
    assert tuple(known) == one.answers
    assert one.prefix.startswith(
        f"Answer: According to the chain(s) of variable assignment in the text above, {len(known)}"
    )


@pytest.mark.parametrize("seed", range(12))
def test_the_common_words_are_the_most_common(seed: int) -> None:
    one = task("common_words", 200 + 200 * seed, seed)
    counts = Counter(re.findall(r"\d+\. (\w+)", one.text))
    assert {word for word, _ in counts.most_common(10)} == set(one.answers)
    (tenth, tenth_count), (_, next_count) = counts.most_common(11)[9:]
    assert tenth_count > next_count and one.any_order
    assert one.reply.startswith(f" 1. {one.answers[0]} 2. {one.answers[1]}")


@pytest.mark.parametrize("seed", range(12))
def test_the_frequent_words_are_the_most_frequent_in_order(seed: int) -> None:
    one = task("frequent_words", 200 + 200 * seed, seed)
    words = Counter(one.text.partition("coded words. ")[2].split())
    del words["..."]
    ranked = words.most_common(4)
    assert tuple(word for word, _ in ranked[:3]) == one.answers
    assert len({n for _, n in ranked}) == 4


@pytest.mark.parametrize("seed", range(8))
def test_two_hops_need_both(seed: int) -> None:
    one = task("two_hops", seed=seed)
    who = re.search(r"made that (\w+) keeps", one.question)
    assert who
    thing = re.search(rf"{who[1]} keeps the (\w+)\.", one.text)
    assert thing and f"The {thing[1]} was made in {one.answers[0]}." in one.text


def test_a_score_is_the_share_of_answers_found_in_any_case() -> None:
    one = Task("x", "\n", "", "", ("Alpha", "beta"), ("", ","))
    assert one.reply == " Alpha, beta."
    assert [one.score(reply) for reply in ("BETA alpha", "beta", "gamma")] == [1.0, 0.5, 0.0]


def test_sentences_give_the_text_back() -> None:
    text = "One is here. Two? Yes!\n\nAnd three."
    assert "".join(sentences(text)).strip() == text


@pytest.mark.parametrize(
    ("form", "room", "message"),
    [
        ("poems", 500, "form must be one of number_lines, .*sayings, got 'poems'"),
        ("facts", 100, "room must be at least 200 tokens, got 100"),
    ],
)
def test_arguments_are_checked(form: str, room: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(form, room)
