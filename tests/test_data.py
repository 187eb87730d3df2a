"""Haystacks and the running example: what is hidden, where, and that SmolLM2 finds it with its whole cache."""

from __future__ import annotations

import pytest
import torch

from headkv.data import FACTS, Fact, Haystack, haystack, running_example
from headkv.models import load_smollm2

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2():
    return load_smollm2()


@pytest.mark.parametrize(
    ("fact", "text", "right"),
    [
        (0, " Quito.", True),
        (0, "quito, of course", True),
        (0, " Quitos", False),
        (0, " a city", False),
        (0, "", False),
        (2, " Danube\n", True),
        (2, " Danubelike", False),
    ],
)
def test_answers_are_judged(fact: int, text: str, right: bool) -> None:
    assert FACTS[fact].is_answered_by(text) is right


@pytest.mark.parametrize(
    ("num_tokens", "depths", "seed"),
    [
        (200, None, 0),
        (1000, None, 0),
        (1000, (0.0, 0.5, 1.0), 3),
        (1000, (0.9, 0.1, 0.5), 1),
        (6000, None, 2),
    ],
    ids=["short", "running", "edges", "unordered", "prose-repeats"],
)
def test_spans_hold_the_facts(smollm2, num_tokens: int, depths: tuple[float, ...] | None, seed: int) -> None:
    tokenizer = smollm2[1]
    text = haystack(tokenizer, num_tokens, depths=depths, seed=seed)
    length = text.context_ids.shape[1]
    assert num_tokens - 60 < length <= num_tokens
    for fact, span, answer in zip(text.facts, text.spans, text.answer_spans, strict=True):
        assert tokenizer.decode(text.context_ids[0, slice(*span)]).strip() == fact.sentence
        assert tokenizer.decode(text.context_ids[0, slice(*answer)]).strip() == fact.answer
        assert text.text.count(fact.sentence) == 1
    wanted = sorted(depths or (1 / 6, 3 / 6, 5 / 6))
    for span, depth in zip(text.spans, wanted, strict=True):
        # The chat header counts too.
        assert abs(span[0] / length - depth) < (0.1 if num_tokens >= 1000 else 0.35)
    assert text.prompt(1).shape[1] == length + text.question_ids[1].shape[1]


def test_the_seed_changes_the_prose_and_nothing_else_does(smollm2) -> None:
    tokenizer = smollm2[1]
    assert haystack(tokenizer, 500).text == haystack(tokenizer, 500).text
    assert haystack(tokenizer, 500).text != haystack(tokenizer, 500, seed=1).text
    assert running_example(tokenizer).text == haystack(tokenizer, 1000).text


def test_a_tokenizer_without_a_chat_template_will_do(smollm2, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = smollm2[1]
    monkeypatch.setattr(tokenizer, "chat_template", None)
    text = haystack(tokenizer, 300)
    prompt = tokenizer.decode(text.prompt(0)[0])
    assert "user" not in prompt and prompt.endswith(f"{FACTS[0].question}\n{FACTS[0].prefix}")


@pytest.mark.parametrize(
    ("num_tokens", "facts", "depths", "message"),
    [
        (500, [], None, "facts must hold at least one"),
        (500, FACTS, (0.5,), r"depths must be as many as facts \(3\), got 1"),
        (500, FACTS, (0.5, 0.2, 1.5), r"depths must be in \[0, 1\], got 1.5"),
        (50, FACTS, None, "num_tokens must leave room for the facts and some text, got 50"),
        (-1, FACTS, None, "got -1"),
    ],
    ids=["none", "count", "range", "short", "negative"],
)
def test_arguments_are_checked(
    smollm2, num_tokens: int, facts: list[Fact], depths: tuple[float, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        haystack(smollm2[1], num_tokens, facts, depths)


def test_smollm2_answers_the_running_example(smollm2) -> None:
    model, tokenizer = smollm2
    text: Haystack = running_example(tokenizer)
    with torch.inference_mode():
        cache = model(text.context_ids, use_cache=True, logits_to_keep=1).past_key_values
        for fact, question in zip(text.facts, text.question_ids, strict=True):
            written, tokens = [], question
            for _ in range(4):
                tokens = model(tokens, past_key_values=cache).logits[:, -1:].argmax(-1)
                written.append(int(tokens))
            assert fact.is_answered_by(tokenizer.decode(written))
            cache.crop(text.context_ids.shape[1] - cache.get_seq_length())
