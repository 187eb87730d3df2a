"""Newest entries as they came, beside codes: which they are after every change, and attention that sees them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import CASES, Case, truth
from generation_cases import METHODS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantised import OTHERS, RULE, WINDOWS, as_masked, generate

import headkv
from headkv.attention import rust as rust_attention
from headkv.cache import RaggedLayer, files, moves, residual, rust
from headkv.logits import Rule
from headkv.models.tiny import tiny_model

B, H, D = 2, 3, 8


class Told:
    """What a layer should hold, from lists: of each row its positions, and the last that its ring was given."""

    def __init__(self, size, **window):
        generator = torch.Generator().manual_seed(size)
        self.size = size
        self.keys, self.values = torch.randn(2, B, H, 400, D, generator=generator)  # of the whole text
        self.seen = 30
        keep = torch.rand(B, H, self.seen, generator=generator) < 0.7
        keep[..., -8:] = True
        dense = self.keys[:, :, : self.seen], self.values[:, :, : self.seen]
        self.layer = RaggedLayer.from_dense(
            *dense, keep=keep, headroom=3, storage="int4", residual_length=size, **window
        )
        self.codes = RaggedLayer.from_dense(*dense, keep=keep, headroom=3, storage="int4", **window)
        self.rings = [self.stored(r)[-size:] for r in range(B * H)]

    def stored(self, r):
        return self.codes.row(r // H, r % H).positions.tolist()

    def append(self, tokens, padded=False):
        valid = torch.ones(B, tokens, dtype=torch.bool)
        if padded:
            valid[0, ::2], valid[1, : tokens // 2] = False, False
        span = slice(self.seen, self.seen + tokens)
        for layer in (self.layer, self.codes):
            layer.append(self.keys[:, :, span], self.values[:, :, span], valid if padded else None)
        for r, ring in enumerate(self.rings):
            ring += (self.seen + valid[r // H].nonzero()[:, 0]).tolist()
            del ring[: -self.size]
        self.seen += tokens

    def crop(self, tokens):
        for layer in (self.layer, self.codes):
            layer.crop(tokens)
        self.seen -= tokens
        self.rings = [[p for p in ring if p < self.seen] for ring in self.rings]

    def both(self, name, *args, **kwargs):
        for layer in (self.layer, self.codes):
            getattr(layer, name)(*args, **kwargs)

    def evict(self, seed):
        longest = int(self.codes.length.max())
        keep = torch.rand(B, H, longest, generator=torch.Generator().manual_seed(seed)) < 0.8
        keep[..., :2] = True
        self.both("evict", keep, headroom=2)

    def check(self):
        """Codes as without rings; the newest entries, as far as the ring goes back without a gap, as they came."""
        assert self.layer.residual_length == self.size and self.layer.seen == self.codes.seen == self.seen
        for r in range(B * H):
            b, h = r // H, r % H
            got, want, positions = self.layer.row(b, h), self.codes.row(b, h), self.stored(r)
            assert got.positions.tolist() == positions
            count = 0
            while count < min(len(self.rings[r]), len(positions)) and (
                self.rings[r][-1 - count] == positions[-1 - count]
            ):
                count += 1
            self.rings[r] = self.rings[r][len(self.rings[r]) - count :]  # what lies behind a gap is lost
            if int(self.layer.recent[r]):
                count = min(count, int(self.layer.recent[r]))
            assert int(residual.seen_as_they_came(self.layer)[r]) == count
            old, where = (
                len(positions) - count,
                torch.tensor(positions[len(positions) - count :], dtype=torch.int64),
            )
            for side, whole in ((0, self.keys), (1, self.values)):
                assert torch.equal(got[side][:old], want[side][:old])
                torch.testing.assert_close(got[side][old:], whole[b, h][where], rtol=1e-5, atol=1e-5)


CHANGES = {
    "tokens": lambda told: [told.append(1) for _ in range(70)],
    "a chunk": lambda told: told.append(40),
    "padding": lambda told: (told.append(7, padded=True), told.append(6, padded=True)),
    "evict": lambda told: (told.append(3), told.evict(0), told.append(2), told.evict(1)),
    "trim": lambda told: (told.append(20), told.both("trim", 5)),
    "crop": lambda told: (told.append(6), told.crop(4)),
    "to": lambda told: told.both("to", "cpu"),
    "windows": lambda told: (told.append(9), told.both("set_windows", 1, 4)),
    "same order": lambda told: told.both("reorder", torch.tensor([0, 1])),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("size", [1, 5, 64])
def test_the_newest_are_as_they_came_after(size, window, change):
    told = Told(size, **window)
    told.check()
    change(told)
    told.check()
    told.append(2)
    told.check()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 4, 16]),
    st.lists(st.sampled_from(["token", "chunk", "padding", "evict", "crop", "trim"]), max_size=8),
)
def test_after_any_changes(size, changes):
    told = Told(size)
    for number, change in enumerate(changes):
        if change in ("token", "chunk"):
            told.append(1 if change == "token" else 9)
        elif change == "padding":
            told.append(4, padded=True)
        elif change == "evict":
            told.evict(number)
        elif change == "crop" and bool((told.codes.evicted_end <= told.seen - 2).all()):
            told.crop(2)
        elif change == "trim":
            told.both("trim", 1)
        told.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [5, 24, 64])
def test_rust_holds_the_same_bits(dim, dtype):
    torch.manual_seed(dim)
    keys, values = torch.randn(2, B, H, 20, dim).to(dtype)
    fast, slow = (RaggedLayer.from_dense(keys, values, storage="int8", residual_length=6) for _ in range(2))
    for tokens, valid in ((1, None), (9, None), (4, torch.rand(B, 4) < 0.5), (3, torch.zeros(B, 3) > 0)):
        new = torch.randn(2, B, H, tokens, dim).to(dtype)
        for layer in (fast, slow):
            layer.reserve(tokens)
        rust.append(fast, *new, valid)
        moves.append_reference(slow, *new, valid)
        for layer in (fast, slow):
            layer.advance(tokens)
        for name, want in slow.tensors():
            assert torch.equal(getattr(fast, name), want), name


def test_batches_files_and_dense(tmp_path):
    told = Told(5)
    told.append(3)
    layer = told.layer
    turned = RaggedLayer.from_snapshot(layer.snapshot())
    turned.reorder(torch.tensor([1, 1, 0]))
    for b, old in enumerate((1, 1, 0)):
        for got, want in zip(turned.row(b, 2), layer.row(old, 2), strict=True):
            assert torch.equal(got, want)
    whole = RaggedLayer.join([layer.select(torch.tensor([b])) for b in range(B)])
    files.write(tmp_path / "cache", [layer, told.codes], {})
    (read, plain), _ = files.read(tmp_path / "cache", lambda about: None, [torch.device("cpu")] * 2)
    assert plain.residual_length == 0 and read.residual_length == 5
    for other in (whole, read):
        for r in range(B * H):
            for got, want in zip(other.row(r // H, r % H), layer.row(r // H, r % H), strict=True):
                assert torch.equal(got, want)
    dense = layer.to_dense()
    for b in range(B):
        for h in range(H):
            keys, values, positions = layer.row(b, h)
            assert torch.equal(dense.keys[b, h, positions.long()], keys)
            assert torch.equal(dense.values[b, h, positions.long()], values)
    with pytest.raises(ValueError, match="alike in .* residual_length"):
        RaggedLayer.join([layer.select(torch.tensor([0])), told.codes.select(torch.tensor([1]))])


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.residual_count.fill_(6),
        lambda layer: layer.residual_count.fill_(-1),
        lambda layer: setattr(layer, "residual_values", layer.residual_values[:, :3].contiguous()),
        lambda layer: setattr(layer, "residual_keys", layer.residual_keys.half()),
        lambda layer: setattr(layer, "residual_keys", layer.residual_keys[:, :0].contiguous()),
    ],
)
def test_a_file_whose_rings_do_not_fit_is_refused(tmp_path, change, monkeypatch):
    monkeypatch.setattr(residual.Residual, "tidied", lambda self, length: self)  # nobody writes such files
    layer = Told(5).layer
    change(layer)
    files.write(tmp_path / "cache", [layer], {})
    with pytest.raises(ValueError, match="layer 0 must"):
        files.read(tmp_path / "cache", lambda about: None, [torch.device("cpu")])


def test_bytes_are_those_of_the_rings():
    keys = torch.randn(1, 4, 500, 64).bfloat16()
    small, held = (RaggedLayer.from_dense(keys, keys, storage="int4", residual_length=n) for n in (0, 32))
    assert held.nbytes - small.nbytes == 4 * (2 * 32 * 64 * 2 + 8)


# -- attention --------------------------------------------------------------------------------------------------------


def built(case, storage, size):
    return replace(case, storage=storage, residual_length=size).build()


def attended(q, layer, case, backend):
    options = case.options(q)
    if case.tokens == 1:
        return headkv.ragged_decode(q[:, :, 0], layer, backend=backend, **options)[:, :, None]
    return headkv.ragged_extend(q, layer, backend=backend, **options)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "backend, storage, size",
    [("reference", "int4", 5), ("rust", "int4", 5), ("rust", "int8", 64), ("rust", "k8v4", 1)],
)
def test_attention_is_that_of_what_rows_say(case, backend, storage, size):
    """Against float64 over the rows' entries, the newest as they came, the others restored from codes."""
    q, layer = built(case, storage, size)
    want, got = truth(case, q, layer), attended(q, layer, case, backend)
    assert got.dtype == q.dtype and bool(got.isfinite().all())
    error = (got.double() - want).abs()
    assert bool((error <= case.within_codes(want, backend)).all()), float(error.max())


