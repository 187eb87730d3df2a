"""Hybrids: attention layers are ragged, states beside them are transformers' own, whole, and nobody's text is disturbed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from generation_cases import METHODS, SCORER, profile, prompts
from masked_oracle import oracle_cache
from test_decoding import bounded_as_masked
from test_huggingface import DRAFTS, WAYS, chunks, compressed_as_masked, generate
from test_prompt_methods import WHOLE
from transformers import DynamicCache

import headkv
from headkv.evaluation.reading import Reading
from headkv.heads.induction import profile_repeats
from headkv.integrations.masked import MaskedCache
from headkv.integrations.states import can_hold, tensors
from headkv.models.tiny import HYBRIDS, tiny_model

UNDRAFTED = [way for way, (_, arguments) in WAYS.items() if not DRAFTS & set(arguments)]
# Mamba 1: transformers begins its recurrence anew where several tokens come at once.
FORGETS, CARRIES = ["jamba"], [family for family in HYBRIDS if family != "jamba"]
SERVED = [(family, way) for family in HYBRIDS for way in UNDRAFTED if family in CARRIES or not chunks(way)]
METHOD = headkv.AdaKV(budget=12, scorer=SCORER)
IDS = prompts(1)["input_ids"]
held = pytest.mark.skipif(not can_hold(), reason="this transformers does not carry states on")


def read(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True).logits


def cached(model: Any, method: Any = METHOD, **options: Any) -> headkv.RaggedCache:
    """After the prompt."""
    cache = headkv.RaggedCache.for_model(model, method, **options)
    read(model, IDS, cache)
    return cache


def states(cache: headkv.RaggedCache) -> list[torch.Tensor]:
    """Copies of all that is held beside keys and values."""
    return [x.clone() for state in cache.states.values() for x in tensors(state).values()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(map(torch.equal, one, other))


@pytest.mark.skipif(can_hold(), reason="this transformers carries states on")
@pytest.mark.parametrize("family", HYBRIDS)
def test_older_transformers_are_refused(family: str) -> None:
    with pytest.raises(ValueError, match="hybrid, whose states transformers .* use a newer release"):
        headkv.compress(tiny_model(family), METHOD)


@held
@pytest.mark.parametrize(("family", "way"), SERVED)
def test_without_compression_equals_eager(family: str, way: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    tokens, logits, _ = generate(model, way)
    with headkv.compress(model, headkv.FullCache(), chunked_prefill=chunks(way)):
        got_tokens, got_logits, _ = generate(model, way)
    assert torch.equal(got_tokens, tokens)
    torch.testing.assert_close(got_logits, logits, rtol=1e-4, atol=1e-4)


@held
@pytest.mark.parametrize(("family", "way"), SERVED)
def test_compressed_equals_masked_full_cache(family: str, way: str) -> None:
    cache = compressed_as_masked(tiny_model(family), METHOD, way)
    assert int(cache.lengths().min()) < cache.seen


@held
@pytest.mark.parametrize("method", [*WHOLE, "streaming"])
@pytest.mark.parametrize("family", CARRIES)
def test_methods_of_other_moments(family: str, method: str) -> None:
    """The whole prompt, read a second time or not; windows while it is read. Profiles count layers that attend."""
    model = tiny_model(family)
    gates = profile("gate")
    gates = headkv.HeadProfile("tiny", "gate", "kv", gates.scores[:2])
    streaming = headkv.DuoAttention(gates, sparsity=0.5, sinks=1, recent=5, streaming_prefill=True)
    compressed_as_masked(model, streaming if method == "streaming" else WHOLE[method])


@held
@pytest.mark.parametrize("family", HYBRIDS)
def test_decode_budget(family: str) -> None:
    bounded_as_masked(tiny_model(family), METHODS["AdaKV"])


@held
@pytest.mark.parametrize("method", ["AdaKV", "KVzip"])
@pytest.mark.parametrize("family", CARRIES)
def test_a_conversation_in_calls(family: str, method: str) -> None:
    """The prompt, a second turn of several tokens, single ones: each logit that of the masked full cache."""
    model, chosen = tiny_model(family), {"AdaKV": METHOD, **WHOLE}[method]
    parts = [
        IDS,
        *torch.randint(3, 97, (1, 9), generator=torch.Generator().manual_seed(2)).split([7, 1, 1], 1),
    ]
    oracle = oracle_cache(model, chosen)
    want = [read(model, part, oracle) for part in parts]
    cache = headkv.RaggedCache.for_model(model, chosen)
    for part, logits in zip(parts, want, strict=True):
        torch.testing.assert_close(read(model, part, cache), logits, rtol=1e-4, atol=1e-4)


@held
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", HYBRIDS)
def test_several_tokens_go_on_as_one_by_one_or_are_refused(family: str, dtype: torch.dtype) -> None:
    """What later turns, KVzip and scores rely on in transformers' own states: the probe says it as the model does it."""
    model, parts = tiny_model(family), IDS.split([41, 7, 1, 11], 1)
    whole = read(model, IDS, DynamicCache(config=model.config))
    cache = DynamicCache(config=model.config)
    got = torch.cat([read(model, part, cache) for part in parts], 1)
    assert torch.allclose(got, whole, rtol=1e-4, atol=1e-4) == (family in CARRIES)
    model.to(dtype)
    ours = headkv.RaggedCache.for_model(model, headkv.FullCache(), chunked_prefill=True)
    read(model, parts[0], ours)
    before = states(ours)
    if family in CARRIES:
        read(model, parts[1], ours)
    else:
        with pytest.raises(
            ValueError, match="JambaModel forgets a state of the text .*JambaMambaMixer, in this release"
        ):
            read(model, parts[1], ours)
        assert same(states(ours), before) and ours.seen == 41
        read(model, parts[1][:, :1], ours)


