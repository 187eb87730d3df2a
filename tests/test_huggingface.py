"""Any Hugging Face decoder, unpatched: every way to generate, without compression and with, against an oracle."""

from __future__ import annotations

import pytest
import torch
import transformers
from generation_cases import KV_HEADS, LAYERS, METHODS, RAZOR, Collect, prompts
from masked_oracle import oracle_cache
from packaging.version import Version

import headkv
from headkv.heads import HeadProfile
from headkv.models.tiny import FAMILIES, tiny_model

OLD = Version(transformers.__version__) < Version("5.17")

# name -> (batch, arguments of generate)
WAYS = {
    "greedy": (3, {}),
    "sampling": (3, {"do_sample": True, "top_k": 20, "temperature": 1.5}),
    "beam search": (3, {"num_beams": 3}),
    "beam sampling": (2, {"num_beams": 2, "do_sample": True, "num_return_sequences": 2}),
    "prompt lookup": (1, {"prompt_lookup_num_tokens": 3}),
    "assistant": (1, {"assistant_model": None}),
    "streamer": (1, {"streamer": None}),
    "chunked prefill": (3, {"prefill_chunk_size": 9}),
}


DRAFTS = {"prompt_lookup_num_tokens", "assistant_model"}


def generate(model, way, cache=None, drafts=True):
    """One seeded generation: the tokens and each step's logits; the same without drafts, which must change nothing."""
    batch, arguments = WAYS[way]
    arguments = {name: value for name, value in arguments.items() if drafts or name not in DRAFTS}
    if "assistant_model" in arguments:
        arguments["assistant_model"] = tiny_model("llama", seed=3)
    if "streamer" in arguments:
        arguments["streamer"] = Collect()
    torch.manual_seed(11)
    out = model.generate(
        **prompts(batch),
        **arguments,
        past_key_values=cache,
        max_new_tokens=14,
        eos_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **({} if "do_sample" in arguments else {"do_sample": False}),
    )
    if "streamer" in arguments:
        assert arguments["streamer"].tokens == [*out.sequences[0].tolist(), -1]
    return out.sequences, torch.stack(out.logits), out.past_key_values


def chunks(way: str) -> bool:
    return "prefill_chunk_size" in WAYS[way][1]


def compressed_as_masked(model, method, way="greedy", **options):
    """Check that every step's logits are those of a full cache whose mask hides exactly what each head evicted.

    Returns the compressed cache."""
    tokens, logits, _ = generate(model, way, oracle_cache(model, method, chunks(way)), drafts=False)
    with headkv.compress(model, method, chunked_prefill=chunks(way), headroom=3, **options) as session:
        got_tokens, got_logits, _ = generate(model, way)
    assert torch.equal(got_tokens, tokens)
    torch.testing.assert_close(got_logits, logits, rtol=1e-4, atol=1e-4)
    return session.cache


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_without_compression_is_eager(family):
    model = tiny_model(family)
    inputs = prompts()
    model.set_attn_implementation("eager")
    want = model(**inputs).logits
    with headkv.compress(model, headkv.FullCache()):
        got = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_compression_equals_eager(family, way):
    """Same tokens, same logits as transformers' own cache and eager attention."""
    model = tiny_model(family)
    assisted = way in ("assistant", "prompt lookup")
    if assisted and OLD and family in ("mistral-sliding", "gemma2", "gemma3"):
        pytest.skip(f"transformers {transformers.__version__} cannot crop its own sliding-window cache")
    model.set_attn_implementation("eager")
    tokens, logits, _ = generate(model, way)
    with headkv.compress(model, headkv.FullCache(), chunked_prefill=chunks(way)) as session:
        got_tokens, got_logits, cache = generate(model, way)
    assert torch.equal(got_tokens, tokens)
    torch.testing.assert_close(got_logits, logits, rtol=1e-4, atol=1e-4)
    assert cache is session.cache and isinstance(cache, headkv.RaggedCache)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_compressed_equals_masked_full_cache(method, way):
    cache = compressed_as_masked(tiny_model("llama"), METHODS[method], way, rollback=9)
    assert method == "FullCache" or int(cache.lengths().min()) < cache.seen


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_families(family, method):
    compressed_as_masked(tiny_model(family), METHODS[method], rollback=0)