@pytest.mark.parametrize("isa", OTHERS)
@pytest.mark.parametrize("case", [case for case in CASES if case.tokens > 1], ids=lambda case: case.name)
def test_every_instruction_set(isa, case):
    q, layer = built(case, "int8", 7)
    rule = Rule.of(layer.head_dim, *(case.options(q).get(name) for name in RULE))
    last = torch.arange(layer.seen - case.tokens, layer.seen).expand(q.shape[0], -1)
    got = rust_attention.extend(q, layer, rule, query_positions=last, isa=isa)
    want = attended(q, layer, case, "reference")
    torch.testing.assert_close(
        got, want, rtol=4 * torch.finfo(case.dtype).eps + 1e-5, atol=max(1e-5, case.error_over_codes("rust"))
    )


@pytest.mark.parametrize("backend", ["reference", "rust"])
@pytest.mark.parametrize("where", ["rings", "codes"])
def test_what_is_no_number_is_seen_where_it_is_read(where, backend):
    """In the rings alone, of a newest entry; in the codes alone, of one whose codes nobody reads."""
    case = Case("a key that is no number", ((40, 30),), storage="int4", residual_length=5)
    q, layer = case.build()
    if where == "rings":
        layer.residual_keys[1, (30 - 2) % 5] = torch.nan
    else:
        layer.scales[int(layer.start[1]) + 28] = torch.nan
    finite = attended(q, layer, case, backend).isfinite()
    assert bool(finite[:, :2].all()) and bool(finite[:, 2:].all()) == (where == "codes")


