"""lm-evaluation-harness as the engine: its documents and scores, `headkv eval` end to end, headkv as its model."""

from __future__ import annotations

import os
import random

import lm_eval
import numpy as np
import pytest
import torch
from letters import letters
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import headkv
from headkv.cli import main
from headkv.evaluation.asking import ask
from headkv.evaluation.harness import DOWNLOADS, OFFLINE, TASKS, samples, split
from headkv.evaluation.lm import HeadKVLM
from headkv.evaluation.rows import read_rows
from headkv.models import tiny_model
from headkv.models.smollm2 import load_smollm2

RULER = os.path.join(os.path.dirname(lm_eval.__file__), "tasks", "ruler")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A folder with a tiny model and a tokenizer of letters, that transformers loads."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    tiny_model("llama", max_position_embeddings=2048).save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


def test_eval_end_to_end(tmp_path, capsys):
    """The tuned SmolLM2 finds RULER's needle with the full cache, and with a tenth of it where KVzip chose it."""
    out = tmp_path / "rows.parquet"
    words = [
        "eval",
        "--model",
        "smollm2-tuned",
        "--tasks",
        "niah_single_1",
        "--lengths",
        "512",
        "--limit",
        "1",
    ]
    words += ["--method", "SnapKV", "KVzip", "--budget", "0.1", "--question", "unseen", "--new-tokens", "12"]
    words += ["--out", str(out)]
    assert main(words) == 0
    rows = {row.method: row for row in read_rows(out)}
    assert list(rows) == ["FullCache", "SnapKV", "KVzip"]
    full, snap, zipped = rows.values()
    assert full.score == zipped.score == 1 and full.expected[0] in full.reply
    assert full.log_probability > -0.1 > snap.log_probability and snap.divergence > zipped.divergence
    assert snap.nbytes < full.nbytes / 3 and snap.stored_share == pytest.approx(0.1, abs=0.01)
    assert zipped.parameters.startswith("KVzip(0.1, scorer=Remembered(")
    assert " at 0x" not in zipped.parameters, "parameters say the same in another process"
    assert 0 < full.depth < 1 and "lm_eval 0.4" in full.versions
    shown = capsys.readouterr().out
    assert shown.startswith("smollm2-tuned, question unseen, 512 tokens, 1 documents a row")
    assert main(words) == 2
    assert "out must be a new file" in capsys.readouterr().err


def test_documents_do_not_depend_on_what_was_made_before(tiny):
    tokenizer = letters()
    tokenizer.name_or_path = tiny
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()
    first = samples(tokenizer, "niah_multikey_2", 700, limit=3)
    other = samples(tokenizer, "niah_multikey_2", 700, seed=1, limit=1)
    again = samples(tokenizer, "niah_multikey_2", 700, limit=2)
    assert [x.context for x in again] == [x.context for x in first[:2]]
    assert other[0].context != first[0].context and [x.doc_id for x in first] == [0, 1, 2]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    for sample in first:
        assert sample.question.startswith(
            "What is the special magic number for "
        ) and sample.context.endswith("\n")
        assert sample.expected[0] in sample.context and sample.max_new_tokens == 128
        assert [sample.score(text) for text in (f"it is {sample.expected[0]}.", "I forgot")] == [1.0, 0.0]
        assert sample.context.startswith("<s>A special magic number is hidden")
        assert len(tokenizer(sample.context + sample.question)["input_ids"]) <= 700


SPLIT = {  # task -> the end of a prompt, and what of it is the question
    "niah_single_1": (
        "So.\nWhat is this?\nWhat is the special magic number for x?",
        "What is the special magic",
    ),
    "ruler_vt": ("Question: Find a\n\nMemorize\nQuestion: Find all variables that", "Question: Find all"),
    "ruler_cwe": ("1. a 2. b\nQuestion: What are the 10 most", "Question: What are"),
    "ruler_qa_squad": (
        "\nAnswer the question based on it.\nDocument\nAnswer the question based on it.\n\nQuestion: Who?",
        "Answer the question based on it.\n\nQuestion: Who?",
    ),
}


