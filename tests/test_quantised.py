"""Rows in 8 or 4 bits: what rounding may cost, moves that change no code, attention over them, generation with them."""

from __future__ import annotations

import dataclasses

import masked_oracle
import pytest
import torch
from attention_cases import CASES, Case, truth
from generation_cases import METHODS, prompts

import headkv
from headkv.attention import rust as rust_attention
from headkv.cache import RaggedLayer, files, layout, moves, rust
from headkv.cache.quantised import BITS, quantised, quantised_pools, restored, rotated, rotation_width
from headkv.cache.rows import Pools
from headkv.integrations.decoding import DecodeBudget
from headkv.logits import Rule
from headkv.models.tiny import tiny_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIMS = [1, 5, 16, 24, 64, 80, 96, 128, 256]


def rounded(x, bits=8):
    """What `x` is once it was stored in so many bits."""
    return restored(*quantised(x, bits))


def rounding(storage):
    """What keys and values are once they were stored so."""
    return lambda *both: tuple(rounded(x, bits) for x, bits in zip(both, BITS[storage], strict=True))


def hadamard(dim):
    """The rotation as a matrix in float64: Sylvester's, a block for each power of two that divides D."""
    block = torch.ones(1, 1, dtype=torch.float64)
    while block.shape[0] < rotation_width(dim):
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.block_diag(*[block * block.shape[0] ** -0.5] * (dim // block.shape[0]))


@pytest.mark.parametrize("dim", DIMS)
def test_rotation_is_sylvesters_matrix(dim):
    x, matrix = torch.randn(7, dim, dtype=torch.float64), hadamard(dim)
    torch.testing.assert_close(matrix @ matrix, torch.eye(dim, dtype=torch.float64))
    torch.testing.assert_close(rotated(x), x @ matrix)


VECTORS = {
    "normal": lambda x: x,
    "one channel of a hundred": lambda x: x * torch.where(torch.arange(x.shape[-1]) == 0, 100.0, 1.0),
    "zeros": torch.zeros_like,
    "tiny": lambda x: x * 1e-7,
    "huge": lambda x: x * 1e4,
}


@pytest.mark.parametrize("make", VECTORS.values(), ids=VECTORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_every_rotated_channel_is_off_by_at_most_half_a_scale(dim, dtype, make):
    """In float64, whatever the vectors; scales are as small as 255 steps allow, or the smallest that the dtype has."""
    x = make(torch.randn(50, dim, generator=torch.Generator().manual_seed(dim))).to(dtype)
    codes, scale = quantised(x)
    assert codes.dtype == torch.int8 and scale.dtype == dtype and codes.shape == x.shape
    turned, matrix = x.double() @ hadamard(dim), hadamard(dim)
    most = (turned.abs().amax(-1) / 127 * (1 + torch.finfo(dtype).eps)).clamp(min=torch.finfo(dtype).tiny)
    assert bool((scale.double() <= most * (1 + 1e-6)).all())
    back = restored(codes, scale).double()
    slack = 1e-6 * turned.abs().amax(-1, keepdim=True)  # of float32's sums
    assert bool(((back @ matrix - turned).abs() <= scale.double()[:, None] / 2 + slack).all())
    assert bool(((back - x.double()).norm(dim=-1) <= scale.double() / 2 * dim**0.5 + slack[:, 0] * dim).all())


@pytest.mark.parametrize("make", VECTORS.values(), ids=VECTORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [dim for dim in DIMS if dim % 2 == 0])
def test_in_4_bits_every_rotated_channel_is_off_by_at_most_a_scale(dim, dtype, make):
    """In float64: 16 equal cells fill the range of a vector, two codes a byte."""
    x = make(torch.randn(50, dim, generator=torch.Generator().manual_seed(dim))).to(dtype)
    codes, scale = quantised(x, 4)
    assert codes.dtype == torch.uint8 and scale.dtype == dtype and codes.shape == (50, dim // 2)
    turned, matrix = x.double() @ hadamard(dim), hadamard(dim)
    most = (turned.abs().amax(-1) / 16 * (1 + torch.finfo(dtype).eps)).clamp(min=torch.finfo(dtype).tiny)
    assert bool((scale.double() <= most * (1 + 1e-6)).all())
    # A scale that its dtype rounds down leaves the largest channel beyond the last step.
    slack = (1e-6 + torch.finfo(dtype).eps) * turned.abs().amax(-1, keepdim=True)
    back = restored(codes, scale).double()
    assert bool(((back @ matrix - turned).abs() <= scale.double()[:, None] + slack).all())


def test_a_large_channel_costs_the_others_little():
    """Why entries are rotated: without it one channel of a hundred leaves the others two steps."""
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 100
    plain = (x / (step := x.abs().amax(-1, keepdim=True) / 127)).round() * step
    others = torch.arange(64) != 3
    errors = [float((y - x)[:, others].square().mean().sqrt()) for y in (rounded(x), plain)]
    assert errors[0] < 0.5 * errors[1], errors


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_no_number_stays_with_its_vector(bits):
    x = torch.randn(4, 16)
    x[1, 3], x[2, 0] = torch.nan, torch.inf
    got = rounded(x, bits)
    assert got.isfinite().all(1).tolist() == [True, False, False, True]
    assert torch.equal(got[[0, 3]], rounded(x[[0, 3]], bits))


@pytest.mark.parametrize("make", VECTORS.values(), ids=VECTORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_rust_rounds_to_the_same_bits(dim, dtype, make):
    keys, values = make(torch.randn(2, 40, dim, generator=torch.Generator().manual_seed(dim)).to(dtype))
    values[3, 0], values[4, -1] = torch.nan, torch.inf
    pools = Pools(keys, values, torch.arange(40, dtype=torch.int32))
    for bits in [(8, 8), (8, 4), (4, 4)] if dim % 2 == 0 else [(8, 8)]:
        for got, want in zip(rust.quantise(pools, bits), quantised_pools(pools, bits), strict=True):
            assert torch.equal(got.nan_to_num(-1.0), want.nan_to_num(-1.0))


@pytest.mark.parametrize("storage", BITS)
def test_rust_moves_the_same_bits(storage):
    layer, _ = pair(storage)
    source = torch.randint(0, layer.keys.shape[0] + 5, (333,))
    for got, want in zip(rust.gather(layer.pools, source), layout.gather(layer.pools, source), strict=True):
        assert torch.equal(got, want)
    keys, values = torch.randn(2, 2, 3, 3, 24)
    slow = RaggedLayer.from_snapshot(layer.snapshot())
    for valid in (None, torch.tensor([[True, False, True], [False, True, True]])):
        for one in (layer, slow):
            one.reserve(3)
        rust.append(layer, keys, values, valid)
        moves.append_reference(slow, keys, values, valid)
        for got, want in zip(layer.pools, slow.pools, strict=True):
            assert torch.equal(got, want)
        for one in (layer, slow):
            one.advance(3)


# -- the store --------------------------------------------------------------------------------------------------------


def assert_same(layer, twin):
    """A layer of codes holds what its twin, in full precision, holds of entries that were rounded before."""
    dtypes = [{8: torch.int8, 4: torch.uint8}[bits] for bits in BITS[layer.storage]]
    assert [layer.keys.dtype, layer.values.dtype] == dtypes and twin.storage == "model"
    assert layer.head_dim == twin.head_dim and layer.dtype == twin.dtype
    assert layer.seen == twin.seen and torch.equal(layer.lengths(), twin.lengths())
    for b in range(layer.batch_size):
        for h in range(layer.num_kv_heads):
            for got, want in zip(layer.row(b, h), twin.row(b, h), strict=True):
                assert torch.equal(got, want)
    for name in ("sinks", "recent", "evicted_end", "trimmed_end", "count"):
        got, want = getattr(layer, name), getattr(twin, name)
        assert got is want is None or torch.equal(got, want)
    for name in ("key_sum", "value_sum"):
        if getattr(layer, name) is not None:
            torch.testing.assert_close(getattr(layer, name), getattr(twin, name), rtol=1e-5, atol=1e-5)


def pair(storage="int8", batch=2, heads=3, n=40, dim=24, **window):
    torch.manual_seed(n)
    stored = rounding(storage)
    keys, values = stored(*torch.randn(2, batch, heads, n, dim))
    keep = torch.rand(batch, heads, n) < 0.7
    keep[..., -12:] = True
    # A rounded vector is rounded to itself or not: the twin gets what the codes stand for.
    layer = RaggedLayer.from_dense(keys, values, keep=keep, headroom=3, storage=storage, **window)
    twin = RaggedLayer.from_dense(*stored(keys, values), keep=keep, headroom=3, **window)
    if twin.count is not None:
        layer.key_sum, layer.value_sum = twin.key_sum.clone(), twin.value_sum.clone()
    return layer, twin


def append(layers, tokens, valid=None):
    keys, values = torch.randn(2, layers[0].batch_size, layers[0].num_kv_heads, tokens, layers[0].head_dim)
    layers[0].append(keys, values, valid)
    layers[1].append(*rounding(layers[0].storage)(keys, values), valid)


def both(name, *args, **kwargs):
    return lambda layers: [getattr(layer, name)(*args, **kwargs) for layer in layers]


def evict(layers):
    longest = int(layers[0].length.max())
    keep = torch.rand(*layers[0].lengths().shape, longest, generator=torch.Generator().manual_seed(3)) < 0.6
    keep[..., :3] = True
    for layer in layers:
        layer.evict(keep, headroom=2)


def restore(layers):
    snapshots = [layer.snapshot() for layer in layers]
    append(layers, 9)
    for layer, snapshot in zip(layers, snapshots, strict=True):
        layer.restore(snapshot)


WINDOWS = {
    "ordinary": {},
    "windowed": {"sinks": 2, "recent": 6, "rollback": 3},
    "compensating": {"sinks": 2, "recent": 6, "compensate": torch.tensor([[True, False, True]] * 2)},
}
CHANGES = {
    "tokens": lambda layers: [append(layers, 1) for _ in range(90)],
    "a chunk": lambda layers: append(layers, 100),
    "padding": lambda layers: append(layers, 7, torch.rand(2, 7) < 0.5),
    "evict": evict,
    "reorder": both("reorder", torch.tensor([1, 1, 0])),
    "trim": both("trim", 5),
    "restore": restore,
    "to": both("to", "cpu"),
    "crop": lambda layers: (append(layers, 5), both("crop", 4)(layers)),
}


PAIRS = [*(("int8", window) for window in WINDOWS), ("int4", "windowed"), ("k8v4", "compensating")]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("storage, window", PAIRS)
def test_moves_change_no_code(storage, window, change):
    layers = pair(storage, **WINDOWS[window])
    assert_same(*layers)
    change(layers)
    assert_same(*layers)
    append(layers, 2)
    assert_same(*layers)


@pytest.mark.parametrize("storage", BITS)
def test_select_join_and_dense(storage):
    layers = pair(storage)
    ones = [[layer.select(torch.tensor([b])) for b in range(2)] for layer in layers]
    assert_same(*ones[0][:1], *ones[1][:1])
    assert_same(*(RaggedLayer.join(parts) for parts in ones))
    for got, want in zip(*(layer.to_dense() for layer in layers), strict=True):
        assert got is want is None or got.shape == want.shape and got.dtype == want.dtype
    for other in {*BITS, "model"} - {storage}:
        alone = pair(other)[0].select(torch.tensor([0])) if other in BITS else ones[1][0]
        with pytest.raises(ValueError, match="alike in .* storage"):
            RaggedLayer.join([ones[0][0], alone])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage, size", [("int8", 64 + 64), ("k8v4", 64 + 32), ("int4", 32 + 32)])
def test_bytes_fall_by_the_storage_that_is_held(storage, size, dtype):
    """Codes, a scale and half a position in place of D numbers: of every slot, and nothing else is held."""
    keys, values = torch.randn(2, 1, 4, 2000, 64).to(dtype)
    full, small = (RaggedLayer.from_dense(keys, values, storage=kind) for kind in ("model", storage))
    slots, rest = small.keys.shape[0], sum(x.nbytes for _, x in full.tensors() if x.shape[0] == 4)
    assert full.nbytes == slots * (2 * 64 * dtype.itemsize + 4) + rest
    assert small.nbytes == slots * (size + 2 * dtype.itemsize + 4) + rest
    before = small.keys
    small.quantise(storage)
    assert small.keys is before, "a layer that is stored so stays as it is"
    for other in {*BITS, "model"} - {storage}:
        with pytest.raises(
            ValueError, match=f"storage .* must be '{storage}' and 0, as .* rounded once, got '{other}'"
        ):
            small.quantise(other)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("storage", BITS)
def test_a_file_holds_codes_and_scales(tmp_path, storage, window):
    layer, twin = pair(storage, **window)
    files.write(tmp_path / "cache", [layer, twin], {})
    (got, other), _ = files.read(tmp_path / "cache", lambda about: None, [torch.device("cpu")] * 2)
    assert_same(got, other)
    assert torch.equal(got.keys[: got.length[0]], layer.keys[: layer.length[0]])
    append([got, other], 30)
    assert_same(got, other)


def test_a_file_of_values_that_fit_no_key_is_refused(tmp_path):
    layer, _ = pair("k8v4")
    layer.keys = layer.keys[:, ::2].contiguous()
    files.write(tmp_path / "cache", [layer], {})
    with pytest.raises(ValueError, match="keys and values of one storage and width"):
        files.read(tmp_path / "cache", lambda about: None, [torch.device("cpu")])


# -- attention --------------------------------------------------------------------------------------------------------

RULE = ("scale", "sliding_window", "softcap", "sink_logits")
WAYS_TO_ATTEND = [("reference", "int8"), ("rust", "int8"), ("rust", "int4")]


def built(case, storage):
    """Its queries and layer, stored so: scales of what is not a number are no numbers either."""
    q, layer = case.build()
    layer.quantise(storage)
    return q, layer


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend, storage", WAYS_TO_ATTEND)
def test_attention_is_that_of_the_restored_entries(case, backend, storage):
    """Against float64 over what the codes stand for: as much error as over rows in full precision."""
    q, layer = built(case, storage)
    want, options = truth(case, q, layer), case.options(q)
    if case.tokens == 1:
        got = headkv.ragged_decode(q[:, :, 0], layer, backend=backend, **options)[:, :, None]
    else:
        got = headkv.ragged_extend(q, layer, backend=backend, **options)
    assert got.dtype == q.dtype and bool(got.isfinite().all())
    error = (got.double() - want).abs()
    assert bool((error <= case.within_codes(want, backend)).all()), float(error.max())


BEST, *OTHERS = rust.extension().instruction_sets()
NARROW = [Case(f"D {dim}", ((9, 40),), group=5, dim=dim) for dim in (2, 6, 34, 66, 130)]


DECODE = [case for case in CASES if case.tokens == 1]
WIDTHS = [case for case in DECODE if case.name.startswith(("D ", "block", "compensation"))] + NARROW
SETS = [("int8", isa, case) for isa in OTHERS for case in DECODE]
SETS += [("k8v4", isa, case) for isa in (BEST, *OTHERS) for case in WIDTHS]
SETS += [("int4", isa, case) for isa in OTHERS for case in WIDTHS]


@pytest.mark.parametrize("storage, isa, case", SETS, ids=lambda x: getattr(x, "name", x))
def test_every_instruction_set(storage, isa, case):
    q, layer = built(case, storage)
    options, last = case.options(q), torch.full((q.shape[0], 1), layer.seen - 1)
    rule = Rule.of(layer.head_dim, *(options.get(name) for name in RULE))
    got = rust_attention.extend(q, layer, rule, query_positions=last, isa=isa)
    want = headkv.ragged_decode(q[:, :, 0], layer, backend="reference", **options)[:, :, None]
    torch.testing.assert_close(
        got, want, rtol=4 * torch.finfo(case.dtype).eps + 1e-5, atol=max(1e-5, case.error_over_codes("rust"))
    )


@pytest.mark.parametrize("storage, most", [("int8", 0.02), ("k8v4", 0.15), ("int4", 0.5)])
def test_attention_is_close_to_that_of_full_precision(storage, most):
    """What few bits cost, as a share of the output's size, with keys whose channels differ as models' do."""
    torch.manual_seed(0)
    keys, values, q = torch.randn(1, 2, 900, 64), torch.randn(1, 2, 900, 64), torch.randn(1, 6, 64)
    keys[..., ::16] *= 8
    full, small = (RaggedLayer.from_dense(keys, values, storage=kind) for kind in ("model", storage))
    got, want = (headkv.ragged_decode(q, layer) for layer in (small, full))
    assert float((got - want).norm() / want.norm()) < most


# -- generation -------------------------------------------------------------------------------------------------------

WAYS = {
    "greedy": (3, {}),
    "sampling": (3, {"do_sample": True, "top_k": 20, "temperature": 1.5}),
    "beam search": (2, {"num_beams": 3}),
    "prompt lookup": (1, {"prompt_lookup_num_tokens": 3}),
    "chunked prefill": (3, {"prefill_chunk_size": 9}),
}


def generate(model, way="greedy", cache=None, tokens=24):
    batch, arguments = WAYS[way]
    torch.manual_seed(11)
    options = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": None, **arguments}
    return model.generate(**prompts(batch), **options, past_key_values=cache)


class Watched:
    """A layer of a cache whose every answer is compared with that of the oracle's layer for the same new tokens.

    Layer by layer, as rounding is no continuous thing: of whole models the last bits of a key may decide on a code.
    """

    def __init__(self, layer, oracle, tolerance):
        self.layer, self.oracle, self.tolerance, self.valid, self.answers = layer, oracle, tolerance, None, 0
        self.attend, self.cropping, self.reorder = layer._attend, layer.cropping, layer.reorder_cache
        layer._attend, layer.cropping, layer.reorder_cache = self._attend, self._cropping, self._reorder

    def _attend(self, q, keys, values, valid, rule):
        got = self.attend(q, keys, values, valid, rule)
        new = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool) if valid is None else valid
        self.valid = new if self.valid is None else torch.cat([self.valid, new], 1)
        names = {"scaling": rule.scale, "sliding_window": rule.sliding_window, "softcap": rule.softcap}
        key, value = self.oracle.update(keys, values)
        out, _ = masked_oracle.attention(None, q, key, value, self.valid, **names, s_aux=rule.sink_logits)
        for b in range(q.shape[0]):
            pair = got[b].transpose(0, 1)[new[b]], out[b][new[b]]
            torch.testing.assert_close(*pair, rtol=self.tolerance, atol=self.tolerance)
        self.answers += 1
        return got

    def _cropping(self, tokens):
        crop = self.cropping(tokens)

        def both():
            crop()
            self.oracle.crop(self.layer.seen - self.valid.shape[1])
            self.valid = self.valid[:, : self.layer.seen]

        return both

    def _reorder(self, index):
        self.reorder(index)
        self.oracle.reorder_cache(index)
        self.valid = self.valid[index]


def as_masked(
    model, method, way="greedy", tokens=24, tolerance=2e-5, storage="int8", rounds=True, decode=None, **more
):
    """Generate by a cache of codes; every answer of every layer is compared, and each that a step gives."""
    chunked, made = "prefill_chunk_size" in WAYS[way][1], rounding(storage) if rounds else None
    oracle = masked_oracle.oracle_cache(model, method, chunked, decode, made)
    cache = headkv.RaggedCache.for_model(model, method, storage=storage, **more)
    layers = [Watched(*both, tolerance) for both in zip(cache.layers, oracle.layers, strict=True)]
    generate(model, way, cache, tokens)
    assert all(watched.answers > tokens // 4 for watched in layers)
    assert all(layer.ragged.storage == storage for layer in cache.layers)
    return cache


@pytest.mark.parametrize(
    "method, way",
    [(method, "greedy") for method in METHODS]
    + [(method, way) for method in ("AdaKV", "RazorAttention") for way in WAYS if way != "greedy"],
)
def test_every_answer_is_that_of_a_masked_full_cache_of_rounded_entries(method, way):
    """Of what a prompt drops, compensating rows remember the mean before rounding: the oracle's is of rounded ones."""
    as_masked(
        tiny_model("llama"), METHODS[method], way, tolerance=2e-3 if method == "RazorAttention" else 2e-5
    )


@pytest.mark.parametrize(
    "storage, method, way", [("k8v4", "AdaKV", "beam search"), ("int4", "DuoAttention", "prompt lookup")]
)
def test_every_answer_in_4_bits(storage, method, way):
    as_masked(tiny_model("llama"), METHODS[method], way, storage=storage)


def test_the_oracle_tells_rounded_entries_from_others():
    with pytest.raises(AssertionError, match="not close"):
        as_masked(tiny_model("llama"), METHODS["AdaKV"], rounds=False)


@pytest.mark.parametrize(
    "family, storage",
    [
        ("gemma2", "int8"),
        ("mistral-sliding", "int8"),
        ("qwen3", "int4"),
        ("gpt_oss", "int8"),
        ("gpt_oss", "k8v4"),
    ],
)
def test_families(family, storage):
    as_masked(tiny_model(family), METHODS["AdaKV"], storage=storage)


@pytest.mark.parametrize("method", ["AdaKV", "DuoAttention"])
def test_decode_budget(method):
    decode = DecodeBudget(40, 12)
    scorer = decode.scorer.window, decode.scorer.kernel_size
    as_masked(
        tiny_model("llama"), METHODS[method], tokens=70, decode=(40, 12, *scorer), decode_budget=40, every=12
    )


def test_generate_inside_compress():
    """The tokens of a cache of one's own; bytes that its storage has; the prompt is read in full precision."""
    model = tiny_model("llama")
    want = generate(model, cache=headkv.RaggedCache.for_model(model, METHODS["AdaKV"], storage="int8"))
    with headkv.compress(model, METHODS["AdaKV"], storage="int8") as session:
        assert torch.equal(generate(model), want)
    with headkv.compress(model, METHODS["AdaKV"]) as full:
        generate(model)
    assert torch.equal(session.cache.lengths(), full.cache.lengths())
    assert session.cache.nbytes < 0.5 * full.cache.nbytes


@pytest.mark.parametrize("storage", ["int8", "k8v4"])
def test_heads_that_stream_while_the_prompt_is_read_are_quantised_with_the_others(storage):
    model = tiny_model("llama")
    method = dataclasses.replace(METHODS["DuoAttention"], streaming_prefill=True)
    with headkv.compress(model, method, storage=storage) as session:
        generate(model, "chunked prefill")
    assert all(layer.ragged.storage == storage for layer in session.cache.layers)


@pytest.mark.parametrize("storage", ["int8", "k8v4"])
def test_conversation_saved_and_copied(tmp_path, storage):
    """Snapshot, file and copy go on with the bits that the cache itself goes on with."""
    model, inputs = tiny_model("llama"), prompts(2)
    cache = headkv.RaggedCache.for_model(model, METHODS["RazorAttention"], storage=storage)
    more = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 3]]), "logits_to_keep": 3}
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        snapshot = cache.snapshot()
        cache.save(tmp_path / "cache")
        want = model(**more, past_key_values=cache).logits
        cache.restore(snapshot)
        assert torch.equal(model(**more, past_key_values=cache).logits, want)
        loaded = headkv.RaggedCache.load(tmp_path / "cache", model)
        assert loaded.layers[0].ragged.storage == storage
        assert torch.equal(model(**more, past_key_values=loaded).logits, want)
        cache.crop(-3)
        assert torch.equal(model(**more, past_key_values=cache).logits, want)


def test_another_storage_is_refused_on_entry():
    with pytest.raises(
        ValueError, match="storage must be one of 'model', 'int8', 'k8v4', 'int4', got 'int2'"
    ):
        headkv.compress(tiny_model("llama"), METHODS["AdaKV"], storage="int2")


@pytest.mark.parametrize("storage", ["k8v4", "int4"])
def test_4_bits_of_an_odd_width_are_refused_on_entry(storage):
    model, message = tiny_model("llama"), f"where head_dim is odd, .* got '{storage}' and 5"
    model.config.head_dim = 5
    for make in (headkv.compress, headkv.RaggedCache.for_model):
        with pytest.raises(ValueError, match=message):
            make(model, METHODS["AdaKV"], storage=storage)
    entries = torch.randn(1, 1, 3, 5)
    with pytest.raises(ValueError, match=message):
        RaggedLayer.from_dense(entries, entries, storage=storage)
    layer = RaggedLayer.from_dense(entries, entries)
    with pytest.raises(ValueError, match=message):
        layer.quantise(storage)
    assert layer.storage == "model" and torch.equal(layer.row(0, 0).keys, entries[0, 0])
