"""Conversations over several calls: whatever way a cache is kept, the text is that of a RaggedCache passed on by hand."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from generation_cases import METHODS, prompts
from letters import letters
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

import headkv
from headkv.models.tiny import tiny_model

MORE = torch.randint(3, 97, (3, 7), generator=torch.Generator().manual_seed(1))
LENGTH: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
MODEL = headkv.AdaKV(budget=20, scope="model")


def turn(model: Any, text: torch.Tensor, mask: torch.Tensor, cache: Any, **options: Any) -> Any:
    return model.generate(
        text,
        attention_mask=mask,
        past_key_values=cache,
        return_dict_in_generate=True,
        **{**LENGTH, **options},
    )


def chat(
    model: Any, pass_on: Callable[[Any, Any], Any], cache: Any, batch: int = 1, **options: Any
) -> torch.Tensor:
    """Two turns; `pass_on(cache, first answer)` is the cache of the second."""
    inputs = prompts(batch)
    first = turn(model, inputs["input_ids"], inputs["attention_mask"], cache, **options)
    text = torch.cat([first.sequences, MORE[:batch]], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(batch, 6 + 7, dtype=torch.int64)], 1)
    return turn(model, text, mask, pass_on(cache, first), **options).sequences


def written(cache: Any) -> Any:
    """Written to a file and read again."""
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def own(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config)


# how it is kept -> the cache of the first turn, and of the second
WAYS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "a cache of one's own": (own, lambda cache, first: cache),
    "without a configuration": (lambda model: DynamicCache(), lambda cache, first: cache),
    "the one returned": (lambda model: None, lambda cache, first: first.past_key_values),
    "its own, then the returned": (own, lambda cache, first: first.past_key_values),
    "a copy of one's own": (own, lambda cache, first: copy.deepcopy(cache)),
    "a copy of the returned": (own, lambda cache, first: copy.deepcopy(first.past_key_values)),
    "a file": (own, lambda cache, first: written(first.past_key_values)),
    "a file of one's own": (own, lambda cache, first: written(cache)),
}  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3], ids="batch {}".format)
@pytest.mark.parametrize("name", ["FullCache", "AdaKV", "DuoAttention", "RazorAttention"])
@pytest.mark.parametrize("way", WAYS)
def test_two_turns(way: str, name: str, batch: int) -> None:
    """Batch 3 is padded on the left."""
    model, method = tiny_model("llama"), METHODS[name]
    explicit = headkv.RaggedCache.for_model(model, method)
    want = chat(model, lambda cache, first: cache, explicit, batch)
    begin, pass_on = WAYS[way]
    with headkv.compress(model, method) as session:
        got = chat(model, pass_on, begin(model), batch)
    assert torch.equal(got, want)
    assert session.cache.seen == want.shape[1] - 1
    assert torch.equal(session.cache.lengths(), explicit.lengths())
    if name == "FullCache":
        model.set_attn_implementation("eager")
        assert torch.equal(got, chat(model, lambda cache, first: cache, own(model), batch))


# arguments of generate in both turns
OPTIONS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 2},
    "sampling": {"do_sample": True, "top_k": 20},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "more drafts than the window": {"prompt_lookup_num_tokens": 9},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_two_turns_in_other_ways(options: str) -> None:
    """Assisted decoding sends the text from its start in the second turn; transformers' own cache stores it twice."""
    model, method = tiny_model("llama"), METHODS["AdaKV"]
    plain = {} if "drafts" in options or "lookup" in options else OPTIONS[options]
    torch.manual_seed(0)
    want = chat(model, lambda c, first: c, headkv.RaggedCache.for_model(model, method), **plain)
    with headkv.compress(model, method):
        torch.manual_seed(0)
        got = chat(model, lambda c, first: c, own(model), **OPTIONS[options])
    assert torch.equal(got, want)


