"""A question seen, unseen and in a second turn: every method as if it were alone, from caches made from the start."""

from __future__ import annotations

import math

import pytest
import torch
from generation_cases import METHODS
from letters import letters

import headkv
from headkv.data.chat import next_turn
from headkv.evaluation.asking import FIRST, FIRST_REPLY, WAYS, ask
from headkv.evaluation.reading import Reading
from headkv.evaluation.roster import NAMES, budget_from, roster, share_of
from headkv.methods.base import Method
from headkv.models import tiny_model
from headkv.models.smollm2 import load_smollm2

CONTEXT, QUESTION = "the harbour of Vell is kept by Odile, the mill by Oskar.\n", "Who keeps the mill?\nIt is"
CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
NEW = 6


@torch.no_grad()
def alone(model, tokenizer, method: Method, prompt: str, rest: list[int], answer: str):
    """Compress `prompt`, read the rest: what is written, the distributions where the answer should be, tokens."""

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def compressed():
        cache = headkv.RaggedCache.for_model(model, method, rollback=0)
        model(torch.tensor([ids(prompt)]), past_key_values=cache)
        return cache

    cache, written, tokens = compressed(), [], rest
    for _ in range(NEW):
        token = int(model(torch.tensor([tokens]), past_key_values=cache).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        written.append(token)
        tokens = [token]
    asked = torch.tensor([rest + ids(answer)[:-1]])
    logits = model(asked, past_key_values=compressed()).logits[0, len(rest) - 1 :]
    return tokenizer.decode(written, skip_special_tokens=True), logits.log_softmax(-1), len(ids(prompt))


@torch.no_grad()
def full_reply(model, tokenizer, prompt: str) -> list[int]:
    """Greedy decoding by the model itself, without headkv and without a cache."""
    ids, written = tokenizer(prompt, add_special_tokens=False)["input_ids"], []
    for _ in range(FIRST_REPLY):
        token = int(model(torch.tensor([ids + written])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        written.append(token)
    return written


@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_as_if_alone(way, template):
    model, tokenizer = tiny_model("llama", max_position_embeddings=1024), letters(template)
    names = ("FullCache", "AdaKV", "PyramidKV", "DuoAttention", "StreamingLLM")
    makes = {name: (lambda n, name=name: METHODS[name]) for name in names}
    before, answer = model.config._attn_implementation, " Oskar"
    ((said, replies),) = ask(
        model, tokenizer, CONTEXT, QUESTION, makes, (way,), expected=answer, max_new_tokens=NEW
    )
    assert said == way and model.config._attn_implementation == before
    ids = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    prompt, rest = {"unseen": (CONTEXT, ids), "seen": (CONTEXT + QUESTION[:-1], ids[-1:])}.get(way, ("", []))
    if way == "second":
        turn = FIRST + ("\n" if template is None else "</s>[a]")
        between = "\n\n" if template is None else "</s>[user]"
        assert next_turn(tokenizer) == between
        last, *reply = tokenizer(turn[-1])["input_ids"][-1:], *full_reply(model, tokenizer, CONTEXT + turn)
        rest = last + reply + tokenizer(between + QUESTION, add_special_tokens=False)["input_ids"]
        prompt = CONTEXT + turn[:-1]
    full = None
    for name, found in zip(names, replies, strict=True):
        text, logs, n = alone(model, tokenizer, METHODS[name], prompt, rest, answer)
        full = logs if full is None else full
        right = tokenizer(answer, add_special_tokens=False)["input_ids"]
        expected = float(sum(logs[i, token] for i, token in enumerate(right)))
        assert (found.name, found.text, found.tokens) == (name, text, n)
        assert found.log_probability == pytest.approx(expected, abs=1e-3) and found.answer_tokens == len(
            right
        )
        apart = float((full.exp() * (full - logs)).sum(-1).mean())
        assert found.divergence == pytest.approx(apart, abs=1e-4)
    assert replies[0].divergence == 0 and replies[0].stored_share == 1
    assert all(reply.nbytes < replies[0].nbytes for reply in replies[1:])


def test_a_text_is_read_once(monkeypatch):
    """Three ways, four methods: the long text passes the model once."""
    model, tokenizer, lengths = tiny_model("llama", max_position_embeddings=1024), letters(), []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append((args or (kwargs["input_ids"],))[0].shape[1]),
        with_kwargs=True,
    )
    makes = {
        name: (lambda n, name=name: METHODS[name]) for name in ("FullCache", "AdaKV", "SnapKV", "HeadKV")
    }
    assert [way for way, _ in ask(model, tokenizer, CONTEXT * 4, QUESTION, makes, max_new_tokens=2)] == list(
        WAYS
    )
    hook.remove()
    assert sum(n >= 4 * len(CONTEXT) for n in lengths) == 1


def test_without_an_expected_answer_the_first_reply_is_one():
    model, tokenizer = tiny_model("llama", max_position_embeddings=1024), letters()
    makes = {"full": lambda n: headkv.FullCache()}
    ((_, (reply,)),) = ask(model, tokenizer, CONTEXT, QUESTION, makes, ("unseen",), max_new_tokens=3)
    assert reply.answer_tokens == len(tokenizer(reply.text, add_special_tokens=False)["input_ids"] or [2])
    assert reply.log_probability > -reply.answer_tokens * math.log(97), "likelier than by chance"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ways": ("heard",)}, "question must be one of 'seen', 'unseen', 'second', got 'heard'"),
        ({"question": "ab"}, "context and question must have at least three tokens"),
        ({"max_new_tokens": 1000}, "must have at most 1024 tokens, as many as the model reads, got 10"),
    ],
    ids=["way", "short", "long"],
)
def test_what_asking_refuses(change, message):
    model, tokenizer = tiny_model("llama", max_position_embeddings=1024), letters()
    options = {
        "context": CONTEXT,
        "question": QUESTION,
        "methods": {"full": lambda n: headkv.FullCache()},
        **change,
    }
    with pytest.raises(ValueError, match=message):
        list(ask(model, tokenizer, **options))


