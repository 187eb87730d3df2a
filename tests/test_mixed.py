"""Heads of one layer in different storages: each head is what it would be in a layer of its storage alone."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle

import hypothesis.strategies as st
import masked_oracle
import pytest
import torch
from generation_cases import METHODS, profile, prompts
from hypothesis import given, settings
from test_quantised import WAYS, WINDOWS, Watched, generate, rounding

import headkv
from headkv.cache import MixedLayer, RaggedLayer, files
from headkv.cache.mixed import Store, from_snapshot, stored_in
from headkv.cache.ragged import STORAGES
from headkv.heads import HeadProfile, HeadStorage
from headkv.integrations.ranks import Ranks
from headkv.integrations.support import CacheOptions
from headkv.models.tiny import tiny_model

NAMES = ("int8", "model", "int8", "int4", "k8v4")
BACKENDS = ["reference", "rust", pytest.param("triton", marks=pytest.mark.gpu)]
BY_HEAD = HeadStorage([["int8", "int4"], ["model", "k8v4"], ["int4", "int4"]])  # of a tiny llama


class Twin:
    """A layer in parts, and beside it whole ones, one for each storage, in which the heads count that are stored so."""

    def __init__(
        self, names=NAMES, residual=0, batch=2, n=40, dim=24, device="cpu", dtype=torch.float32, **window
    ):
        generator = torch.Generator().manual_seed(n)
        keys, values = torch.randn(2, batch, len(names), n, dim, generator=generator).to(device, dtype)
        keep = torch.rand(batch, len(names), n, generator=generator) < 0.7
        keep[..., -1] = True
        how = {"keep": keep.to(device), "headroom": 3, **window}
        self.names, self.layer = (
            tuple(names),
            stored_in(RaggedLayer.from_dense(keys, values, **how), names, residual),
        )
        self.whole = {
            name: stored_in(RaggedLayer.from_dense(keys, values, **how), name, residual)
            for name in dict.fromkeys(names)
        }

    def all(self, name, *args, **kwargs):
        """The same call to every layer."""
        for layer in (self.layer, *self.whole.values()):
            getattr(layer, name)(*args, **kwargs)

    def append(self, tokens, valid=None):
        shape = 2, self.layer.batch_size, len(self.names), tokens, self.layer.head_dim
        self.all("append", *torch.randn(shape, generator=torch.Generator().manual_seed(tokens)), valid)

    def by_head(self, ask):
        """What `ask` says of whole layers, `[B, HQ, ...]`: of each head what it says of the layer in its storage."""
        said = {name: ask(layer) for name, layer in self.whole.items()}
        return torch.cat([said[name].chunk(len(self.names), 1)[h] for h, name in enumerate(self.names)], 1)

    def assert_same(self):
        layer, grid = self.layer, (self.layer.batch_size, len(self.names))
        assert isinstance(layer, MixedLayer) and layer.storage == self.names
        assert torch.equal(layer.lengths(), self.by_head(lambda x: x.lengths()))
        assert torch.equal(layer.recent.view(grid), self.by_head(lambda x: x.recent.view(grid)))
        for other in self.whole.values():
            assert (layer.seen, layer.rollback, *grid) == (other.seen, other.rollback, *other.lengths().shape)
        for b, h in itertools.product(*map(range, grid)):
            for own, want in zip(layer.row(b, h), self.whole[self.names[h]].row(b, h), strict=True):
                assert own.dtype == want.dtype and torch.equal(own, want), (b, h)
        dense = layer.to_dense()
        stored = dense.valid if dense.valid is not None else torch.ones(grid[0], layer.seen, dtype=torch.bool)
        for b, h in itertools.product(*map(range, grid)):
            at = layer.row(b, h).positions.long()
            assert bool(stored[b, at].all())
            want = self.whole[self.names[h]].to_dense()
            assert torch.equal(dense.keys[b, h, at], want.keys[b, h, at])
            assert torch.equal(dense.values[b, h, at], want.values[b, h, at])


def evict(twin, **windows):
    generator = torch.Generator().manual_seed(3)
    keep = torch.rand(*twin.layer.lengths().shape, int(twin.layer.lengths().max()), generator=generator) < 0.6
    keep[..., :3] = True
    twin.all("evict", keep, headroom=2, **windows)


def restore(twin):
    saved = [layer.snapshot() for layer in (twin.layer, *twin.whole.values())]
    twin.append(9)
    assert type(from_snapshot(saved[0])) is type(twin.layer) and saved[0].nbytes > 0
    for layer, snapshot in zip((twin.layer, *twin.whole.values()), saved, strict=True):
        layer.restore(snapshot)


def crop(twin):
    twin.append(5)
    twin.all("crop", 4)


CHANGES = {
    # When windowed rows are trimmed follows from all rows of a layer: that is done at last.
    "tokens": lambda twin: ([twin.append(1) for _ in range(90)], twin.all("trim", 5)),
    "a chunk": lambda twin: twin.append(100),
    "padding": lambda twin: twin.append(7, torch.tensor([[True] * 3 + [False] * 4, [False] * 6 + [True]])),
    "evict": evict,
    "evict to windows": lambda twin: evict(twin, sinks=torch.arange(10).view(2, 5), recent=6),
    "reorder": lambda twin: twin.all("reorder", torch.tensor([1, 1, 0])),
    "trim": lambda twin: twin.all("trim", 5),
    "restore": restore,
    "to": lambda twin: twin.all("to", "cpu"),
    "crop": crop,
}
FOLDS = {"compensating": {"compensate": torch.tensor([[True, False, False, False, True]] * 2)}}


@pytest.mark.parametrize("residual", [0, 5])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_that_of_each_head(change, window, residual):
    twin = Twin(residual=residual, **WINDOWS[window] | FOLDS.get(window, {}))
    assert twin.layer.residual_length == residual
    twin.assert_same()
    change(twin)
    twin.assert_same()
    twin.append(2)
    twin.assert_same()


STEPS = st.lists(st.sampled_from(list(CHANGES)), max_size=4)


@settings(max_examples=25, deadline=None)
@given(names=st.lists(st.sampled_from(STORAGES), min_size=2, max_size=5), n=st.integers(8, 70), steps=STEPS)
def test_any_heads_and_any_changes(names, n, steps):
    twin = Twin(names, n=n, batch=1)
    for step in steps:
        if step in ("tokens", "a chunk", "evict", "trim", "restore", "to", "crop"):
            CHANGES[step](twin)
    if len(set(names)) > 1:
        twin.assert_same()
    else:
        assert isinstance(twin.layer, RaggedLayer) and twin.layer.storage == names[0]


RULES = {
    "plain": {},
    "sliding window, softcap": {"sliding_window": 9, "softcap": 2.0},
    "sinks": {"sink_logits": torch.linspace(-2, 2, 10)},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("residual", [0, 5])
def test_attention_is_that_of_each_head(residual, window, rule, backend):
    if window == "compensating" and "sliding_window" in RULES[rule]:
        pytest.skip("compensation has no sliding window")
    device = "cuda" if backend == "triton" else "cpu"
    move = lambda how: {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in how.items()}  # noqa: E731
    twin = Twin(residual=residual, device=device, **move(WINDOWS[window] | FOLDS.get(window, {})))
    how = {"backend": backend, **move(RULES[rule])}
    exact = (
        {"rtol": 0, "atol": 0} if backend != "triton" else {"rtol": 1e-5, "atol": 1e-5}
    )  # rows are split otherwise
    for _ in range(3):
        q, new = torch.randn(2, 10, 24).to(device), torch.randn(2, 2, 5, 24).to(device)
        got = headkv.ragged_step(q, *new, twin.layer, **how)
        want = twin.by_head(lambda x: headkv.ragged_step(q, *new, x, **how))  # noqa: B023
        torch.testing.assert_close(got, want, **exact)
    for queries, attend in (
        (torch.randn(2, 10, 24), headkv.ragged_decode),
        (torch.randn(2, 10, 3, 24), headkv.ragged_extend),
        (torch.randn(2, 3, 10, 24).transpose(1, 2), headkv.ragged_extend),
    ):
        q = queries.to(device)
        got = attend(q, twin.layer, **how)
        want = twin.by_head(lambda x: attend(q, x, **how))  # noqa: B023
        torch.testing.assert_close(got, want, **exact)
    if device == "cpu":
        twin.assert_same()


def test_bytes_are_those_of_each_heads_storage():
    """Codes of heads in few bits take their bytes, and nothing of 16 bits is held beside them."""
    keys, values = torch.randn(2, 1, 4, 2000, 64).to(torch.bfloat16)
    sizes = {}
    for name, names in {"int8": "int8", "int4": "int4", "both": ("int8", "int4", "int4", "int8")}.items():
        layer = stored_in(RaggedLayer.from_dense(keys, values, headroom=0), names)
        held = {
            t.untyped_storage().data_ptr(): t.untyped_storage()
            for part in layer.parts
            for _, t in part.tensors()
        }
        sizes[name] = sum(storage.nbytes() for storage in held.values())
        assert 0 <= layer.nbytes - sizes[name] <= 64  # and where heads are, in the layer
    assert sizes["both"] == pytest.approx((sizes["int8"] + sizes["int4"]) / 2, rel=1e-3)


def test_no_head_is_left_without_sums_that_it_needs_nor_with_others():
    twin = Twin(sinks=1, recent=6, compensate=torch.tensor([[True, False, False, False, True]] * 2))
    held = {part.storage: part.compensates for part in twin.layer.parts}
    assert held == {"model": False, "int8": True, "k8v4": True, "int4": False} and twin.layer.compensates


# -- in a model -------------------------------------------------------------------------------------------------------


def rounding_by_head(names):
    """What keys and values `[B, H, n, D]` are once each head has stored them in its way."""

    def rounded(*sides):
        out = tuple(side.clone() for side in sides)
        for h, name in enumerate(names):
            if name != "model":
                for mine, side in zip(out, rounding(name)(*(x[:, h] for x in sides)), strict=True):
                    mine[:, h] = side
        return out

    return rounded


def as_masked(model, method, way="greedy", storage=BY_HEAD, decode=None, **more):
    """Every answer of every layer is that of a full cache which masks, and rounds each head in its way."""
    oracle = masked_oracle.oracle_cache(model, method, "prefill_chunk_size" in WAYS[way][1], decode)
    for layer, names in zip(oracle.layers, storage.names, strict=True):
        layer.rounding = rounding_by_head(names)
    cache = headkv.RaggedCache.for_model(model, method, storage=storage, **more)
    tolerance = (
        2e-3 if method == METHODS["RazorAttention"] else 2e-5
    )  # of what a prompt drops the mean is unrounded
    layers = [Watched(*pair, tolerance) for pair in zip(cache.layers, oracle.layers, strict=True)]
    generate(model, way, cache, 70 if decode else 24)
    assert all(watched.answers > 6 for watched in layers)
    assert [isinstance(layer.ragged, MixedLayer) for layer in cache.layers] == [
        len(set(x)) > 1 for x in storage.names
    ]
    return cache


@pytest.mark.parametrize(
    "method, way",
    [(method, "greedy") for method in METHODS] + [("AdaKV", way) for way in WAYS if way != "greedy"],
)
def test_every_answer_is_that_of_a_masked_full_cache_rounded_by_head(method, way):
    """Compensating rows remember the mean of what a prompt drops before it is rounded, the oracle after."""
    names = [["int8", "model"]] * 3 if method == "RazorAttention" else BY_HEAD.names
    as_masked(tiny_model("llama"), METHODS[method], way, HeadStorage(names))


@pytest.mark.parametrize("family", ["gemma2", "mistral-sliding", "gpt_oss"])
def test_families(family):
    model = tiny_model(family)
    layers = model.config.get_text_config().num_hidden_layers
    as_masked(model, METHODS["AdaKV"], storage=HeadStorage([["int4", "int8"]] * layers))


def test_the_oracle_tells_heads_apart():
    with pytest.raises(AssertionError, match="not close"):
        model, method = tiny_model("llama"), METHODS["AdaKV"]
        oracle = masked_oracle.oracle_cache(model, method)
        for layer, names in zip(oracle.layers, BY_HEAD.names, strict=True):
            layer.rounding = rounding_by_head(names[::-1])
        cache = headkv.RaggedCache.for_model(model, method, storage=BY_HEAD)
        for pair in zip(cache.layers, oracle.layers, strict=True):
            Watched(*pair, 2e-5)
        generate(model, "greedy", cache, 4)


def test_decode_budget():
    decode = headkv.integrations.decoding.DecodeBudget(40, 12)
    scorer = decode.scorer.window, decode.scorer.kernel_size
    cache = as_masked(
        tiny_model("llama"), METHODS["AdaKV"], decode=(40, 12, *scorer), decode_budget=40, every=12
    )
    assert float(cache.lengths().double().mean()) <= 40 + 12


def test_heads_that_stream_while_the_prompt_is_read():
    model = tiny_model("llama")
    method = dataclasses.replace(METHODS["DuoAttention"], streaming_prefill=True)
    with headkv.compress(model, method, storage=BY_HEAD, residual_length=4) as session:
        generate(model, "chunked prefill")
    assert [layer.ragged.storage for layer in session.cache.layers] == [*BY_HEAD.names[:2], "int4"]
    assert "MixedLayer" in repr(session.cache.layers[0]) and session.cache.lengths().shape == (3, 3, 2)


@pytest.mark.parametrize("residual", [0, 4])
def test_conversation_saved_copied_and_pickled(tmp_path, residual):
    """Snapshot, file and copies go on with the bits that the cache itself goes on with."""
    model, inputs = tiny_model("llama"), prompts(2)
    cache = headkv.RaggedCache.for_model(
        model, METHODS["RazorAttention"], storage=BY_HEAD, residual_length=residual
    )
    more = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 3]]), "logits_to_keep": 3}
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        snapshot, twin = cache.snapshot(), copy.deepcopy(cache)
        cache.save(tmp_path / "cache")
        want = model(**more, past_key_values=cache).logits
        loaded = headkv.RaggedCache.load(tmp_path / "cache", model, METHODS["RazorAttention"])
        assert (
            loaded.layers[0].options.storage == BY_HEAD
            and loaded.layers[0].options.residual_length == residual
        )
        for other in (twin, loaded):
            assert torch.equal(model(**more, past_key_values=other).logits, want)
        cache.restore(snapshot)
        assert torch.equal(model(**more, past_key_values=cache).logits, want)
        cache.crop(-3)
        assert torch.equal(model(**more, past_key_values=cache).logits, want)
        loaded.reset()
        model(**inputs, past_key_values=loaded)
        assert torch.equal(model(**more, past_key_values=loaded).logits, want)
    layer = pickle.loads(pickle.dumps(cache)).layers[0].ragged
    assert isinstance(layer, MixedLayer) and torch.equal(layer.lengths(), cache.layers[0].ragged.lengths())


def test_a_file_of_parts_says_so_and_is_checked(tmp_path):
    layers: list[Store] = [Twin(residual=3).layer, Twin(["int8"] * 5).layer]
    files.write(tmp_path / "cache", layers, {})
    (got, whole), _ = files.read(tmp_path / "cache", lambda about: None, [torch.device("cpu")] * 2)
    assert isinstance(got, MixedLayer) and isinstance(whole, RaggedLayer)
    assert (got.heads, got.storage) == (layers[0].heads, NAMES)
    for b, h in itertools.product(range(2), range(5)):
        assert all(torch.equal(*pair) for pair in zip(got.row(b, h), layers[0].row(b, h), strict=True))
    with pytest.raises(ValueError, match=r"layers must be 0 to 2, got \[0, 0, 0, 0, 1\]"):
        files.read(tmp_path / "cache", lambda about: None, [torch.device("cpu")] * 3)


@pytest.mark.gpu
@pytest.mark.parametrize("residual", [0, 7])
def test_a_graph_gives_the_same_bits(residual):
    model, inputs = tiny_model("llama").cuda().eval(), {name: x.cuda() for name, x in prompts(3).items()}
    outs = []
    for graph in (False, True):
        how = {"storage": BY_HEAD, "residual_length": residual, "cuda_graph": graph}
        with headkv.compress(model, METHODS["AdaKV"], **how) as session:
            options = {"do_sample": False, "max_new_tokens": 90, "eos_token_id": None}
            outs.append(model.generate(**inputs, **options))
        assert isinstance(session.cache.layers[0].ragged, MixedLayer)
    assert torch.equal(*outs)


# -- what it is told --------------------------------------------------------------------------------------------------


def test_the_heads_that_a_profile_ranks_first():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.8, 0.8, 0.0]])
    of_kv = HeadProfile("tiny", "ablation", "kv", scores)
    assert HeadStorage.by_profile(of_kv, "int8", "int4").names == (
        ("int4", "int8", "int4"),
        ("int8", "int4", "int4"),
    )
    assert HeadStorage.by_profile(of_kv, "int8", "int4", share=0).kinds == {"int4"}
    assert HeadStorage.by_profile(of_kv, "model", "int4", share=1).kinds == {"model"}
    of_queries = HeadProfile("tiny", "echo", "query", scores.repeat_interleave(2, 1))
    assert HeadStorage.by_profile(of_queries, "k8v4", "int4", num_kv_heads=3).names[0] == (
        "int4",
        "k8v4",
        "int4",
    )
    said = "HeadStorage(2 layers of 3 KV heads: int8 2, int4 4)"
    assert repr(HeadStorage.by_profile(of_kv, "int8", "int4")) == said


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_stores_its_heads(rank):
    options = CacheOptions(storage=HeadStorage([["int8", "int4", "model", "int4"]]), ranks=Ranks(rank, 2, 4))
    assert options.storage_of(0) == [("int8", "int4"), ("model", "int4")][rank]


WRONG = {
    "no layer": ([], ValueError, "as many heads each, at least one"),
    "no head": ([[]], ValueError, "as many heads each, at least one"),
    "uneven": ([["int8"], ["int8", "int4"]], ValueError, r"as many heads each, at least one, got \[1, 2\]"),
    "unknown": ([["int8", "int2"]], ValueError, "names must be one of 'model', .* got 'int2'"),
    "one name": ("int8", TypeError, "lists of storages, one list a layer, got 'int8'"),
    "one list": (["int8", "int4"], TypeError, "lists of storages, one list a layer"),
}


@pytest.mark.parametrize("names, error, message", WRONG.values(), ids=WRONG)
def test_storages_that_are_none(names, error, message):
    with pytest.raises(error, match=message):
        HeadStorage(names)


def test_what_does_not_fit_is_refused_on_entry():
    model, method = tiny_model("llama"), METHODS["AdaKV"]
    for make in (headkv.compress, headkv.RaggedCache.for_model):
        with pytest.raises(ValueError, match="model's 3 layers of 2 KV heads, got 2 layers of 2"):
            make(model, method, storage=HeadStorage([["int8", "int4"]] * 2))
        with pytest.raises(ValueError, match="model's 3 layers of 2 KV heads, got 3 layers of 1"):
            make(model, method, storage=HeadStorage([["int8"]] * 3))
        with pytest.raises(ValueError, match="residual_length must be 0 .* got 4"):
            make(model, method, storage=HeadStorage([["model"] * 2] * 3), residual_length=4)
    with pytest.raises(
        ValueError, match="num_kv_heads must be the model's with a profile of query heads, got None"
    ):
        HeadStorage.by_profile(profile("echo", "query"), "int8", "int4")
    with pytest.raises(ValueError, match="share must be a number in .* got 1.5"):
        HeadStorage.by_profile(profile("gate"), "int8", "int4", share=1.5)
    model.config.head_dim = 5
    with pytest.raises(ValueError, match="where head_dim is odd"):
        headkv.compress(model, method, storage=BY_HEAD)


def test_parts_that_are_no_layer():
    one, two = (RaggedLayer.from_dense(*torch.randn(2, 1, heads, 9, 8)) for heads in (1, 2))
    for parts, heads, message in (
        ([one, two], [[0], [0, 1]], "each of a layer's heads once"),
        ([one, two], [[0], [2, 1]], "each of a layer's heads once, ascending"),
        ([one, two], [[0, 1], [2]], "as many heads as `heads` says"),
        ([one, RaggedLayer.from_dense(*torch.randn(2, 2, 2, 9, 8))], [[0], [1, 2]], "alike in batch"),
    ):
        with pytest.raises(ValueError, match=message):
            MixedLayer(parts, heads)
    with pytest.raises(ValueError, match="one for each of the 2 heads"):
        MixedLayer.of(two, ["int8"])
    with pytest.raises(ValueError, match="storage must be one of"):
        MixedLayer.of(two, ["int8", "int3"])


def test_errors_of_a_layer_in_parts_leave_it_as_it_was():
    twin = Twin(recent=6, sinks=1, batch=1)
    layer = twin.layer
    keep = torch.ones(1, 5, int(layer.lengths().max()), dtype=torch.bool)
    keep[0, 3] = False
    for call, error, message in (
        (lambda: layer.evict(keep), ValueError, "of the heads 3 alone: keep would leave row"),
        (lambda: layer.evict(keep[:, :4]), ValueError, "keep must have shape"),
        (lambda: layer.crop(39), ValueError, "of the heads 1 alone: cannot crop 39 tokens"),
        (lambda: layer.append(*torch.randn(2, 1, 4, 1, 24)), ValueError, "keys must have shape"),
        (lambda: layer.append(*torch.randn(2, 1, 5, 1, 24).double()), TypeError, "keys must be float32"),
        (lambda: layer.reorder(torch.tensor([3])), ValueError, "index must be"),
        (lambda: layer.row(0, 5), IndexError, r"head in \[0, 5\)"),
        (lambda: layer.row(1, 0), IndexError, "batch=1"),
        (lambda: headkv.ragged_decode(torch.randn(1, 7, 24), layer), ValueError, "multiple of 5 heads"),
    ):
        with pytest.raises(error, match=message):
            call()
        twin.assert_same()
