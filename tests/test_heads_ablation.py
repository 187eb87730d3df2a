"""Ablation and gates on cached contexts: against plain loops, on a model with one planted head, killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from letters import letters
from planted import PLANTED, planted_model, planted_text

from headkv.data import Needle, NeedleText
from headkv.heads import ablation
from headkv.heads.ablation import FLOOR, ablate, hold, profile_ablation, worth
from headkv.heads.cached_gates import learn_gates, profile_cached_gates, rate
from headkv.heads.choice import add_heads, gates_of
from headkv.heads.contexts import Stream, asking, read
from headkv.heads.gates import frozen
from headkv.heads.journal import Journal
from headkv.models import tiny_model

STREAM = Stream(sinks=2, recent_share=0.1)


def known_text(model, seed: int, length: int = 60) -> NeedleText:
    """A text about which a random model is always right: the answer is what it writes; a second one is wrong."""
    source = torch.Generator().manual_seed(seed)
    context, question = (torch.randint(3, 97, (1, n), generator=source) for n in (length, 4))
    written = question
    for _ in range(2):
        token = model(torch.cat([context, written], dim=1)).logits[:, -1].argmax(-1, keepdim=True)
        written = torch.cat([written, token], dim=1)
    answer = written[:, 4:]
    return NeedleText(
        context, (Needle("words", question, answer), Needle("numbers", question, (answer + 1) % 97))
    )


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_a_score_is_the_drop_when_this_head_alone_streams(family: str) -> None:
    model = tiny_model(family)
    texts = [known_text(model, seed) for seed in range(3)]
    scores, found = ablate(model, texts, STREAM)
    expected = torch.zeros(3, 2)
    for text in texts:
        context = read(model, text.context_ids)
        with asking(model, STREAM) as asker:
            full = asker.ask(context, text.needles[:1], torch.ones(1, 3, 2)).total
            for layer in range(3):
                for head in range(2):
                    gates = torch.ones(1, 3, 2)
                    gates[0, layer, head] = 0
                    alone = asker.ask(context, text.needles[:1], gates).total
                    expected[layer, head] += (full.clamp_min(FLOOR) - alone.clamp_min(FLOOR)).item() / 3
    torch.testing.assert_close(scores, expected.clamp_min(0), atol=1e-4, rtol=1e-4)
    assert found == {"samples": {"words": 3, "numbers": 3}, "samples_counted": {"words": 3}}
    if family == "gemma3":
        assert not scores[:2].any() and scores[2].any(), "sliding layers score 0"


def test_a_model_whose_layers_all_slide_has_no_heads_to_score() -> None:
    model = tiny_model("mistral-sliding")
    text = known_text(model, 0)
    with pytest.raises(ValueError, match="model must have a layer without a sliding window, got 3 with one"):
        ablate(model, [text], STREAM)
    with pytest.raises(ValueError, match="model must have a layer without a sliding window"):
        hold(model, [text], STREAM)


def test_the_planted_head_is_found() -> None:
    model = planted_model()
    texts = [planted_text(seed) for seed in range(6)]
    scores, _ = ablate(model, texts, STREAM)
    assert scores[PLANTED] > 4 and scores.sum() - scores[PLANTED] < 1e-3
    scores, found = ablate(model, texts, STREAM, greedy=2)
    assert found["order"][0][:2] == list(PLANTED)
    assert scores[PLANTED] == 2 and (scores > 1).sum() == 2 and scores.min() >= 0
    held = hold(model, texts, STREAM)
    with frozen(model), asking(model, STREAM) as asker:
        gates, log = learn_gates(asker, held, [0.2, 0.5], steps=120, learning_rate=0.05, judged=held)
    assert all(weight.requires_grad for weight in model.parameters())
    for gate, entry in zip(gates, log[-2:], strict=True):
        assert gate[PLANTED] > 0.5 and gate.sum() - gate[PLANTED] < 1e-3
        assert (entry["heads"], entry["right"], entry["of"]) == (1, 6, 6)
        assert entry["mean_gate"] == pytest.approx(gate.mean().item(), abs=1e-4)
    assert len(log) == 20 and log[-1]["step"] == 120 and log[-1]["loss"] < 1


def test_gates_of_several_penalties_are_those_of_each_alone() -> None:
    model = planted_model()
    held = hold(model, [planted_text(seed) for seed in range(3)], STREAM)
    with frozen(model), asking(model, STREAM) as asker:
        both, log = learn_gates(asker, held, [0.5, 2.0], steps=12)
        for number, penalty in enumerate((0.5, 2.0)):
            alone, entries = learn_gates(asker, held, [penalty], steps=12)
            torch.testing.assert_close(both[number], alone[0], atol=1e-5, rtol=1e-4)
            assert [e["step"] for e in entries] == [e["step"] for e in log[number::2]]


def test_the_worth_of_a_set_is_the_mean_answer_and_no_answer_falls_below_the_floor() -> None:
    model = planted_model()
    held = hold(model, [planted_text(seed) for seed in range(4)], STREAM)
    with asking(model, STREAM) as asker:
        value = worth(asker, held)(gates_of([[PLANTED], []], asker.shape))
        totals = [asker.ask(text.context, text.needles, torch.zeros(1, 2, 2)).total.item() for text in held]
    assert value[1].item() == pytest.approx(sum(max(total, FLOOR) for total in totals) / 4, abs=1e-4)
    assert value[0] > -0.1 > value[1]


HEADS = [(layer, head) for layer in range(3) for head in range(2)]


def pairwise(gates: torch.Tensor) -> torch.Tensor:
    """(0, 0) and (2, 1) are worth 3 together and nothing alone; (1, 0) is worth 1, and others a little."""
    flat = gates.flatten(1)
    return 3 * flat[:, 0] * flat[:, 5] + flat[:, 2] + 0.1 * flat[:, 1] + 0.01 * flat[:, 3]


def test_heads_are_added_as_they_are_worth_together() -> None:
    order = list(add_heads(pairwise, (3, 2), HEADS, 3))
    assert [head for head, _ in order] == [(1, 0), (0, 1), (1, 1)]
    assert [value for _, value in order] == pytest.approx([1, 1.1, 1.11])
    assert [head for head, _ in add_heads(pairwise, (3, 2), HEADS, 3, [(0, 0)])] == [(2, 1), (1, 0)]


@pytest.mark.parametrize("killed_after", [1, 3, 5])
def test_a_killed_run_goes_on(killed_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after so many pieces (of three texts and two choices), half a line left behind: the same scores."""
    model = planted_model()
    texts = [planted_text(seed) for seed in range(3)]
    expected, found = ablate(model, texts, STREAM, greedy=2)
    path = tmp_path / "notes"
    add = Journal.add

    def add_or_die(journal: Journal, piece: dict[str, object]) -> None:
        if len(journal.pieces) == killed_after:
            raise KeyboardInterrupt
        add(journal, piece)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "add", add_or_die)
        if killed_after == 5:
            ablate(model, texts, STREAM, greedy=3, journal=Journal(path, {"a": 1}))
        else:
            ablate(model, texts, STREAM, greedy=2, journal=Journal(path, {"a": 1}))
    with path.open("a") as file:
        file.write('{"drops": [[0.1')
    read_again: list[int] = []
    real = ablation._leave_one_out
    monkeypatch.setattr(ablation, "_leave_one_out", lambda *a: (read_again.append(1), real(*a))[1])
    scores, again = ablate(model, texts, STREAM, greedy=2, journal=Journal(path, {"a": 1}))
    assert len(read_again) == max(0, 3 - killed_after)
    torch.testing.assert_close(scores, expected)
    assert again == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 2}\n', "is what another run has left; remove it, or write to another file"),
        ("", "is what another run has left"),
        ('{"a": 1}\n{"x": \n', "is no journal"),
    ],
    ids=["another", "empty", "broken"],
)
def test_a_journal_of_another_run_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "heads.json.partial"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        Journal(path, {"a": 1})
    assert str(path) in str(caught.value)


