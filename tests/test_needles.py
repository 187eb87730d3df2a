"""Needles: what is hidden, what is asked, and that training and validation share neither."""

from __future__ import annotations

import pytest
import torch
from letters import letters

from headkv.data import NEEDLE_KINDS, needle_texts
from headkv.data.needles import SPLITS
from headkv.data.pools import POOLS
from headkv.models import load_smollm2

TEMPLATE = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}<s>assistant{{ '\\n' }}"


@pytest.fixture(scope="module", params=["letters", "letters-chat", "smollm2"])
def tokenizer(request: pytest.FixtureRequest):
    if request.param == "smollm2":
        return load_smollm2()[1]
    return letters(TEMPLATE if "chat" in request.param else None)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", NEEDLE_KINDS)
def test_every_answer_stands_in_its_text(tokenizer, kind: str, split: str) -> None:
    for text in needle_texts(tokenizer, texts=3, lengths=(900, 1500), kinds=(kind,), each=2, split=split):
        context = tokenizer.decode(text.context_ids[0])
        assert len(text.needles) == 2
        for needle in text.needles:
            answer = tokenizer.decode(needle.answer_ids[0])
            question = tokenizer.decode(needle.question_ids[0])
            beginning = question.split("\n")[-1]
            assert needle.kind == kind and f"{beginning}{answer}." in context or kind == "hops"
            assert answer.strip() and answer.strip() not in question
            assert f"{answer.strip()}." in context
        assert len({tokenizer.decode(needle.question_ids[0]) for needle in text.needles}) == 2


def test_lengths_come_in_turn_and_seeds_repeat(tokenizer) -> None:
    options = {"texts": 3, "lengths": (1500, 2000), "each": 1}
    first, again = (needle_texts(tokenizer, **options, seed=4) for _ in range(2))
    other = needle_texts(tokenizer, **options, seed=5)
    for one, two, three, length in zip(first, again, other, (1500, 2000, 1500), strict=True):
        assert length - 150 < one.context_ids.shape[1] <= length
        assert torch.equal(one.context_ids, two.context_ids)
        assert one.context_ids.tolist() != three.context_ids.tolist()
        assert sorted(needle.kind for needle in one.needles) == sorted(NEEDLE_KINDS)


def test_training_and_validation_share_no_name_no_answer_and_no_first_sentence() -> None:
    def words(split: str) -> set[str]:
        pool = POOLS[split]
        answers = [word for _, all_of_them in pool.words for word in all_of_them]
        return {*pool.people, *answers, *pool.hop[1], *pool.hop[3], *(thing for thing, _ in pool.words)}

    assert not words("training") & words("validation")
    tokenizer = letters(bos=False)
    starts = {
        split: {
            tokenizer.decode(text.context_ids[0]).split("\n\n")[1].split(". ")[0]
            for text in needle_texts(tokenizer, texts=30, lengths=(600,), kinds=("numbers",), split=split)
        }
        for split in SPLITS
    }
    assert all(len(starts[split]) > 10 for split in SPLITS)
    assert not starts["training"] & starts["validation"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split must be one of training, validation, got 'test'"),
        ({"kinds": ("words", "x")}, "kinds must be of words, numbers, pairs, sentences, hops, got 'x'"),
        ({"kinds": ()}, "kinds and lengths must hold at least one each"),
        ({"lengths": ()}, "kinds and lengths must hold at least one each"),
        ({"texts": 0}, "texts must be an int of at least 1, got 0"),
        ({"each": 0}, "each must be an int of at least 1, got 0"),
        ({"each": 6}, "each must leave a person for every fact, of 26, got 30 facts"),
        ({"lengths": (60,)}, "num_tokens must leave room for the facts and some text, got 60"),
    ],
    ids=["split", "kinds", "no-kinds", "no-lengths", "texts", "each", "people", "short"],
)
def test_the_arguments_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        needle_texts(letters(), **{"texts": 1, "lengths": (1500,), **options})
