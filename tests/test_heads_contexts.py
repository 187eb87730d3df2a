"""Cached contexts: the answers of many configurations at once are those of a dense, masked forward pass."""

from __future__ import annotations

import pytest
import torch

from headkv.data import Needle
from headkv.heads.contexts import Stream, asking, read
from headkv.models import FAMILIES, tiny_model

RANDOM = torch.Generator().manual_seed(0)
CONTEXT = torch.randint(3, 97, (1, 60), generator=RANDOM)
NEEDLES = [
    Needle("words", *(torch.randint(3, 97, (1, n), generator=RANDOM) for n in sizes))
    for sizes in ((9, 3), (5, 1), (7, 6))
]
# The one left out has no head to open or shut.
HYBRIDS = tuple(family for family in FAMILIES if family != "mistral-sliding")
STREAM = Stream(sinks=3, recent_share=0.1)  # of 60 tokens: 3 + 16
HELD = (torch.arange(60) < 3) | (torch.arange(60) >= 44)


def masked_logprobs(model, needle: Needle, gates: torch.Tensor) -> torch.Tensor:
    """The oracle: text, question and answer in one eager pass, with a mask for every head and layer."""
    from headkv.heads.observe import exchanged_attention

    ids = torch.cat([CONTEXT, needle.question_ids, needle.answer_ids], dim=1)
    n, total = CONTEXT.shape[1], ids.shape[1]

    def attend(
        module,
        query,
        key,
        value,
        mask,
        scaling=None,
        sliding_window=None,
        softcap=None,
        s_aux=None,
        **options,
    ):
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        logits = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        back = torch.arange(total)[:, None] - torch.arange(total)
        seen = (back >= 0) & (back < (sliding_window or total))
        seen = seen.expand(query.shape[1], -1, -1).clone()
        if sliding_window is None:
            for head in range(query.shape[1]):
                if gates[module.layer_idx, head // group] == 0:
                    seen[head, n:, :n] = HELD
        logits = logits.masked_fill(~seen, -torch.inf)
        weights = logits.softmax(-1)
        if s_aux is not None:
            weights = weights * torch.sigmoid(logits.logsumexp(-1, keepdim=True) - s_aux[:, None, None])
        return (weights @ value).transpose(1, 2).contiguous(), None

    with exchanged_attention(model, attend), torch.inference_mode():
        logits = model(ids).logits[0].log_softmax(-1)
    a = needle.answer_ids.shape[1]
    return logits[-a - 1 : -1].gather(1, needle.answer_ids[0][:, None])[:, 0]


@pytest.mark.parametrize("family", HYBRIDS)
def test_configurations_equal_a_masked_forward_pass(family: str) -> None:
    model = tiny_model(family)
    gates = torch.rand(5, 3, 2, generator=torch.Generator().manual_seed(1)).round()
    gates[0], gates[1] = 1, 0
    before = model.config._attn_implementation
    context = read(model, CONTEXT)
    with asking(model, STREAM) as asker:
        found = asker.try_all(context, NEEDLES, gates)
    assert model.config._attn_implementation == before
    for q, needle in enumerate(NEEDLES):
        for c in range(5):
            expected = masked_logprobs(model, needle, gates[c])
            row = found.logprobs[q * 5 + c]
            torch.testing.assert_close(row[: len(expected)], expected, atol=1e-4, rtol=1e-4)
            assert not row[len(expected) :].any()


@pytest.mark.parametrize("family", HYBRIDS)
def test_open_gates_are_the_model_as_it_is(family: str) -> None:
    model = tiny_model(family)
    context = read(model, CONTEXT)
    for needle in NEEDLES:
        ids, a = (
            torch.cat([CONTEXT, needle.question_ids, needle.answer_ids], dim=1),
            needle.answer_ids.shape[1],
        )
        with torch.inference_mode():
            logits = model(ids, logits_to_keep=a + 1).logits[0, :-1].log_softmax(-1)
        with asking(model, STREAM) as asker:
            found = asker.try_all(context, [needle], torch.ones(1, 3, 2))
        expected = logits.gather(1, needle.answer_ids[0][:, None])[:, 0]
        torch.testing.assert_close(found.logprobs[0], expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(found.first[0], logits.argmax(-1) == needle.answer_ids[0])
        assert found.right.tolist() == [bool(found.first.all())]


def test_a_batch_is_split_by_memory_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from headkv.heads import contexts

    model = tiny_model("llama")
    gates = torch.rand(7, 3, 2, generator=torch.Generator().manual_seed(1)).round()
    context = read(model, CONTEXT)
    with asking(model, STREAM) as asker:
        whole = asker.try_all(context, NEEDLES, gates)
        rows: list[int] = []
        ask = asker.ask
        monkeypatch.setattr(asker, "ask", lambda c, n, g: (rows.append(len(n)), ask(c, n, g))[1])
        monkeypatch.setattr(contexts, "_CPU_ROOM", 4 * max(asker.row_bytes(context, n) for n in NEEDLES))
        parts = asker.try_all(context, NEEDLES, gates)
        assert rows == [4, 4, 4, 4, 4, 1]
    torch.testing.assert_close(whole.logprobs, parts.logprobs, atol=1e-5, rtol=1e-5)
    assert torch.equal(whole.first, parts.first)


def test_gates_between_mix_the_outputs_and_get_the_gradient() -> None:
    model = tiny_model("qwen3").double()
    context = read(model, CONTEXT)
    gates = torch.full((1, 3, 2), 0.5, dtype=torch.float64, requires_grad=True)
    with asking(model, STREAM) as asker:
        asker.ask(context, NEEDLES[:1], gates).total.sum().backward()
        assert gates.grad is not None and bool((gates.grad != 0).all())
        for layer, head in ((0, 0), (1, 1), (2, 0)):
            nudge = torch.zeros(3, 2, dtype=torch.float64)
            nudge[layer, head] = 2e-3  # norms are float32 inside
            up, down = (
                asker.ask(context, NEEDLES[:1], gates.detach() + sign * nudge).total for sign in (1, -1)
            )
            slope = ((up - down) / 4e-3).item()
            assert gates.grad[0, layer, head].item() == pytest.approx(slope, rel=1e-2, abs=1e-4)


def test_a_text_that_a_streaming_head_keeps_whole_has_nothing_to_open() -> None:
    model = tiny_model("llama")
    context = read(model, CONTEXT[:, :18])
    with asking(model, STREAM) as asker:
        found = asker.try_all(context, NEEDLES, torch.stack([torch.ones(3, 2), torch.zeros(3, 2)]))
    torch.testing.assert_close(found.logprobs[::2], found.logprobs[1::2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sinks": -1}, "sinks must be an int of at least 0, got -1"),
        ({"recent_share": 1.5}, r"recent_share must be a number in \[0, 1\], got 1.5"),
    ],
    ids=["sinks", "share"],
)
def test_the_stream_checks_its_arguments(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stream(**options)
