"""The pipeline: its answers against a cache driven by hand, its call's shape, and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
import transformers
from letters import letters
from torch import Tensor

import headkv
from headkv.data import haystack
from headkv.data.haystacks import _INTRODUCTION
from headkv.integrations.pipeline import TASK, HeadKVPipeline
from headkv.models import load_smollm2, tiny_model
from headkv.models.smollm2 import _FOLDER, cache_home

TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] | trim }}{% endfor %}"
    "{% if add_generation_prompt %}[{{ 'answer' if enable_thinking is false else 'hm' }}]{% endif %}"
)
CONTEXT = "The harbour of Vell has nine cranes. Its keeper is Odile, and her dog is called Bruno; he sleeps."
QUESTIONS = ["Who keeps the harbour?", "How many cranes?", "And the dog?"]
ADA = headkv.AdaKV(0.3, headkv.SnapKVScorer(window=8, kernel_size=3))


def pipe(family: str = "llama", template: str | None = None, **options: Any) -> HeadKVPipeline:
    options = {"device": "cpu", "max_new_tokens": 12, **options}
    return headkv.pipeline(tiny_model(family), letters(template), **options)


def by_hand(
    model: Any, tokenizer: Any, context: str, ask: str, method: Any, count: int = 12, **marks: Any
) -> str:
    """The answer from texts that are complete already: nothing of the pipeline is used."""

    def ids(text: str) -> Tensor:
        return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])

    former, cache = model.config._attn_implementation, headkv.RaggedCache.for_model(model, method)
    with torch.no_grad():
        model(ids(context), past_key_values=cache)
        for token in ids(ask)[0, :-1]:  # one at a time: other code than the pipeline's
            model(token.view(1, 1), past_key_values=cache)
        token, answer = ids(ask)[:, -1:], []
        for _ in range(count):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            answer.append(int(token))
            if answer[-1] == tokenizer.eos_token_id:
                break
    model.set_attn_implementation(former)
    return str(tokenizer.decode(answer, skip_special_tokens=True))


METHODS = {
    "AdaKV": ADA,
    "StreamingLLM": headkv.StreamingLLM(0.3),
    "RandomHeads": headkv.RandomHeads.for_share(0.4, len(CONTEXT)),
    "full": headkv.FullCache(),
}
# template -> (before the text, between text and question, after the question)
FRAMES = {"plain": (None, "<s>", "\n\n", "\n"), "chat": (TEMPLATE, "<s>[user]", "\n\n", "[answer]")}


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_answers_are_those_by_hand(family: str, method: str, frame: str) -> None:
    template, before, gap, after = FRAMES[frame]
    asking = pipe(family, template)
    found = asking(CONTEXT, question=QUESTIONS[0], answer_prefix="It is ", method=METHODS[method])
    ask = f"{gap}{QUESTIONS[0]}{after}It is "
    expected = by_hand(asking.model, asking.tokenizer, before + CONTEXT, ask, METHODS[method])
    assert found == {"answer": expected}


def test_compression_changes_the_answer() -> None:
    asking = pipe()
    assert asking(CONTEXT, question=QUESTIONS[0], method=ADA) != asking(CONTEXT, question=QUESTIONS[0])


@pytest.mark.parametrize("method", METHODS)
def test_several_questions_equal_single_ones(method: str) -> None:
    asking = pipe(method=METHODS[method])
    single = [asking(CONTEXT, question=question)["answer"] for question in QUESTIONS]
    assert asking(CONTEXT, questions=QUESTIONS) == {"answers": single}
    assert asking(CONTEXT, questions=QUESTIONS[:1]) == {"answers": single[:1]}
    assert len(set(single)) > 1
    assert asking([CONTEXT, CONTEXT[:60]], questions=QUESTIONS) == [
        {"answers": single},
        asking(CONTEXT[:60], questions=QUESTIONS),
    ]


def test_without_a_question_the_text_goes_on_from_the_compressed_cache() -> None:
    """Plain: the last letter is held back and asks the compressed rest. A chat: the answer's turn asks."""
    asking = pipe()
    full, text = asking(CONTEXT), "<s>" + CONTEXT
    found = asking(CONTEXT, method=ADA)
    assert found == {"answer": by_hand(asking.model, asking.tokenizer, text[:-1], text[-1:], ADA)}
    assert found != full
    inputs = asking.tokenizer(text, add_special_tokens=False, return_tensors="pt")
    out = asking.model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=2)
    assert full["answer"] == asking.tokenizer.decode(
        out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    chat = pipe(template=TEMPLATE)
    expected = by_hand(chat.model, chat.tokenizer, "<s>[user]" + CONTEXT, "[answer]", ADA)
    assert chat(CONTEXT, method=ADA) == {"answer": expected}


@pytest.mark.parametrize(
    ("context", "question", "gap"),
    [
        ("a b.", "c?", "\n\n"),
        ("a b.\n", "c?", ""),
        ("a b.", " c?", ""),
    ],
    ids=["none", "in the text", "in the question"],
)
def test_a_blank_line_goes_where_no_white_space_is(context: str, question: str, gap: str) -> None:
    asking = pipe()
    inputs = asking.preprocess(context, [question])
    assert asking.tokenizer.decode(inputs["context"][0]) == "<s>" + context
    assert asking.tokenizer.decode(inputs["asks"][0][0]) == gap + question + "\n"
    asking.tokenizer = letters(bos=False)
    assert asking.tokenizer.decode(asking.preprocess(context)["context"][0]) == context[:-1]


def test_a_ratio_is_a_budget_of_ada_kv() -> None:
    asking = pipe()
    budget = asking(CONTEXT * 3, question=QUESTIONS[0], method=headkv.AdaKV(1.0 - 0.7))
    assert asking(CONTEXT * 3, question=QUESTIONS[0], compression_ratio=0.7) == budget
    full = asking(CONTEXT, question=QUESTIONS[0])
    assert asking(CONTEXT, question=QUESTIONS[0], compression_ratio=0) == full != budget


def test_a_cache_that_is_given_holds_the_compressed_text_afterwards() -> None:
    asking = pipe()
    expected = asking(CONTEXT, questions=QUESTIONS, method=ADA)
    cache = headkv.RaggedCache.for_model(asking.model, ADA)
    assert asking(CONTEXT, questions=QUESTIONS, cache=cache) == expected
    assert cache.seen == len(CONTEXT) + 1
    assert cache.lengths().float().mean() == pytest.approx(0.3 * cache.seen, abs=1)
    with pytest.raises(ValueError, match=r"cache must be empty, got one with 98 tokens; cache.reset\(\)"):
        asking(CONTEXT, question=QUESTIONS[0], cache=cache)
    cache.reset()
    chunked = headkv.RaggedCache.for_model(asking.model, ADA, chunked_prefill=True)
    single = {"answer": expected["answers"][0]}
    assert asking(CONTEXT, question=QUESTIONS[0], cache=cache) == single
    assert asking(CONTEXT, question=QUESTIONS[0], cache=chunked) == single
    assert cache.seen == chunked.seen == len(CONTEXT) + 1


def test_what_is_said_in_a_call_wins() -> None:
    asking = pipe(method=ADA, question=QUESTIONS[0], max_new_tokens=3)
    short = asking(CONTEXT)["answer"]
    assert len(asking(CONTEXT, max_new_tokens=9)["answer"]) > len(short)
    cache = headkv.RaggedCache.for_model(asking.model, headkv.FullCache())
    full = asking(CONTEXT, cache=cache)
    assert full == asking(CONTEXT, method=headkv.FullCache()) and cache.lengths().min() == cache.seen
    assert asking(CONTEXT, questions=QUESTIONS)["answers"][0] == short


def test_the_model_stops_at_its_end_token() -> None:
    asking = pipe(max_new_tokens=12)
    tokens = asking.tokenizer(asking(CONTEXT)["answer"], add_special_tokens=False)["input_ids"]
    asking.model.generation_config.eos_token_id = [2, tokens[4]]
    first = tokens.index(tokens[4])
    assert asking(CONTEXT)["answer"] == asking.tokenizer.decode(tokens[: first + 1])


def test_longer_texts_are_cut_only_when_told() -> None:
    asking = pipe()
    with pytest.warns(UserWarning, match=r"cut from 98 to 41 tokens \(max_context_length\)"):
        cut = asking(CONTEXT, question=QUESTIONS[0], max_context_length=41, method=ADA)
    assert cut == asking(CONTEXT[:40], question=QUESTIONS[0], method=ADA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asking(CONTEXT, question=QUESTIONS[0], max_context_length=98)
    with pytest.raises(
        ValueError, match=r"context must have at most 512 tokens.*got 583; max_context_length=512"
    ):
        asking(CONTEXT * 6, question=QUESTIONS[0])


def test_progress_is_shown_for_several_questions_only(capfd: pytest.CaptureFixture[str]) -> None:
    asking = pipe()
    asking(CONTEXT, question=QUESTIONS[0])
    assert "Answers" not in capfd.readouterr().err
    asking(CONTEXT, questions=QUESTIONS)
    assert "Answers" in capfd.readouterr().err


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "empty context": ({"context": " \n"}, ValueError, "context must not be empty"),
    "no context": ({"context": []}, ValueError, "context must be a text, or a list of at least one"),
    "chat": ({"context": [{"role": "user", "content": "a"}]}, TypeError, "context must be a string"),
    "both": (
        {"question": "a", "questions": ["b"]},
        ValueError,
        "question and questions must not both be given",
    ),
    "empty question": ({"question": ""}, ValueError, "question must not be empty"),
    "question 3": ({"question": 3}, TypeError, "question must be a string, got 3"),
    "no questions": (
        {"questions": []},
        TypeError,
        "questions must be a list of at least one question, got []",
    ),
    "questions a string": ({"questions": "a?"}, TypeError, "questions must be a list"),
    "an empty question": ({"questions": ["a", ""]}, ValueError, "questions[1] must not be empty"),
    "prefix": ({"answer_prefix": 1}, TypeError, "answer_prefix must be a string, got 1"),
    "no tokens": ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be an int of at least 1, got 0"),
    "no room": ({"max_context_length": 0}, ValueError, "max_context_length must be an int of at least 1"),
    "nothing left": (
        {"context": "a", "max_context_length": 1},
        ValueError,
        "context must have at least two tokens",
    ),
    "method a class": ({"method": headkv.AdaKV}, TypeError, "method must be an object with plan"),
    "method a word": ({"method": "AdaKV"}, TypeError, "method must be an object with plan, observed_queries"),
    "ratio 1": ({"compression_ratio": 1}, ValueError, "compression_ratio must be below 1"),
    "ratio": (
        {"compression_ratio": 1.5},
        ValueError,
        "compression_ratio must be a number in [0, 1], got 1.5",
    ),
    "two ways": ({"compression_ratio": 0.5, "method": ADA}, ValueError, "got method and compression_ratio"),
    "another cache": (
        {"cache": transformers.DynamicCache()},
        TypeError,
        "cache must be a RaggedCache, got DynamicCache",
    ),
    "profile": (
        {"method": headkv.DuoAttention(headkv.HeadProfile.builtin("smollm2-gate"))},
        ValueError,
        "profile must fit the model",
    ),
    "typo": ({"press": ADA}, TypeError, "press"),
}


@pytest.mark.filterwarnings("ignore:context is cut")
@pytest.mark.parametrize("arguments, error, message", BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    asking = pipe()
    before = asking.model.config._attn_implementation
    with pytest.raises(error, match=re.escape(message)):
        asking(**{"context": CONTEXT, **arguments})
    assert asking.model.config._attn_implementation == before


def test_a_cache_of_another_model_is_refused() -> None:
    asking = pipe()
    cache = headkv.RaggedCache.for_model(tiny_model("llama", num_hidden_layers=2), ADA)
    with pytest.raises(ValueError, match="cache must have the model's 3 layers, got 2"):
        asking(CONTEXT, cache=cache)


def test_models_and_tokenizers_that_do_not_do_are_refused() -> None:
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        headkv.pipeline(t5, letters(), device="cpu")
    with pytest.raises(ValueError, match="tokenizer must be given"):
        HeadKVPipeline(tiny_model("llama"))
    with pytest.raises(ValueError, match="batch_size must be 1: texts are read one by one, got 4"):
        pipe(batch_size=4)


@pytest.mark.parametrize("fails_at", [1, 2, 5], ids=["prefill", "question", "decode"])
def test_the_attention_is_put_back_after_an_error(fails_at: int) -> None:
    asking, calls = pipe(), 0
    asking.model.set_attn_implementation("eager")

    def stop(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise KeyboardInterrupt

    hook = asking.model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        asking(CONTEXT, questions=QUESTIONS, method=ADA)
    assert asking.model.config._attn_implementation == "eager"
    hook.remove()
    asking(CONTEXT, question=QUESTIONS[0], method=ADA)
    assert asking.model.config._attn_implementation == "eager"


def test_transformers_makes_it_by_its_task(tmp_path: Any) -> None:
    """From loaded parts, and from a folder alone; the answers are the same."""
    model, tokenizer = tiny_model("llama"), letters(TEMPLATE)
    options = {"device": "cpu", "method": ADA}
    one = transformers.pipeline(TASK, model=model, tokenizer=tokenizer, **options)
    assert type(one) is HeadKVPipeline
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    two = headkv.pipeline(str(tmp_path), **options)
    assert one(CONTEXT, questions=QUESTIONS) == two(CONTEXT, questions=QUESTIONS)


def test_the_task_is_known_once_it_is_asked_for() -> None:
    code = (
        "import sys, headkv; assert 'transformers' not in sys.modules; headkv.pipeline; "
        "from transformers.pipelines import PIPELINE_REGISTRY as r; r.check_task('headkv-text-generation')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.skipif(not (cache_home() / _FOLDER).is_dir(), reason="SmolLM2 is not on this machine")
def test_smollm2_answers_from_the_compressed_text() -> None:
    """The tokens are those of the book's haystacks, so a fact is found with the full cache."""
    model, tokenizer = load_smollm2()
    text = haystack(tokenizer, 300)
    asking = headkv.pipeline(model, tokenizer, device="cpu", max_new_tokens=8)
    context = _INTRODUCTION + text.text + "\n\n"
    method = headkv.AdaKV(0.5, headkv.SnapKVScorer(window=8))
    before = tokenizer.decode(text.context_ids[0])
    fact, ids = text.facts[1], text.question_ids[1]
    ask = {"question": fact.question, "answer_prefix": fact.prefix}
    assert fact.is_answered_by(asking(context, **ask)["answer"])
    expected = by_hand(model, tokenizer, before, tokenizer.decode(ids[0]), method, 8)
    assert asking(context, **ask, method=method) == {"answer": expected}
