"""The retrieval profiler: its questions, its judges, and its scores against eager attention on SmolLM2."""

from __future__ import annotations

import pytest
import torch

from headkv.heads import retrieval
from headkv.heads.retrieval import copy_sample, profile_retrieval, reasoning_sample, word_f1, word_recall
from headkv.models import load_smollm2

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2():
    return load_smollm2()


@pytest.mark.parametrize(
    ("wanted", "text", "recall", "f1"),
    [
        ("Quito", " Quito.", 1.0, 1.0),
        ("Quito", "It is Quito", 1.0, 0.5),
        ("a warm almond cake", "the cake, warm", 0.5, 4 / 7),
        ("a a b", "a", 1 / 3, 0.5),
        ("Quito", "", 0.0, 0.0),
    ],
    ids=["equal", "longer", "part", "repeated", "empty"],
)
def test_judges(wanted: str, text: str, recall: float, f1: float) -> None:
    assert word_recall(wanted, text) == pytest.approx(recall)
    assert word_f1(wanted, text) == pytest.approx(f1)


@pytest.mark.parametrize("seed", range(12))
def test_the_span_holds_what_counts(smollm2, seed: int) -> None:
    tokenizer = smollm2[1]
    for make in (copy_sample, reasoning_sample):
        sample = make(tokenizer, 300, 0.5, seed)
        span = tokenizer.decode(sample.prompt[0, slice(*sample.span)])
        prompt = tokenizer.decode(sample.prompt[0])
        if make is copy_sample:
            assert span.strip() == sample.answer
        else:
            name = prompt.rsplit("the secret city of ", 1)[1].removesuffix(" is")
            assert span.strip() == f"The secret city of {name} is {sample.answer}."
            assert prompt.count("The secret city of") == 2  # the right one and a distractor


def test_copy_scores_equal_those_of_eager_attention(smollm2) -> None:
    model, tokenizer = smollm2
    sample = copy_sample(tokenizer, 300, 0.5, 0)
    scores, written = retrieval._copy(model, tokenizer, sample)
    assert written.strip() == sample.answer
    start, end = sample.span
    text = torch.cat([sample.prompt, sample.prompt[:, start:end]], dim=1)
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            weights = torch.stack(model(text, output_attentions=True).attentions)[:, 0]  # [layers, HQ, n, n]
    finally:
        model.set_attn_implementation("sdpa")
    # The query before each copied token is the one that chose it.
    strongest = weights[:, :, sample.prompt.shape[1] - 1 : -1].argmax(-1)
    hits = (
        (strongest >= start) & (strongest < end) & (text[0][strongest] == text[0, sample.prompt.shape[1] :])
    )
    torch.testing.assert_close(scores, hits.sum(-1) / (end - start))
    assert (scores.flatten().argmax() // 9).item() in (17, 18)


def test_a_model_that_answers_nothing_can_not_be_scored(
    smollm2,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = smollm2
    monkeypatch.setattr(model.generation_config, "eos_token_id", list(range(model.config.vocab_size)))
    with pytest.raises(RuntimeError, match="answered none of 1 questions"):
        profile_retrieval(model, tokenizer, lengths=(200,), depths=(0.5,))