@held
@pytest.mark.parametrize("family", FORGETS)
def test_what_would_forget_is_refused(family: str) -> None:
    model, forgets = tiny_model(family), pytest.raises(ValueError, match="forgets a state of the text")
    with headkv.compress(model, METHOD) as session:
        first = model.generate(IDS, max_new_tokens=4, do_sample=False)
        with forgets:
            model.generate(torch.cat([first, IDS], 1), past_key_values=session.cache, max_new_tokens=4)
        with forgets:
            model.generate(IDS, prefill_chunk_size=20, max_new_tokens=4)
    with forgets:
        headkv.score(model, METHOD, IDS, IDS[:, :5])
    with forgets:
        cached(model, WHOLE["KVzip"])


@held
@pytest.mark.parametrize("family", HYBRIDS)
def test_what_a_copy_reads_disturbs_nobody(family: str, tmp_path: Any) -> None:
    """Snapshots, copies, files and the second reading: the state afterwards is, bit for bit, the state before."""
    model = tiny_model(family)
    cache = cached(model)
    before, more = states(cache), IDS[:, : 5 if family in CARRIES else 1]
    want, taken = read(model, more, copy.deepcopy(cache)), cache.snapshot()
    cache.save(tmp_path / "text.headkv")
    assert same(states(cache), before), "a deep copy went on by itself"
    assert torch.equal(read(model, more, cache), want)
    assert not same(states(cache), before)
    for _ in range(2):
        cache.restore(taken)
        assert same(states(cache), before)
        assert torch.equal(read(model, more, cache), want)
    loaded = headkv.RaggedCache.load(tmp_path / "text.headkv", model)
    assert same(states(loaded), before)
    assert torch.equal(read(model, more, loaded), want)
    if family in CARRIES:
        zipped, plain = cached(model, WHOLE["KVzip"]), cached(model, headkv.FullCache())
        assert same(states(zipped), states(plain)), "the second reading goes on in copies"


@held
@pytest.mark.parametrize("family", HYBRIDS)
def test_batches(family: str) -> None:
    """Reordered, repeated, selected: rows and states move together. After a reset the batch may have another size."""
    model = tiny_model(family)
    model.set_attn_implementation("headkv")
    cache = headkv.RaggedCache.for_model(model, METHOD)
    three = IDS.repeat(3, 1)
    three[1:] = three[1:].flip(1)
    three[2, :30] = 5
    read(model, three, cache)
    token = torch.tensor([[7], [8], [9]])
    want = read(model, token, copy.deepcopy(cache))
    moved = copy.deepcopy(cache)
    moved.reorder_cache(torch.tensor([2, 0, 1]))
    torch.testing.assert_close(read(model, token[[2, 0, 1]], moved), want[[2, 0, 1]], rtol=1e-5, atol=1e-5)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([True, False, False, True, True, False]))
    torch.testing.assert_close(read(model, token, cache), want, rtol=1e-5, atol=1e-5)
    cache.reset()
    assert cache.seen == 0 and not states(cache)
    assert torch.equal(read(model, IDS, cache), read(model, IDS, headkv.RaggedCache.for_model(model, METHOD)))


@held
@pytest.mark.parametrize("family", HYBRIDS)
def test_bytes_and_looks(family: str) -> None:
    model = tiny_model(family)
    cache = cached(model)
    attend = len(cache.attending)
    rows = sum(layer.ragged.nbytes for layer in cache.attending)
    assert cache.nbytes == rows + sum(x.nbytes for x in states(cache)) > rows
    assert cache.lengths().shape == (attend, 1, 2) and [x.layer_idx for x in cache.attending] == list(
        range(attend)
    )
    said = f"{len(cache)} layers, " + (
        "60" if attend == len(cache) else f"{attend} of them with attention, 60"
    )
    assert said in repr(cache) and said in cache._repr_html_()
    assert METHOD.explain(model, 60).entries == int(cache.lengths().sum())
    assert [x.shape for x in profile_repeats(model, num_tokens=8, repeats=3)[0].scores[None]] == [(attend, 4)]