@pytest.mark.parametrize("backend", ["reference", "rust"])
@pytest.mark.parametrize("method", ["AdaKV", "DuoAttention", "RazorAttention"])
def test_second_turn(method, backend):
    """A second user turn on the same cache, itself padded in the middle of the text, and what is generated after it."""
    model, chosen = tiny_model("llama"), METHODS[method]
    inputs = prompts()
    turn = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(8))
    turn_mask = torch.ones_like(turn)
    turn_mask[1, :4] = 0
    caches = [oracle_cache(model, chosen)]
    logits = []
    for way in ("oracle", "headkv"):
        if way == "headkv":
            caches.append(headkv.RaggedCache.for_model(model, chosen, backend=backend, headroom=2))
        cache = caches[-1]
        first = model.generate(
            **inputs, past_key_values=cache, max_new_tokens=5, do_sample=False, eos_token_id=None
        )
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 5, dtype=torch.long), turn_mask], 1)
        out = model.generate(
            input_ids=torch.cat([first, turn], 1),
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits.append(torch.stack(out.logits))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


def test_one_context_many_questions():
    """snapshot and restore: each question is answered as if it were the only one."""
    model = tiny_model("qwen3")
    inputs = prompts(1)
    cache = headkv.RaggedCache.for_model(model, METHODS["DuoAttention"])
    model(**inputs, past_key_values=cache)
    saved = cache.snapshot()
    questions = torch.randint(3, 97, (3, 4), generator=torch.Generator().manual_seed(9))
    answers = []
    for order in ((0, 1, 2), (2, 0, 1)):
        for q in order:
            cache.restore(saved)
            answers.append((q, model(questions[q : q + 1], past_key_values=cache).logits))
    for q, logits in answers[3:]:
        assert torch.equal(logits, dict(answers[:3])[q])
    assert cache.seen == 64


def test_a_batch_equals_its_sequences_alone():
    """Padding costs nothing and changes nothing: each sequence keeps what it would keep alone."""
    model = tiny_model("llama")
    inputs = prompts()
    with headkv.compress(model, METHODS["AdaKV"]) as session:
        model(**inputs)
        together = session.cache
        for b in range(3):
            real = inputs["attention_mask"][b].bool()
            model(inputs["input_ids"][b : b + 1, real], position_ids=torch.arange(60)[None, real])
            assert torch.equal(together.lengths()[:, b], session.cache.lengths()[:, 0])
            offset = int((~real).sum())
            for got, want in zip(together.layers, session.cache.layers, strict=True):
                for h in range(KV_HEADS):
                    assert torch.equal(got.row(b, h).positions, want.row(0, h).positions + offset)


def test_the_model_is_as_it_was_after_the_block():
    model = tiny_model("mistral")
    model.set_attn_implementation("eager")
    functions = dict(model.__dict__), type(model).forward
    with headkv.compress(model, METHODS["AdaKV"]):
        assert model.config._attn_implementation == "headkv"
    assert model.config._attn_implementation == "eager"
    with pytest.raises(KeyError), headkv.compress(model, METHODS["AdaKV"]):
        raise KeyError("a user's error")
    assert model.config._attn_implementation == "eager" and not model._forward_pre_hooks
    assert (model.__dict__.keys(), type(model).forward) == (functions[0].keys(), functions[1])


def test_nothing_of_transformers_is_patched():
    """Trap 28 (kvpress): the attention functions of others are untouched, and other caches work as before."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    model = tiny_model("llama")
    want = model.generate(**prompts(), max_new_tokens=6, do_sample=False)
    headkv.RaggedCache.for_model(model, METHODS["AdaKV"])  # leaves the model's attention at "headkv"
    got = model.generate(**prompts(), max_new_tokens=6, do_sample=False)
    assert torch.equal(got, want)
    assert torch.equal(model(**prompts(), use_cache=False).logits[:, -1].argmax(1), want[:, 60])
    assert AttentionInterface()["sdpa"] is sdpa_attention_forward


def test_two_caches_on_one_model_do_not_mix():
    """Trap 6 (AdaKV): lengths live in the cache, not on the module."""
    model = tiny_model("llama")
    first, second = (headkv.RaggedCache.for_model(model, METHODS["AdaKV"]) for _ in range(2))
    inputs = prompts(1)
    ids = inputs["input_ids"]
    model(ids, past_key_values=first)
    alone = model(ids[:, :1], past_key_values=first).logits
    model(ids, past_key_values=(first := headkv.RaggedCache.for_model(model, METHODS["AdaKV"])))
    model(ids.flip(1)[:, :9], past_key_values=second)
    assert torch.equal(model(ids[:, :1], past_key_values=first).logits, alone)
    assert (first.seen, second.seen) == (61, 9)


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_of_one_token(method):
    """Trap 7: prefill is told by the cache's state, not by the number of tokens."""
    model = tiny_model("llama")
    ids = torch.tensor([[5]])
    with headkv.compress(model, METHODS[method]) as session:
        model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert session.cache.seen == 3
    assert int(session.cache.lengths().min()) >= 1


def test_a_second_prompt_is_planned_afresh():
    """Trap 10 (Ada-Pyramid): budgets of a longer second prompt are those of a fresh model."""
    model, method = tiny_model("llama"), METHODS["AdaKV pyramid"]
    ids = prompts(1)["input_ids"]
    with headkv.compress(model, method) as session:
        model(ids[:, :7])
        model(ids)
        second = session.cache.lengths()
    fresh = tiny_model("llama")
    with headkv.compress(fresh, method) as session:
        fresh(ids)
    assert torch.equal(second, session.cache.lengths())


def test_padding_is_not_stored():
    model = tiny_model("llama")
    with headkv.compress(model, headkv.FullCache()) as session:
        model(**prompts())
    assert session.cache.lengths()[0].tolist() == [[60, 60], [54, 54], [47, 47]]


def call(method=METHODS["FullCache"], inputs=None, **arguments):
    model = tiny_model("llama")
    with headkv.compress(model, method):
        model(**(inputs or prompts()), **arguments)


def sized(name, **changes):
    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, **changes}
    return getattr(transformers, name + "ForCausalLM")(getattr(transformers, name + "Config")(**shape))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )


def wrong_profile():
    scores = torch.rand(LAYERS + 1, KV_HEADS)
    return HeadProfile(model="tiny", kind="gate", heads="kv", scores=scores)


BAD = {
    "a 4-D mask": (lambda: call(inputs={"input_ids": prompts()["input_ids"], "attention_mask": torch.ones(3, 1, 60, 60)}), ValueError, "attention_mask must be 2-D"),
    "an all-padding row": (lambda: call(inputs={"input_ids": torch.ones(2, 4).long(), "attention_mask": torch.tensor([[1] * 4, [0] * 4])}), ValueError, "all padding"),
    "output_attentions": (lambda: call(output_attentions=True), ValueError, "output_attentions=True is not supported"),
    "no model": (lambda: headkv.compress("llama", headkv.FullCache()).__enter__(), TypeError, "model must be a transformers model, got str"),
    "a class": (lambda: call(method=headkv.AdaKV), TypeError, "method must be a headkv method"),
    "no method": (lambda: call(method=0.2), TypeError, "method must be a headkv method"),
    "an encoder-decoder": (lambda: headkv.RaggedCache.for_model(t5(), headkv.FullCache()), ValueError, "encoder-decoder"),
    "a model of linear attention": (lambda: headkv.RaggedCache.for_model(sized("Mamba"), headkv.FullCache()), ValueError, "MambaForCausalLM"),
    "an unknown backend": (lambda: headkv.RaggedCache.for_model(tiny_model("llama"), headkv.FullCache(), backend="cuda"), ValueError, "backend must be one of"),
    "negative headroom": (lambda: headkv.RaggedCache.for_model(tiny_model("llama"), headkv.FullCache(), headroom=-1), ValueError, "headroom must be"),
    "a profile of another model": (lambda: headkv.RaggedCache.for_model(tiny_model("llama"), headkv.DuoAttention(profile=wrong_profile())), ValueError, "layers"),
    "a static cache": (lambda: tiny_static(), ValueError, "static"),
    "nothing generated yet": (lambda: headkv.compress(tiny_model("llama"), headkv.FullCache()).cache, RuntimeError, "no cache yet"),
    "dropout": (lambda: training(), ValueError, "dropout must be 0"),
}  # fmt: skip