def test_every_name_makes_a_method_of_its_share():
    """On the model that has profiles; windows are rounded to whole heads, hence the tolerance."""
    model, tokenizer = load_smollm2(tuned=True)
    made = roster(NAMES, model, tokenizer)
    assert list(made) == list(NAMES)
    context = torch.tensor([tokenizer("The mill stands by the river. " * 60)["input_ids"]])
    reading = Reading(model, context)
    n = reading.cache.seen
    for name, make in made.items():
        stored = float(reading.compressed(make(0.25, n)).lengths().double().mean()) / n
        assert stored == pytest.approx(1.0 if name == "FullCache" else 0.25, abs=0.03), name


def test_names_have_no_case_and_unknown_ones_are_refused():
    model, tokenizer = tiny_model("llama"), letters()
    assert list(roster(["snapkv", "KVZIP"], model, tokenizer)) == ["SnapKV", "KVzip"]
    with pytest.raises(ValueError, match="method must be one of FullCache, .*, got 'SnapKW'"):
        roster(["SnapKW"], model, tokenizer)
    with pytest.raises(ValueError, match="model must be one with a shipped profile of kind 'ablation'"):
        roster(["HeadKV"], model, tokenizer)


@pytest.mark.parametrize(
    ("text", "budget"), [("0.1", 0.1), ("1.0", 1.0), ("1", 1), ("256", 256), ("1e-2", 0.01)]
)
def test_budgets_as_they_are_written(text, budget):
    found = budget_from(text)
    assert found == budget and type(found) is type(budget)


@pytest.mark.parametrize("text", ["0", "0.0", "1.5", "-3", "-0.1", "a tenth", "nan", ""])
def test_budgets_that_are_none(text):
    with pytest.raises(ValueError, match="budget must be "):
        budget_from(text)


def test_entries_are_a_share_of_the_prompt():
    assert [share_of(x, 400) for x in (100, 1000, 0.3)] == [0.25, 1.0, 0.3]
