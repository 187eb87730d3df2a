"""What is done with any loaded model: its attention is chosen and put back, it decodes, its chat has a frame."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from seeing import seeing_model

import headkv
from headkv.data.chat import chat_frame
from headkv.evaluation.reading import Reading
from headkv.heads.observe import observe
from headkv.models.attention import choose_attention, chosen_attention, decoder_attention, kept_attention
from headkv.models.decoding import end_tokens, greedy
from headkv.models.tiny import FAMILIES, tiny_model

IDS = torch.randint(3, 90, (1, 24), generator=torch.Generator().manual_seed(0))


def seeing() -> Any:
    """Gemma 3 with a vision tower, its parts loaded with different attention."""
    text = dict(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    model = seeing_model(text)
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    return model


def parts(model: Any) -> tuple[str, ...]:
    c = model.config
    return tuple(
        x._attn_implementation for x in (c, getattr(c, "text_config", c), getattr(c, "vision_config", c))
    )


def no_pass(model: Any) -> None:
    with headkv.compress(model, headkv.AdaKV(0.5)):
        assert parts(model)[1:] == ("headkv", "sdpa"), "the vision tower keeps its own"


def fails_inside(model: Any) -> None:
    with pytest.raises(KeyError), headkv.compress(model, headkv.AdaKV(0.5)):
        raise KeyError


def refused(model: Any) -> None:
    with pytest.raises(ValueError, match="backend must be one of"):
        headkv.compress(model, headkv.AdaKV(0.5), backend="abacus").__enter__()  # type: ignore[arg-type]


def observed(model: Any) -> None:
    seen: list[int] = []
    with observe(
        model.language_model if hasattr(model, "language_model") else model,
        lambda a: seen.append(a.layer_idx),
    ):
        pass


def chosen(model: Any) -> None:
    with chosen_attention(model, "flex_attention"):
        assert parts(model)[1:] == ("flex_attention", "sdpa")


def anything(model: Any) -> None:
    with kept_attention(model):
        model.set_attn_implementation("eager")
        assert parts(model) == ("eager", "eager", "eager")


BLOCKS: list[Callable[[Any], None]] = [no_pass, fails_inside, refused, observed, chosen, anything]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_every_part_has_its_own_attention_back(block: Callable[[Any], None]) -> None:
    model = seeing()
    before = parts(model)
    assert before[1:] == ("eager", "sdpa")
    block(model)
    assert parts(model) == before


@pytest.mark.parametrize(
    ("family", "own"),
    [
        (f, own)
        for f in FAMILIES
        for own in ("sdpa", "eager")
        # These have no sdpa in transformers.
        if own == "eager" or f not in ("gemma2", "gpt_oss")
    ],
)
def test_a_plain_model_has_its_attention_back(family: str, own: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation(own)
    want = model(IDS).logits
    with headkv.compress(model, headkv.FullCache()):
        assert decoder_attention(model) == model.config._attn_implementation == "headkv"
        model(IDS)
    assert model.config._attn_implementation == own and torch.equal(model(IDS).logits, want)
    if "gemma" not in family and "sliding" not in family and family != "gpt_oss":
        Reading(model, IDS).answer(headkv.SnapKV(8, headkv.SnapKVScorer(4)), 2)
        assert model.config._attn_implementation == own


def test_the_attention_that_was_chosen_runs() -> None:
    model = seeing()
    with observe(model, lambda attention: seen.append(attention.layer_idx)):
        seen: list[int] = []
        model.language_model(IDS) if hasattr(model, "language_model") else model(IDS)
    assert seen == [0, 1, 2]
    choose_attention(model, "sdpa")
    assert parts(model) == ("sdpa", "sdpa", "sdpa")


# Decoding


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral-sliding"])
def test_greedy_is_what_generate_does(family: str) -> None:
    model = tiny_model(family)
    want = model.generate(IDS, max_new_tokens=12, min_new_tokens=12, do_sample=False)[
        0, IDS.shape[1] :
    ].tolist()
    cache = model(IDS[:, :-1], use_cache=True).past_key_values
    assert list(greedy(model, IDS[:, -1:], cache, 12)) == want
    assert cache.get_seq_length() == IDS.shape[1] + 11, "the last token has not been read"
    fresh = model(IDS[:, :5], use_cache=True).past_key_values
    assert list(greedy(model, IDS[:, 5:], fresh, 12)) == want, "several tokens at once"


def test_greedy_stops_behind_an_end() -> None:
    model = tiny_model("llama")
    cache = lambda: model(IDS[:, :-1], use_cache=True).past_key_values  # noqa: E731
    written = list(greedy(model, IDS[:, -1:], cache(), 12))
    end = written[3]
    assert list(greedy(model, IDS[:, -1:], cache(), 12, ends={end})) == written[: written.index(end) + 1]
    assert list(greedy(model, IDS[:, -1:], cache(), 0)) == []
    tokens = greedy(model, IDS[:, -1:], cache(), 2)
    next(tokens)
    assert torch.is_grad_enabled(), "what the loop turns off is on again between two tokens"


@pytest.mark.parametrize("said, ends", [(2, {2}), ([2, 5], {2, 5}), (None, set())], ids=str)
def test_end_tokens(said: Any, ends: set[int]) -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = said
    assert end_tokens(model) == ends


# Chats


class Tokenizer(SimpleNamespace):
    """As much of a tokenizer as a chat's frame asks for; templates are Python's in place of Jinja's."""

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        assert options == {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        return str(self.chat_template.replace("CONTENT", messages[0]["content"]))


@pytest.mark.parametrize(
    ("template", "bos", "frame"),
    [
        ("<user>CONTENT<end><assistant>", "<s>", ("<user>", "<end><assistant>")),
        ("CONTENT", "<s>", ("", "")),
        ("<a>CONTENT<b>CONTENT<c>", "<s>", ("<a>", "<b>{message}<c>")),
        (None, "<s>", ("<s>", "\n")),
        (None, None, ("", "\n")),
    ],
    ids=["chat", "bare", "twice", "no template", "no first token"],
)
def test_chat_frame(template: str | None, bos: str | None, frame: tuple[str, str]) -> None:
    assert chat_frame(Tokenizer(chat_template=template, bos_token=bos)) == frame  # type: ignore[arg-type]


def test_a_template_that_drops_the_message_is_named() -> None:
    with pytest.raises(
        ValueError, match="tokenizer must have a chat template that repeats the message, got '<user>'"
    ):
        chat_frame(Tokenizer(chat_template="<user>", bos_token=None))  # type: ignore[arg-type]


def test_a_copy_of_a_configuration_is_put_back_too() -> None:
    """A part whose configuration is a copy, not the same object, has its own attention."""
    model = tiny_model("llama")
    model.model.config = copy.deepcopy(model.config)
    model.model.config._attn_implementation = "eager"
    with kept_attention(model):
        model.set_attn_implementation("sdpa")
    assert (model.config._attn_implementation, model.model.config._attn_implementation) == ("sdpa", "eager")
