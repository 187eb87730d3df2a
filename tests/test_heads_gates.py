"""The gates' training: the mixed attention, its gradient, and that it finds the one head that matters."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from headkv.heads.gates import Mixer, frozen, passkey_text, profile_gates, schedule, windowed
from headkv.heads.observe import exchanged_attention
from headkv.models import load_smollm2, tiny_model

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3")
TEXT = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(0))
ROWS = {0: 0, 1: 1, 2: 2}  # every layer attends


def mixed(model: nn.Module, mixer: Mixer) -> torch.Tensor:
    with exchanged_attention(model, mixer.attend):
        with torch.no_grad():
            model(TEXT, use_cache=False)
        with mixer.mixing():
            return model(TEXT, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_leave_the_model_as_it_is(family: str) -> None:
    model = tiny_model(family)
    gates = nn.Parameter(torch.ones(3, 2))
    torch.testing.assert_close(
        mixed(model, Mixer(gates, 2, 5, ROWS)), model(TEXT).logits, atol=1e-4, rtol=1e-4
    )


def near_or_first(length: int, sinks: int, recent: int) -> torch.Tensor:
    back = torch.arange(length)[:, None] - torch.arange(length)
    return (back >= 0) & ((back < recent) | (torch.arange(length) < sinks))


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_gates_are_windowed_attention(family: str) -> None:
    model = tiny_model(family)
    bias = torch.zeros(1, 1, 40, 40).masked_fill(~near_or_first(40, 2, 5), torch.finfo(torch.float32).min)
    expected = model(TEXT, attention_mask=bias).logits
    found = mixed(model, Mixer(nn.Parameter(torch.zeros(3, 2)), 2, 5, ROWS))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("length", "sinks", "recent"),
    [(1, 0, 1), (40, 0, 1), (40, 3, 1), (40, 0, 7), (40, 2, 5), (41, 16, 8), (5, 8, 8), (63, 1, 64)],
)
def test_blocks_of_queries_are_windowed_attention(length: int, sinks: int, recent: int) -> None:
    source = torch.Generator().manual_seed(0)
    states = [
        torch.randn(1, 3, length, 8, generator=source, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    ]
    mask = near_or_first(length, sinks, recent)
    expected = nn.functional.scaled_dot_product_attention(*states, attn_mask=mask, scale=0.3)
    found = windowed(*states, sinks, recent, 0.3)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(expected.shape, generator=source, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), states),
        torch.autograd.grad((expected * weights).sum(), states),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_the_gradient_reaches_every_gate() -> None:
    model = tiny_model("llama", num_hidden_layers=2).double()
    gates = nn.Parameter(torch.full((2, 2), 0.5, dtype=torch.float64))
    with frozen(model):
        mixed(model, Mixer(gates, 2, 5, ROWS)).square().mean().backward()
    analytic = gates.grad
    assert analytic is not None and all(weight.grad is None for weight in model.parameters())
    assert all(weight.requires_grad for weight in model.parameters())
    step = 0.01
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        losses = []
        for sign in (1, -1):
            moved = gates.detach().clone()
            moved[place] += sign * step
            losses.append(mixed(model, Mixer(nn.Parameter(moved), 2, 5, ROWS)).square().mean().item())
        assert analytic[place].item() == pytest.approx(
            (losses[0] - losses[1]) / (2 * step), rel=0.01, abs=2e-4
        )


@pytest.mark.parametrize("family", ["mistral-sliding", "gemma2", "gemma3", "gpt_oss"])
def test_models_whose_attention_has_more_to_it_are_refused(family: str) -> None:
    model = tiny_model(family, **({"layer_types": ["full_attention"] * 3} if family == "gpt_oss" else {}))
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="neither sliding-window layers nor soft caps nor sinks"):
        mixed(model, Mixer(nn.Parameter(torch.ones(3, 2)), 2, 5, ROWS))
    assert model.config._attn_implementation == before


def test_the_learning_rate_rises_and_falls() -> None:
    factors = [schedule(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[19] == factors[50] == factors[80] == 1.0
    assert factors[-1] == pytest.approx(0.1) and min(factors) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an int of at least 1, got 0"),
        ({"passkeys": 11}, r"passkeys must be an int in \[1, 10\], got 11"),
        ({"recent": 0}, "recent must be an int of at least 1, got 0"),
        ({"lengths": (80, 600)}, "over sinks [+] recent = 80, got [(]80, 600[)]"),
        ({"lengths": (600, 400)}, "got [(]600, 400[)]"),
        ({"lengths": (600, 700, 800)}, "lengths must be [(]least, greatest[)].* got [(]600, 700, 800[)]"),
        ({"words": 0}, "words must be an int of at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be a number of at least 0, got -1.0"),
        ({"penalty": -1.0}, "penalty must be a number of at least 0, got -1.0"),
    ],
    ids=["steps", "passkeys", "recent", "short", "order", "three", "words", "rate", "penalty"],
)
def test_the_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile_gates(tiny_model("llama"), None, **options)


@pytest.mark.slow
def test_passkeys_are_hidden_and_asked_for() -> None:
    _, tokenizer = load_smollm2()
    text, answers = passkey_text(tokenizer, 400, 3, 5, random.Random(0))
    asked = tokenizer.decode(text[0, answers])
    context = tokenizer.decode(text[0, : answers[0]])
    keys = [line.split(": ")[1] for line in asked.split("\n\n")]
    assert len(keys) == 3 and all(len(key.split()) == 5 and f": {key}" in context for key in keys)
    assert answers.tolist() == list(range(int(answers[0]), text.shape[1]))


@pytest.mark.slow
def test_two_steps_on_smollm2_move_the_gates_and_nothing_else() -> None:
    model, tokenizer = load_smollm2()
    before = model.get_input_embeddings().weight.sum().item()
    profile = profile_gates(model, tokenizer, steps=2, lengths=(260, 280), passkeys=2, words=4)
    assert (profile.kind, profile.heads, tuple(profile.scores.shape)) == ("gate", "kv", (30, 3))
    assert 0.9 < profile.scores.min() < profile.scores.mean() < 1.0
    assert model.get_input_embeddings().weight.sum().item() == before
    profile.check_model(model)