# -- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["greedy", "beam search", "prompt lookup", "chunked prefill"])
@pytest.mark.parametrize("backend", ["rust", "reference"])
def test_rings_for_all_entries_lose_nothing(way, backend):
    """A masked full cache in full precision, though all entries have codes of 4 bits."""
    more = {"storage": "int4", "residual_length": 500, "backend": backend}
    as_masked(tiny_model("llama"), METHODS["AdaKV"], way, rounds=False, **more)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_drafts_are_verified_over_short_rings(size):
    """More drafts at once than rings hold, and most of them taken back: both backends say the same all the way."""
    model, told = tiny_model("llama"), []
    for backend in ("rust", "reference"):
        how = {"storage": "int4", "residual_length": size, "backend": backend}
        cache = headkv.RaggedCache.for_model(model, METHODS["AdaKV"], **how)
        told.append((generate(model, "prompt lookup", cache, tokens=40), cache))
    assert torch.equal(told[0][0], told[1][0])
    for one, other in zip(told[0][1].layers, told[1][1].layers, strict=True):
        for name in ("residual_count", "residual_keys", "residual_values"):
            torch.testing.assert_close(getattr(one.ragged, name), getattr(other.ragged, name))


def test_the_question_is_nearer_to_the_full_cache():
    """The same prompt and continuation: with what was read last as it came, the answer's distribution is nearer."""
    model = tiny_model("llama")
    ids = torch.randint(3, 97, (1, 80), generator=torch.Generator().manual_seed(0))

    def logits(**how):
        cache = headkv.RaggedCache.for_model(model, headkv.FullCache(), **how)
        with torch.no_grad():
            model(ids[:, :60], past_key_values=cache, logits_to_keep=1)
            return model(ids[:, 60:], past_key_values=cache).logits.log_softmax(-1)

    want = logits()
    kl = [float((want.exp() * (want - logits(storage="int4", residual_length=n))).sum()) for n in (0, 20)]
    assert 0 < kl[1] < 0.8 * kl[0], kl


