"""Many methods over one text, answering side by side: each as if it were alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from generation_cases import METHODS, prompts

import headkv
from headkv.evaluation import unseen
from headkv.evaluation.reading import Reading
from headkv.evaluation.remembered import Remembered, RememberedLayers
from headkv.evaluation.unseen import Question, judge, side_by_side
from headkv.models.tiny import tiny_model
from headkv.scorers import KVzipScorer


@dataclass
class Letters:
    """A tokenizer of numbers: enough for answers that are compared as text."""

    eos_token_id: int = 2

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(f"<{i}>" for i in ids)


def alone(model, context, question, method):
    """Compress the text, then ask: one method, one question, a cache of its own."""
    cache = headkv.RaggedCache.for_model(model, method, rollback=0)
    with torch.no_grad():
        model(context, past_key_values=cache)
        tokens, written = question.ids, []
        for _ in range(question.max_new_tokens):
            tokens = model(tokens, past_key_values=cache).logits[:, -1:].argmax(-1)
            written.append(int(tokens))
    share = float(cache.lengths().double().mean())
    return Letters().decode(written[: written.index(2)] if 2 in written else written), share


def test_side_by_side_is_as_if_alone():
    model, context = tiny_model("llama"), prompts(1)["input_ids"]
    scorer = KVzipScorer((5, 6), chunk=20, window=5)
    methods = {
        name: METHODS[name]
        for name in ("AdaKV", "PyramidKV", "DuoAttention", "RazorAttention", "StreamingLLM")
    }
    methods |= {
        "KVzip": headkv.KVzip(20, scorer),
        "AdaKV, model": headkv.AdaKV(20, METHODS["AdaKV"].scorer, scope="model"),
    }
    questions = [Question(torch.tensor([ids]), ("<7>", "<11>"), 9) for ids in ([5, 9, 4], [8, 8])]
    before = model.config._attn_implementation
    verdicts = judge(model, Letters(), context, questions, methods)
    assert model.config._attn_implementation == before
    for question, row in zip(questions, verdicts, strict=True):
        for verdict, method in zip(row, (headkv.FullCache(), *methods.values()), strict=True):
            text, stored = alone(model, context, question, method)
            assert verdict.text == text, verdict.method
            assert verdict.stored_share * 60 == pytest.approx(
                stored - len(question.ids[0]) - 8, abs=1
            ) or verdict.method in ("DuoAttention", "RazorAttention", "StreamingLLM")
            assert verdict.found == sum(a in text for a in ("<7>", "<11>")) / 2
    assert [v.method for v in verdicts[0]] == ["full", *methods]
    assert verdicts[0][0].stored_share == 1 and verdicts[0][1].nbytes < verdicts[0][0].nbytes


@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_each_is_as_large_as_alone(family):
    """Stored entries, and bytes as the allocator has them for a cache of the method's own."""
    model, context = tiny_model(family), prompts(1)["input_ids"]
    reading = Reading(model, context)
    # Profiles of these cases are of three layers with attention; the hybrid has fewer.
    fit = [m for m in METHODS.values() if family == "llama" or not getattr(m, "profiles", ())]
    methods = [headkv.FullCache(), *fit]
    together = side_by_side(reading, methods)
    for i, method in enumerate(methods):
        cache = reading.compressed(method)
        assert together.sizes[i] == cache.nbytes, method
        assert torch.equal(together.cache.lengths()[:, i], cache.lengths()[:, 0]), method
        share = float(cache.lengths().double().mean()) / reading.cache.seen
        assert together.shares[i] == pytest.approx(share), method


def test_a_text_is_read_again_once(monkeypatch):
    model, context, calls = tiny_model("llama"), prompts(1)["input_ids"], []
    score = KVzipScorer.score_prompt
    monkeypatch.setattr(
        KVzipScorer, "score_prompt", lambda self, prompt: calls.append(1) or score(self, prompt)
    )
    shared = Remembered(KVzipScorer(window=5))
    methods = {str(budget): headkv.ScoredMethod(budget, shared, scope="model") for budget in (10, 20, 30)}
    for _ in range(2):
        verdicts = judge(model, Letters(), context, [Question(torch.tensor([[5]]), ("x",), 2)], methods)
    assert len(calls) == 2 and [v.stored_share for v in verdicts[0]] == pytest.approx(
        [1, 10 / 60, 20 / 60, 30 / 60]
    )


def test_a_layer_is_scored_once(monkeypatch):
    """However many methods ask; and what they keep is what each would keep alone."""
    reading, calls = Reading(tiny_model("llama"), prompts(1)["input_ids"]), []
    plain = headkv.SnapKVScorer(window=4, kernel_size=3)
    alone = [[keep.mask for keep in reading.plan(headkv.AdaKV(n, plain))] for n in (10, 20)]
    score = headkv.SnapKVScorer.score
    monkeypatch.setattr(
        headkv.SnapKVScorer, "score", lambda self, prefill: calls.append(1) or score(self, prefill)
    )
    shared = RememberedLayers(plain)
    heads = headkv.HeadProfile("letters", "ablation", "kv", torch.ones(3, 2))
    for make in (headkv.AdaKV, lambda n, scorer: headkv.HeadKV(n, heads, scorer=scorer)):
        assert repr(make(10, shared)) == repr(make(10, plain))
    for number, n in enumerate((10, 20)):
        masks = [keep.mask for keep in reading.plan(headkv.AdaKV(n, shared))]
        assert all(map(torch.equal, masks, alone[number]))
    reading.plan(headkv.SnapKV(10, shared))
    assert len(calls) == len(reading.layers)
    del reading
    assert not shared._known


@pytest.mark.gpu
def test_recorded_steps_answer_as_others_do(monkeypatch):
    model, context = tiny_model("llama").cuda(), prompts(1)["input_ids"]
    methods = {name: METHODS[name] for name in ("AdaKV", "DuoAttention", "RazorAttention")}
    question, found = Question(torch.tensor([[5, 9, 4]]), ("x",), 24), []
    for worth in (1, 1000):
        monkeypatch.setattr(unseen, "WORTH_RECORDING", worth)
        found.append([v.text for v in judge(model, Letters(), context, [question], methods)[0]])
    assert found[0] == found[1]


def test_rulers_measure():
    question = Question(torch.tensor([[1]]), ("Quito", "Malta"))
    assert [question.found_in(text) for text in ("in quito.", "Malta, Quito", "")] == [0.5, 1.0, 0.0]


def test_layers_that_do_not_fit_are_not_joined():
    a, b = (headkv.RaggedLayer.from_dense(*torch.ones(2, 1, 2, n, 4)) for n in (5, 6))
    for layers in ([], [a, b]):
        with pytest.raises(ValueError, match="layers must be alike"):
            headkv.RaggedLayer.join(layers)
    joined = headkv.RaggedLayer.join(
        [a, headkv.RaggedLayer.from_dense(*torch.zeros(2, 1, 2, 5, 4), headroom=0)]
    )
    joined.append(*torch.full((2, 2, 2, 1, 4), 3.0))
    assert joined.lengths().tolist() == [[6, 6]] * 2
    assert [joined.row(b, 1).keys[:, 0].tolist() for b in (0, 1)] == [[1.0] * 5 + [3.0], [0.0] * 5 + [3.0]]