def test_a_model_that_answers_nothing_can_not_be_scored() -> None:
    model = planted_model()
    text = planted_text(0)
    wrong = NeedleText(
        text.context_ids, (Needle("words", text.needles[0].question_ids, torch.tensor([[4]])),)
    )
    with pytest.raises(RuntimeError, match="the model answered none of 1 questions"):
        ablate(model, [wrong], STREAM)
    tiny = tiny_model("llama", max_position_embeddings=2048)
    with pytest.raises(RuntimeError, match="the model answered none of 2 questions"):
        profile_cached_gates(tiny, letters(), kinds=("words",), lengths=(700,), texts=1, each=2)


@pytest.mark.parametrize(
    ("profiler", "options", "message"),
    [
        (profile_ablation, {"greedy": -1}, "greedy must be an int of at least 0, got -1"),
        (profile_ablation, {"kinds": ("poems",)}, "kinds must be of words, numbers, .*, got 'poems'"),
        (profile_ablation, {"texts": 0}, "texts must be an int of at least 1, got 0"),
        (profile_ablation, {"recent_share": 2.0}, r"recent_share must be a number in \[0, 1\], got 2.0"),
        (profile_cached_gates, {"steps": 0}, "steps must be an int of at least 1, got 0"),
        (profile_cached_gates, {"penalties": ()}, "penalties must hold at least one number, got none"),
        (profile_cached_gates, {"penalties": (-1.0,)}, "penalties must be a number of at least 0, got -1.0"),
        (profile_cached_gates, {"learning_rate": -1.0}, "learning_rate must be a number of at least 0"),
        (profile_cached_gates, {"validation": -1}, "validation must be an int of at least 0, got -1"),
    ],
    ids=["greedy", "kinds", "texts", "share", "steps", "no-penalty", "penalty", "rate", "validation"],
)
def test_the_options_are_checked(profiler, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profiler(tiny_model("llama"), letters(), **{"lengths": (700,), "texts": 1, **options})


def test_the_rate_rises_and_falls() -> None:
    rates = [rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == rates[66] == 1
    assert (
        rates[-1] == pytest.approx(0.03)
        and rates == sorted(rates[:5]) + rates[5:67] + sorted(rates[67:])[::-1]
    )


@pytest.mark.slow
def test_smollm2_says_which_head_it_needs(tmp_path: Path) -> None:
    """The command as it stands, on one short text; the strongest head is (18, 2)."""
    from headkv.evaluation.profiling import run_profile
    from headkv.heads import HeadProfile

    out = tmp_path / "heads.json"
    options = {"lengths": (200,), "texts": 1, "kinds": ("numbers",)}
    profile = run_profile("ablation", out=out, progress=False, **options)
    assert divmod(int(profile.scores.argmax()), 3) == (18, 2) and profile.scores.min() == 0
    assert profile.parameters["samples"] == profile.parameters["samples_counted"] == {"numbers": 1}
    assert torch.equal(HeadProfile.load(out).scores, profile.scores)
    assert [path.name for path in tmp_path.iterdir()] == ["heads.json"], "the notes are gone"
    assert json.loads(out.read_text())["parameters"]["greedy"] == 0