@pytest.mark.parametrize("method", [METHODS["AdaKV"], MODEL], ids=["layer", "model"])
def test_the_next_block_goes_on(method: Any) -> None:
    """A cache of one's own holds the conversation, not the block."""
    model = tiny_model("llama")
    want = chat(model, lambda c, first: c, headkv.RaggedCache.for_model(model, method))
    cache, inputs = own(model), prompts(1)
    with headkv.compress(model, method):
        first = turn(model, inputs["input_ids"], inputs["attention_mask"], cache)
    assert cache.get_seq_length() == 65
    text = torch.cat([first.sequences, MORE[:1]], 1)
    with headkv.compress(model, headkv.FullCache()) as session:
        second = turn(model, text, torch.ones_like(text), cache)
    assert torch.equal(second.sequences, want)
    assert session.cache.seen == cache.get_seq_length() == want.shape[1] - 1


def test_one_prefix_many_questions() -> None:
    """The documented way to use a prefix again: copies of a cache that has read it."""
    model, method, prefix = tiny_model("llama"), METHODS["AdaKV"], prompts(1)["input_ids"]
    answers = []
    for explicit in (True, False):
        with headkv.compress(model, method):
            cache = headkv.RaggedCache.for_model(model, method) if explicit else own(model)
            with torch.no_grad():
                kept = model(prefix, past_key_values=cache).past_key_values
            questions = [torch.cat([prefix, MORE[b : b + 1]], 1) for b in range(3)]
            answers.append(
                [model.generate(q, past_key_values=copy.deepcopy(kept), **LENGTH) for q in questions]
            )
            assert kept.seen == cache.get_seq_length() == 60
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    fresh = tiny_model("llama")
    with headkv.compress(fresh, method):
        fresh(prefix, past_key_values=(cache := own(fresh)))
        assert torch.equal(fresh.generate(questions[1], past_key_values=cache, **LENGTH), answers[0][1])


def test_a_cache_of_ones_own_is_cropped_and_reset() -> None:
    model, inputs = tiny_model("llama"), prompts(1)
    with headkv.compress(model, METHODS["AdaKV"]) as session:
        cache = own(model)
        model(**inputs, past_key_values=cache)
        want = model(MORE[:1], past_key_values=cache).logits
        cache.crop(-7)
        assert session.cache.seen == cache.get_seq_length() == 60
        assert torch.equal(model(MORE[:1], past_key_values=cache).logits, want)
        cache.reset()
        model(**inputs, past_key_values=cache)
        assert session.cache.seen == 60 and torch.equal(model(MORE[:1], past_key_values=cache).logits, want)


def test_a_pipeline_of_transformers() -> None:
    model, tokenizer = tiny_model("llama"), letters()
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    text, options = (
        "the quick brown fox jumps over the lazy dog " * 2,
        {"max_new_tokens": 5, "do_sample": False},
    )
    want = pipe(text, **options)
    with headkv.compress(model, headkv.FullCache()):
        assert pipe(text, **options) == want
    with headkv.compress(model, headkv.StreamingLLM(budget=9)) as session:
        pipe(text, **options)
    assert int(session.cache.lengths().max()) < session.cache.seen


@pytest.mark.parametrize("positional", [False, True])
def test_a_configuration_without_cache(positional: bool) -> None:
    """`config.use_cache=False`, as after training, is about calls without a cache."""
    model, ids = tiny_model("llama"), prompts(1)["input_ids"]
    model.config.use_cache = False
    with headkv.compress(model, METHODS["AdaKV"]) as session:
        model(ids, None, None, DynamicCache()) if positional else model(ids)
    assert session.cache.seen == 60 and int(session.cache.lengths().float().mean()) <= 30


def test_a_call_without_cache_is_plain() -> None:
    """One forward call that asks for none, as outside the block."""
    model, inputs = tiny_model("llama"), prompts()
    want = model(**inputs, use_cache=False).logits
    with headkv.compress(model, METHODS["AdaKV"]):
        out = model(**inputs, use_cache=False)
    assert torch.equal(out.logits, want) and out.past_key_values is None