@held
@pytest.mark.parametrize("family", HYBRIDS)
def test_a_cache_of_the_users_own(family: str) -> None:
    """A DynamicCache becomes the ragged one's other name, and a copy of it goes on by itself."""
    model = tiny_model(family)
    own, options = (
        DynamicCache(config=model.config),
        {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None},
    )
    with headkv.compress(model, METHOD) as session:
        first = model.generate(IDS, past_key_values=own, **options)
        assert own.get_seq_length() == session.cache.seen == 63 and session.cache.layers is own.layers
        # With the token before it, which was not read yet: a turn of 7, or of 1.
        fork, turn = copy.deepcopy(own), torch.cat([first, IDS[:, : 6 if family in CARRIES else 0]], 1)
        want = model.generate(turn, past_key_values=own, **options)
        assert torch.equal(model.generate(turn, past_key_values=fork, **options), want)
        both = headkv.RaggedCache.for_model(model, METHOD)
        first = model.generate(IDS, past_key_values=both, **options)
        assert torch.equal(model.generate(turn, past_key_values=both, **options), want)


@held
@pytest.mark.parametrize("family", CARRIES)
def test_scores_and_readings(family: str) -> None:
    """The likelihood of texts of several lengths at once; one reading compressed in two ways."""
    model, answers = tiny_model(family), [IDS[0, :4], IDS[0, 20:29]]
    contexts = [IDS[0], IDS[0, :33].flip(0)]
    got = headkv.score(model, METHOD, contexts, answers)
    for context, answer, found in zip(contexts, answers, got, strict=True):
        oracle = oracle_cache(model, METHOD)
        read(model, context[None, :-1], oracle)
        logits = read(model, torch.cat([context[-1:], answer[:-1]])[None], oracle)[0]
        want = logits.log_softmax(-1).gather(-1, answer[:, None]).sum()
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-3)
    reading = Reading(model, IDS)
    for method in (METHOD, headkv.FullCache()):
        tokens = reading.answer(method)
        oracle = oracle_cache(model, method)
        read(model, IDS[:, :-1], oracle)
        token, want = IDS[:, -1:], []
        for _ in range(4):
            token = read(model, token, oracle)[:, -1:].argmax(-1)
            want.append(int(token))
        assert tokens.tolist() == want


@held
@pytest.mark.parametrize("family", HYBRIDS)
def test_what_states_can_not_do_is_refused_before_anything_changes(family: str) -> None:
    model = tiny_model(family)
    cache = cached(model)
    before, lengths = states(cache), cache.lengths()
    assert not any(layer.is_croppable for layer in cache.attending)
    for tokens in (-1, 59):
        with pytest.raises(ValueError, match=r"cannot crop 1 token\(s\): .* cache.snapshot\(\)"):
            cache.crop(tokens)
    cache.crop(0)
    assert same(states(cache), before) and torch.equal(cache.lengths(), lengths) and cache.seen == 60
    with pytest.raises(ValueError, match=r"snapshot must hold \d layers and \d states, got 1"):
        cache.restore(cache.snapshot()[:1])
    with headkv.compress(model, METHOD), pytest.raises(ValueError, match="drafts can not be served|stateful"):
        model.generate(IDS, max_new_tokens=6, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="cuda_graph must be False with"):
        headkv.compress(model, METHOD, cuda_graph=True)
    with pytest.raises(ValueError, match="profile must fit the model, 2 "):
        headkv.compress(model, METHODS["DuoAttention"])
    with pytest.raises(ValueError, match="model must hold no states of the text"):
        MaskedCache.for_model(model, METHOD)


@held
@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("turn", [False, True])
def test_a_call_that_fails_on_its_way(family: str, turn: bool) -> None:
    """States that went on can not be taken back: the call is not repeated over them."""
    model = tiny_model(family)
    with headkv.compress(model, METHOD):
        cache = headkv.RaggedCache.for_model(model, METHOD)
        ids, taken = IDS, None
        if turn:
            read(model, IDS, cache)
            ids, taken = IDS[:, : 5 if family in CARRIES else 1], cache.snapshot()
        want = read(model, ids, copy.deepcopy(cache))
        for where in ("feed_forward", "mlp"):
            parts = [x for name, x in model.named_modules() if name.endswith(where)]
            if parts:
                broken = parts[0].register_forward_pre_hook(_break)
        with pytest.raises(MemoryError):
            read(model, ids, cache)
        broken.remove()
        if any(state.has_previous_state[0] for state in cache.states.values()):
            with pytest.raises(
                RuntimeError, match=r"(?s)failed on its way.*cache.reset\(\), or cache.restore\(\)"
            ):
                read(model, ids, cache)
        cache.reset() if taken is None else cache.restore(taken)
        assert torch.equal(read(model, ids, cache), want)


def _break(*_: Any) -> None:
    raise MemoryError


@held
def test_kinds_of_caches_that_are_no_hybrids() -> None:
    """No attention, or a cache class of the model's own: refused by name."""
    from transformers import MambaConfig, MambaForCausalLM, MiniMaxConfig, MiniMaxForCausalLM

    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
    mamba = MambaForCausalLM(MambaConfig(**shape, state_size=4))
    with pytest.raises(ValueError, match="MambaForCausalLM has no layer with attention"):
        headkv.compress(mamba, METHOD)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_local_experts": 2}
    with pytest.raises(ValueError, match="keeps its states in a cache of its own class, MiniMaxCache"):
        headkv.compress(MiniMaxForCausalLM(MiniMaxConfig(**shape, **heads)), METHOD)