@pytest.mark.parametrize("task", SPLIT)
def test_the_question_is_what_stands_behind_the_last_mark(task):
    prompt, begin = SPLIT[task]
    context, question = split(task, prompt)
    assert context + question == prompt and question.startswith(begin) and context.endswith("\n")


def test_what_the_harness_refuses(tiny, monkeypatch):
    tokenizer = letters()
    tokenizer.name_or_path = tiny
    with pytest.raises(ValueError, match="tasks must be one of 'niah_single_1', .*, got 'hellaswag'"):
        samples(tokenizer, "hellaswag", 1024)
    with pytest.raises(ValueError, match="lengths must be an int of at least 1000, got 512"):
        samples(tokenizer, "ruler_vt", 512)  # lm-eval would never come back
    with pytest.raises(ValueError, match="for a question to be cut off, got 'gsm8k'"):
        split("gsm8k", "What?")
    assert set(OFFLINE) | set(DOWNLOADS) == set(TASKS) and len(TASKS) == 13


def test_a_task_whose_data_can_not_be_had_says_so(tiny, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    tokenizer = letters()
    tokenizer.name_or_path = tiny
    with pytest.raises(
        RuntimeError, match="ruler_qa_squad needs SQuAD by HTTP, which could not be had: "
    ) as found:
        samples(tokenizer, "ruler_qa_squad", 1024)
    assert "These tasks need no network: niah_single_1, " in str(found.value)


def test_lm_eval_asks_headkv(tiny):
    """lm_eval's own run, question unseen: the replies are those of the parts, the scores are lm_eval's."""
    options = {"pretrained": tiny, "method": "SnapKV", "budget": 0.5, "question": "unseen"}
    metadata = {"tokenizer": tiny, "max_seq_lengths": [900]}
    found = lm_eval.simple_evaluate(
        model="headkv",
        model_args=options,
        tasks=["niah_single_1"],
        limit=1,
        bootstrap_iters=0,
        gen_kwargs={"max_gen_toks": 5},
        task_manager=TaskManager(include_path=RULER, include_defaults=False, metadata=metadata),
    )
    assert found["config"]["question"] == "unseen" and found["config"]["method"] == "SnapKV"
    (sample,) = found["samples"]["niah_single_1"]
    context, question = split("niah_single_1", sample["arguments"][0][0])
    makes = {"SnapKV": lambda n: headkv.SnapKV(0.5, headkv.SnapKVScorer(kernel_size=21))}
    model = tiny_model("llama", max_position_embeddings=2048)
    ((_, (reply,)),) = ask(model, letters(), context, question, makes, ("unseen",), max_new_tokens=5)
    assert sample["resps"] == [[reply.text]]


def instance(kind: str, *arguments) -> Instance:
    return Instance(kind, {}, arguments, 0, ("some_task", 0, 1))


@torch.no_grad()
@pytest.mark.parametrize(("method", "budget"), [("FullCache", 1.0), ("StreamingLLM", 12)])
def test_continuations_are_scored_from_the_compressed_context(tiny, method, budget):
    lm = HeadKVLM(tiny, method, budget)
    pairs = [("the mill of Vell is Oskar's", x) for x in (" now", " and")] + [
        ("the mill", " is"),
        ("", "a mill"),
    ]
    found = lm.loglikelihood([instance("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    model, tokenizer = tiny_model("llama", max_position_embeddings=2048), letters()
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        ids = tokenizer(context)["input_ids"] or [2]
        answer = tokenizer(continuation, add_special_tokens=False)["input_ids"]
        asked = torch.tensor([ids[-1:] + answer[:-1]])
        if len(ids) == 1:  # nothing to compress
            logs = model(asked).logits[0].log_softmax(-1)
        else:
            # Of a share, so that a context shorter than the budget is kept as a whole.
            share = min(1.0, budget / (len(ids) - 1)) if method == "StreamingLLM" else 1.0
            own = headkv.StreamingLLM(share) if method == "StreamingLLM" else headkv.FullCache()
            cache = headkv.RaggedCache.for_model(model, own, rollback=0)
            model(torch.tensor([ids[:-1]]), past_key_values=cache)
            logs = model(asked, past_key_values=cache).logits[0].log_softmax(-1)
            assert total == pytest.approx(float(headkv.score(model, own, [ids], [answer])), abs=1e-3)
        assert total == pytest.approx(float(sum(x[t] for x, t in zip(logs, answer, strict=True))), abs=1e-3)
        assert greedy == all(int(x.argmax()) == t for x, t in zip(logs, answer, strict=True))


def test_replies_end_at_a_stop_string(tiny):
    lm = HeadKVLM(tiny, "AdaKV", "0.5")
    (whole,) = lm.generate_until([instance("generate_until", "the mill of Vell", {"max_gen_toks": 6})], True)
    (cut,) = lm.generate_until(
        [instance("generate_until", "the mill of Vell", {"max_gen_toks": 6, "until": [whole[2]]})], True
    )
    assert len(whole) > 2 and cut == whole[: whole.index(whole[2])]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"question": "heard"}, "question must be one of 'seen', 'unseen', 'second', got 'heard'"),
        ({"method": "None"}, "method must be one of FullCache, "),
        ({"budget": "2.0"}, r"budget must be a number in \[0, 1\], got 2.0"),
    ],
    ids=["question", "method", "budget"],
)
def test_model_arguments_that_are_none(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        HeadKVLM(**{"pretrained": tiny, **options})


def test_requests_that_are_refused(tiny):
    lm = HeadKVLM(tiny, question="unseen")
    with pytest.raises(ValueError, match="question must be 'seen' for tasks that score continuations"):
        lm.loglikelihood([instance("loglikelihood", "a b", " c")], disable_tqdm=True)
    with pytest.raises(ValueError, match="for a question to be cut off, got 'some_task'"):
        lm.generate_until([instance("generate_until", "a mill", {})], disable_tqdm=True)
    with pytest.raises(ValueError, match="generation_kwargs must be greedy"):
        lm.generate_until([instance("generate_until", "a mill", {"temperature": 0.7})], disable_tqdm=True)
    with pytest.raises(ValueError, match="there is no prompt to compress"):
        lm.loglikelihood_rolling([], disable_tqdm=True)


@pytest.mark.parametrize("words", [["run", "--help"], ["--model", "headkv", "--help"]], ids=["run", "short"])
def test_lm_evals_own_command(words, capsys):
    with pytest.raises(SystemExit) as done:
        main(["lm-eval", *words])
    assert done.value.code == 0 and "lm-eval run --model" in capsys.readouterr().out


def test_compare_on_a_text_of_ones_own(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(
        "The mill of Vell is kept by Oskar Brandt, and has been for thirty years. " * 3, encoding="utf-8"
    )
    words = [
        "compare",
        "--model",
        "smollm2-tuned",
        "--text",
        str(text),
        "--method",
        "SnapKV",
        "--budget",
        "64",
    ]
    assert (
        main([*words, "--question", "Who keeps the mill of Vell?", "--new-tokens", "8", "--when", "unseen"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "Who keeps the mill of Vell?  (question unseen, " in shown
    assert [line.split("  ")[0] for line in shown.splitlines()[3:5]] == ["full cache", "SnapKV 64"]
    assert main([*words[:-1], "0", "--question", "Who?"]) == 2
    assert "headkv compare: budget must be an int of at least 1, got 0" in capsys.readouterr().err


def test_smollm2s_documents_are_in_a_chat():
    _, tokenizer = load_smollm2()
    (sample,) = samples(tokenizer, "ruler_cwe", 1000, limit=1)
    assert sample.context.startswith("<|im_start|>system") and len(sample.expected) == 10
    assert sample.question.startswith("Question: What are the 10 most common words")
    assert sample.question.endswith(
        "<|im_start|>assistant\nAnswer: The top 10 words that appear most often in the list are:"
    )