class Kept(Cache):
    """A cache of somebody else's kind."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)


def inside(**options: Any) -> None:
    model = tiny_model("llama")
    with headkv.compress(model, METHODS["AdaKV"]):
        model.generate(**prompts(1), max_new_tokens=2, **options)


def offloaded() -> DynamicCache:
    """What `cache_implementation="offloaded"` makes, which takes a GPU."""
    cache = DynamicCache()
    cache.offloading = True
    return cache


def filled(model: Any) -> Any:
    return model(**prompts(1), use_cache=True).past_key_values


def foreign() -> None:
    cache = filled(tiny_model("llama"))
    inside(past_key_values=cache)


def after_the_block(returned: bool) -> None:
    model, cache = tiny_model("llama"), DynamicCache()
    with headkv.compress(model, METHODS["AdaKV"]) as session:
        model(**prompts(1), past_key_values=cache)
    model(MORE[:1], past_key_values=session.cache if returned else cache)


def never_cached() -> None:
    model = tiny_model("llama")
    model.generation_config.use_cache = False
    with headkv.compress(model, METHODS["AdaKV"]):
        model.generate(**prompts(1), max_new_tokens=2)


def explicit_but_not_used() -> None:
    model = tiny_model("llama")
    cache = headkv.RaggedCache.for_model(model, METHODS["AdaKV"])
    model.generate(**prompts(1), past_key_values=cache, max_new_tokens=2, use_cache=False)


def checkpointing() -> None:
    model = tiny_model("llama").train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with headkv.compress(model, METHODS["AdaKV"]):
        model(**prompts(1))


def decoder_forward() -> None:
    model = tiny_model("llama")
    with headkv.compress(model, METHODS["AdaKV"]):
        model.model.forward(prompts(1)["input_ids"])


def another_models() -> None:
    cache = DynamicCache()
    for layers in (3, 2):
        model = tiny_model("llama", num_hidden_layers=layers)
        with headkv.compress(model, METHODS["AdaKV"]):
            model(MORE[:1], past_key_values=cache)


REFUSED: dict[str, tuple[Callable[[], None], type[Exception], str]] = {
    "filled elsewhere": (foreign, ValueError, "past_key_values must be empty or a RaggedCache, got a filled DynamicCache"),
    "of another kind": (lambda: inside(past_key_values=Kept()), ValueError, "past_key_values must be a DynamicCache, a RaggedCache or None, got Kept"),
    "offloaded": (lambda: inside(past_key_values=offloaded()), ValueError, "leave out cache_implementation='offloaded'"),
    "static": (lambda: inside(cache_implementation="static"), ValueError, "static"),
    "none": (lambda: inside(use_cache=False), ValueError, "use_cache must not be False inside headkv.compress"),
    "none, by the model's default": (never_cached, ValueError, "model.generation_config"),
    "none, with one given": (explicit_but_not_used, ValueError, "use_cache must not be False with a RaggedCache"),
    "after the block": (lambda: after_the_block(False), RuntimeError, "use headkv.compress"),
    "the returned after the block": (lambda: after_the_block(True), RuntimeError, "use headkv.compress"),
    "gradient checkpointing": (checkpointing, ValueError, r"call model.eval\(\) first"),
    "the decoder's forward": (decoder_forward, RuntimeError, "call the model itself"),
    "another model's": (another_models, ValueError, "past_key_values must have the model's 2 layers, got 3"),
}  # fmt: skip


@pytest.mark.parametrize("call, error, message", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(call: Callable[[], None], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_copied_model_is_not_in_the_block() -> None:
    model, inputs = tiny_model("llama"), prompts(1)
    want = model.generate(**inputs, **LENGTH)
    with headkv.compress(model, METHODS["StreamingLLM"]) as session:
        model.generate(**inputs, **LENGTH)
        twin, seen = copy.deepcopy(model), session.cache.seen
        assert torch.equal(twin.generate(**inputs, **LENGTH), want)
    assert session.cache.seen == seen and torch.equal(twin.generate(**inputs, **LENGTH), want)
    with headkv.compress(twin, METHODS["StreamingLLM"]) as other:
        twin.generate(**inputs, **LENGTH)
    assert other.cache.seen == seen


def test_no_hook_is_left() -> None:
    """A block's go with it, and those of a RaggedCache with the cache."""
    model = tiny_model("llama")
    with headkv.compress(model, MODEL) as session:
        model(**prompts(1))
    cache = headkv.RaggedCache.for_model(model, MODEL)
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == 2
    del cache
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert session.cache.seen == 60