def tiny_static():
    model = tiny_model("llama")
    with headkv.compress(model, headkv.FullCache()):
        model.generate(**prompts(), max_new_tokens=2, cache_implementation="static")


def training():
    model = tiny_model("llama", attention_dropout=0.5).train()
    with headkv.compress(model, headkv.FullCache()):
        model(**prompts())


@pytest.mark.parametrize("call, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


OFF = {
    "budget": (0.2, TypeError, "unexpected keyword argument 'budget'"),
    "backend": ("cuda", ValueError, "backend must be one of 'auto', 'reference', 'rust', 'triton', got 'cuda'"),
    "headroom": (-1, ValueError, "headroom must be an int of at least 0, got -1"),
    "rollback": (1.5, TypeError, "rollback must be an int of at least 0, got 1.5"),
    "chunked_prefill": ("yes", TypeError, "chunked_prefill must be True or False, got 'yes'"),
    "cuda_graph": (1, TypeError, "cuda_graph must be True or False, got 1"),
    "compile_layers": (True, ValueError, "compile_layers must be False without cuda_graph=True, got True"),
}  # fmt: skip


@pytest.mark.parametrize("name", OFF)
def test_options_are_checked_at_the_call(name):
    """Not when the block is entered, nor at the first prompt; those of a cache are the same."""
    value, error, message = OFF[name]
    model = tiny_model("llama")
    with pytest.raises(error, match=message):
        headkv.compress(model, headkv.FullCache(), **{name: value})
    if name not in ("cuda_graph", "compile_layers"):
        with pytest.raises(error, match=message):
            headkv.RaggedCache.for_model(model, headkv.FullCache(), **{name: value})


def test_methods_are_checked_at_the_call():
    """So is what can not know a chunked prompt's length ahead."""
    razor = headkv.RazorAttention(echo=RAZOR.echo, induction=RAZOR.induction, streaming_prefill=True)
    bad = {
        0.2: (TypeError, "method must be"),
        headkv.AdaKV: (TypeError, "method must be"),
        razor: (ValueError, "chunk"),
    }
    for method, (error, message) in bad.items():
        model = tiny_model("llama")
        with pytest.raises(error, match=message):
            headkv.compress(model, method, chunked_prefill=True)
        assert model.config._attn_implementation == "sdpa"


def test_a_refused_model_is_unchanged():
    model = tiny_model("llama")
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="backend"):
        headkv.compress(model, headkv.FullCache(), backend="cuda").__enter__()
    assert model.config._attn_implementation == before and not model._forward_pre_hooks


def test_a_ragged_cache_without_our_attention_says_so():
    model = tiny_model("llama")
    cache = headkv.RaggedCache.for_model(model, headkv.FullCache())
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="headkv.compress"):
        model(**prompts(), past_key_values=cache)


def test_nested_blocks_are_refused():
    model = tiny_model("llama")
    with (
        headkv.compress(model, headkv.FullCache()),
        pytest.raises(RuntimeError, match="another headkv.compress block"),
        headkv.compress(model, METHODS["AdaKV"]),
    ):
        pass


def test_crop_into_the_compressed_prompt_is_refused():
    model = tiny_model("llama")
    cache = headkv.RaggedCache.for_model(model, METHODS["SnapKV"])
    model(**prompts(1), past_key_values=cache)
    cache.crop(-4)  # the observation window is always kept
    with pytest.raises(ValueError, match="evicted entries"):
        cache.crop(-18)
    assert cache.seen == 56