def test_sessions_take_it():
    model = tiny_model("llama")
    with headkv.compress(model, METHODS["AdaKV"], storage="int4", residual_length=7) as session:
        generate(model)
    assert {layer.ragged.residual_length for layer in session.cache.layers} == {7}
    made = headkv.RaggedCache.for_model(model, METHODS["AdaKV"], storage="int4", residual_length=7)
    generate(model, cache=made)
    assert torch.equal(made.lengths(), session.cache.lengths()) and made.nbytes == session.cache.nbytes


def test_a_cache_from_a_file_goes_on_so(tmp_path):
    """Another prompt is stored as the one that was saved, and what was taken back is not in the file."""
    model, how = tiny_model("llama"), {"storage": "int4", "residual_length": 7}
    cache = headkv.RaggedCache.for_model(model, METHODS["AdaKV"], **how)
    generate(model, cache=cache)
    cache.crop(-3)
    assert bool((cache.layers[0].ragged.residual_count == 4).all())
    cache.save(tmp_path / "cache")
    loaded = headkv.RaggedCache.load(tmp_path / "cache", model, method=METHODS["AdaKV"])
    rings, was = (x.layers[0].ragged for x in (loaded, cache))
    here = residual.entries_in_slots(rings.length, 7) >= (rings.length - 4)[:, None]
    assert torch.equal(rings.residual_keys[here], was.residual_keys[here])
    assert not rings.residual_keys[~here].any() and bool(was.residual_keys[~here].any())
    loaded.reset()
    generate(model, cache=loaded)
    assert {(x.ragged.storage, x.ragged.residual_length) for x in loaded.layers} == {("int4", 7)}


@pytest.mark.parametrize(
    "storage, length, error, message",
    [
        (
            "model",
            8,
            ValueError,
            "residual_length must be 0 with storage 'model', which rounds nothing, got 8",
        ),
        ("int4", -1, ValueError, "residual_length must be an int of at least 0, got -1"),
        ("int4", 2.0, TypeError, "residual_length must be an int of at least 0, got 2.0"),
        ("int8", True, TypeError, "residual_length must be an int of at least 0, got True"),
    ],
)
def test_what_does_not_fit_is_refused_on_entry(storage, length, error, message):
    model, entries = tiny_model("llama"), torch.randn(1, 1, 3, 8)
    for make in (headkv.compress, headkv.RaggedCache.for_model):
        with pytest.raises(error, match=message):
            make(model, METHODS["AdaKV"], storage=storage, residual_length=length)
    layer = RaggedLayer.from_dense(entries, entries)
    for call in (
        layer.quantise,
        lambda *how: RaggedLayer.from_dense(entries, entries, storage=how[0], residual_length=how[1]),
    ):
        with pytest.raises(error, match=message):
            call(storage, length)
    assert layer.storage == "model" and layer.residual_length == 0


def test_another_length_comes_too_late():
    layer = RaggedLayer.from_dense(*torch.randn(2, 1, 2, 9, 8), storage="int4", residual_length=4)
    held = layer.residual_keys
    layer.quantise("int4", 4)
    assert layer.residual_keys is held
    with pytest.raises(
        ValueError, match="must be 'int4' and 4, as entries are rounded once, got 'int4' and 5"
    ):
        layer.quantise("int4", 5)
