"""The ragged layer against a plain list of lists, by random sequences of operations, and its error messages."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from headkv.cache import RaggedLayer, Rows, layout
from headkv.cache.ragged import MIN_HEADROOM

HEADS, DIM = 2, 4


class ListModel:
    """What a layer should hold, as Python lists: for each row a list of (position, key, value) and what it dropped."""

    def __init__(
        self, rows: list[list[tuple]], seen: int, sinks: list[int], recent: list[int], folds: list[bool]
    ):
        self.rows, self.seen, self.sinks, self.recent, self.folds = rows, seen, sinks, recent, folds
        self.dropped: list[list[tuple]] = [[] for _ in rows]
        self.trimmed: list[list[int]] = [[] for _ in rows]  # where those stood that no eviction dropped

    def copy(self) -> ListModel:
        new = ListModel(
            [list(r) for r in self.rows], self.seen, list(self.sinks), list(self.recent), list(self.folds)
        )
        new.dropped = [list(d) for d in self.dropped]
        new.trimmed = [list(t) for t in self.trimmed]
        return new

    def visible(self, r: int) -> list[tuple]:
        row = self.rows[r]
        if self.recent[r] == 0 or len(row) <= self.sinks[r] + self.recent[r]:
            return row
        return row[: self.sinks[r]] + row[len(row) - self.recent[r] :]


class RaggedMachine(RuleBasedStateMachine):
    """Random appends, evictions, crops, reorders, snapshots and restores."""

    @initialize(
        data=st.data(),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        batch=st.integers(1, 2),
        n=st.integers(1, 12),
        headroom=st.integers(0, 3),
    )
    def start(self, data, dtype, batch, n, headroom):
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        self.dtype, self.batch = dtype, batch
        rows = batch * HEADS
        keys, values = self.tokens(n), self.tokens(n)
        valid = torch.rand(batch, n, generator=self.generator) > 0.3
        valid[:, -1] = True
        recent = data.draw(st.lists(st.sampled_from([0, 1, 3]), min_size=rows, max_size=rows))
        sinks = data.draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows))
        folds = [
            w > 0 and f
            for w, f in zip(
                recent, data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), strict=True
            )
        ]
        grid = (batch, HEADS)
        self.layer = RaggedLayer.from_dense(
            keys,
            values,
            valid=valid,
            sinks=torch.tensor(sinks).view(grid),
            recent=torch.tensor(recent).view(grid),
            compensate=torch.tensor(folds).view(grid),
            headroom=headroom,
        )
        kept = [
            [(t, keys[b, h, t], values[b, h, t]) for t in range(n) if valid[b, t]]
            for b in range(batch)
            for h in range(HEADS)
        ]
        self.model = ListModel(kept, n, sinks, recent, folds)
        self.saved = None

    def tokens(self, n):
        return torch.randn(self.batch, HEADS, n, DIM, generator=self.generator).to(self.dtype)

    @rule(n=st.integers(1, 5), padded=st.booleans())
    def append(self, n, padded):
        keys, values = self.tokens(n), self.tokens(n)
        valid = torch.rand(self.batch, n, generator=self.generator) > 0.5 if padded else None
        self.layer.append(keys, values, valid)
        for r, row in enumerate(self.model.rows):
            b, h = divmod(r, HEADS)
            row += [
                (self.model.seen + t, keys[b, h, t], values[b, h, t])
                for t in range(n)
                if valid is None or valid[b, t]
            ]
        self.model.seen += n

    @rule(headroom=st.integers(0, 2), seed=st.integers(0, 1000))
    def evict(self, headroom, seed):
        """The layer may have trimmed its windows; evict what it stores by a random mask, and the model alike."""
        lengths = self.layer.lengths().flatten().tolist()
        keep = (
            torch.rand(self.batch * HEADS, max(lengths), generator=torch.Generator().manual_seed(seed)) > 0.4
        )
        for r, length in enumerate(lengths):
            keep[r, length - 1] = True
            stored = self.stored(r)
            self.model.dropped[r] += [e for j, e in enumerate(stored) if not keep[r, j]]
            self.model.rows[r] = [e for j, e in enumerate(stored) if keep[r, j]]
        self.layer.evict(keep.view(self.batch, HEADS, -1), headroom=headroom)

    def stored(self, r):
        """The model's entries that the layer still holds; what it trimmed must have been hidden. Notes the trimmed."""
        positions = set(self.layer.row(*divmod(r, HEADS)).positions.tolist())
        gone = [e for e in self.model.rows[r] if e[0] not in positions]
        hidden = {e[0] for e in self.model.rows[r]} - {e[0] for e in self.model.visible(r)}
        assert {e[0] for e in gone} <= hidden, "only hidden entries may be trimmed"
        self.model.dropped[r] += gone
        self.model.trimmed[r] += [e[0] for e in gone]
        self.model.rows[r] = [e for e in self.model.rows[r] if e[0] in positions]
        return self.model.rows[r]

    @rule(tokens=st.integers(0, 6))
    def crop(self, tokens):
        for r in range(self.batch * HEADS):
            self.stored(r)
        before, model = self.layer.snapshot(), self.model
        seen = model.seen - tokens
        try:
            self.layer.crop(tokens)
        except ValueError:
            for name, tensor in before.tensors.items():  # nothing half-changed
                assert tensor is None or torch.equal(
                    tensor.nan_to_num(), getattr(self.layer, name).nan_to_num()
                )
            assert any(model.dropped) or any(all(e[0] >= seen for e in row) for row in model.rows)
            return
        for r, row in enumerate(model.rows):
            model.rows[r] = row = [e for e in row if e[0] < seen]
            assert all(e[0] < seen for e in model.dropped[r])
            if model.recent[r]:  # for the next token the window is as if nothing had been trimmed
                full = len(row) >= model.sinks[r] + model.recent[r] - 1
                assert full or all(position <= seen - model.recent[r] for position in model.trimmed[r])
        model.seen = seen

    @rule(data=st.data())
    def reorder(self, data):
        index = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=3))
        for r in range(self.batch * HEADS):
            self.stored(r)
        self.layer.reorder(torch.tensor(index))
        pick = [b * HEADS + h for b in index for h in range(HEADS)]
        old = self.model.copy()
        for name in ("rows", "sinks", "recent", "folds", "dropped", "trimmed"):
            side = getattr(old, name)
            setattr(self.model, name, [list(side[r]) if isinstance(side[r], list) else side[r] for r in pick])
        self.batch = len(index)

    @rule()
    def save(self):
        self.saved = (self.layer.snapshot(), self.model.copy(), self.batch)

    @rule()
    def load(self):
        if self.saved is not None:
            snapshot, model, self.batch = self.saved
            self.layer.restore(snapshot)
            self.model = model.copy()

    @invariant()
    def same_entries(self):
        if not hasattr(self, "layer"):
            return
        layer = self.layer
        assert layer.seen == self.model.seen and layer.rows == len(self.model.rows)
        for r in range(layer.rows):
            row, want = layer.row(*divmod(r, HEADS)), self.stored(r)
            assert row.positions.tolist() == [e[0] for e in want]
            assert all(
                torch.equal(k, e[1]) and torch.equal(v, e[2])
                for k, v, e in zip(row.keys, row.values, want, strict=True)
            )
            if self.model.folds[r]:
                assert layer.count[r] == len(self.model.dropped[r])
                for total, side in ((layer.key_sum[r], 1), (layer.value_sum[r], 2)):
                    want_sum = sum(
                        (e[side].double() for e in self.model.dropped[r]), torch.zeros(DIM).double()
                    )
                    torch.testing.assert_close(total.double(), want_sum, rtol=1e-4, atol=1e-4)

    @invariant()
    def rows_are_disjoint_and_roomy(self):
        if not hasattr(self, "layer"):
            return
        layer = self.layer
        assert bool((layer.length >= 0).all() and (layer.length <= layer.capacity).all())
        ends = (layer.start + layer.capacity).tolist()
        assert layer.start.tolist() == [0, *ends[:-1]] and ends[-1] == layer.keys.shape[0]
        assert layer._free <= int((layer.capacity - layer.length).min())
        for r in range(layer.rows):
            assert bool((layer.row(*divmod(r, HEADS)).positions.diff() > 0).all())

    @invariant()
    def bytes_are_counted(self):
        if hasattr(self, "layer"):
            held = {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in self.layer.snapshot().tensors.values()
                if t is not None
            }
            assert self.layer.nbytes <= sum(held.values()) + 8 * len(held)


TestRaggedMachine = RaggedMachine.TestCase
TestRaggedMachine.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


def dense(n=5, batch=1, dtype=torch.float32, dim=DIM):
    return torch.randn(batch, HEADS, n, dim).to(dtype), torch.randn(batch, HEADS, n, dim).to(dtype)


def test_worked_example_of_the_book():
    """Lengths 3, 1, 4 with head room 2: starts 0, 5, 8; one append writes slots 3, 6 and 12; 14 slots in all."""
    pair = lambda n: (torch.arange(n * 4.0).view(n, 4), torch.arange(n * 4.0).view(n, 4))  # noqa: E731
    layer = RaggedLayer.from_rows([[pair(3), pair(1), pair(4)]], headroom=2)
    assert layer.start.tolist() == [0, 5, 8] and layer.keys.shape[0] == 14
    before = layer.keys.data_ptr()
    layer.append(torch.full((1, 3, 1, 4), -1.0), torch.full((1, 3, 1, 4), -1.0))
    assert layer.keys.data_ptr() == before, "an append with head room moves nothing"
    assert (layer.keys == -1).all(1).nonzero().flatten().tolist() == [3, 6, 12]
    assert layer.lengths().tolist() == [[4, 2, 5]]


@pytest.mark.parametrize("tokens", [1, 7, MIN_HEADROOM + 1])
def test_appending_is_amortised(tokens):
    """Over many appends the pool is rewritten ever more rarely: at most once for each sixteenth of growth."""
    layer = RaggedLayer.from_dense(*dense(64), headroom=0)
    rewrites, pool = 0, layer.keys.data_ptr()
    for _ in range(1024 // tokens):
        layer.append(*dense(tokens))
        rewrites, pool = rewrites + (layer.keys.data_ptr() != pool), layer.keys.data_ptr()
    assert layer.seen == 64 + 1024 // tokens * tokens
    assert rewrites <= 1024 / MIN_HEADROOM + 1


def test_append_many_equals_append_one_by_one():
    keys, values = dense(9)
    at_once, one_by_one = (RaggedLayer.from_dense(*dense(3), headroom=1) for _ in range(2))
    one_by_one.restore(at_once.snapshot())
    at_once.append(keys, values)
    for t in range(9):
        one_by_one.append(keys[:, :, t : t + 1], values[:, :, t : t + 1])
    for h in range(HEADS):
        assert all(torch.equal(a, b) for a, b in zip(at_once.row(0, h), one_by_one.row(0, h), strict=True))


def test_evicting_frees_memory():
    """A tenth kept: the pools' storages shrink to a tenth, by torch's own count of the storage."""
    keys, values = dense(1000, dim=64)
    keep = torch.zeros(1, HEADS, 1000, dtype=torch.bool)
    keep[..., ::10] = True
    full = RaggedLayer.from_dense(keys, values, headroom=0)
    tenth = RaggedLayer.from_dense(keys, values, keep=keep, headroom=0)
    assert tenth.keys.untyped_storage().nbytes() * 10 == full.keys.untyped_storage().nbytes()
    assert tenth.nbytes < full.nbytes / 9


def test_head_dims_that_do_not_divide_the_published_kernel():
    """Trap 1 (AdaKV's append kernel): D = 80, 96, 112 at lengths where the published copies left rows uninitialised."""
    for dim, length in ((96, 1366), (96, 2731), (80, 1639), (112, 1171)):
        keys, values = dense(length, dim=dim)
        layer = RaggedLayer.from_dense(keys, values, headroom=0)
        new_keys, new_values = dense(1, dim=dim)
        layer.append(new_keys, new_values)
        for h in range(HEADS):
            assert torch.equal(layer.row(0, h).keys, torch.cat([keys[0, h], new_keys[0, h]]))
            assert torch.equal(layer.row(0, h).values, torch.cat([values[0, h], new_values[0, h]]))


def test_layout_takes_more_than_int32_elements():
    """Trap 3: slots are int64, so that slot * D may pass 2**31."""
    start = layout.starts(torch.tensor([2**31, 2**31, 5]))
    assert start.dtype == torch.int64 and start[-1] == 2**32


BAD = {
    "float64 keys": (lambda: RaggedLayer.from_dense(torch.zeros(1, 2, 3, 4).double(), torch.zeros(1, 2, 3, 4)), TypeError, "keys must be float32"),
    "int keys": (lambda: RaggedLayer.from_dense(torch.zeros(1, 2, 3, 4).int(), torch.zeros(1, 2, 3, 4)), TypeError, "got torch.int32"),
    "3-D keys": (lambda: RaggedLayer.from_dense(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)), ValueError, r"\[B, H, n, D\]"),
    "empty prompt": (lambda: RaggedLayer.from_dense(torch.zeros(1, 2, 0, 4), torch.zeros(1, 2, 0, 4)), ValueError, "no empty dimension"),
    "values of another shape": (lambda: RaggedLayer.from_dense(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 8)), ValueError, "values must have the shape"),
    "values of another dtype": (lambda: RaggedLayer.from_dense(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4).half()), TypeError, "dtype of keys"),
    "keep of ints": (lambda: RaggedLayer.from_dense(*dense(), keep=torch.ones(1, 2, 5)), TypeError, "keep must be a bool"),
    "keep of another shape": (lambda: RaggedLayer.from_dense(*dense(), keep=torch.ones(1, 2, 4).bool()), ValueError, r"\[1, 2, 5\], got \[1, 2, 4\]"),
    "keep leaves a row empty": (lambda: RaggedLayer.from_dense(*dense(), keep=torch.tensor([[[True] * 5, [False] * 5]])), ValueError, "batch 0, head 1.*left empty by keep"),
    "all padding": (lambda: RaggedLayer.from_dense(*dense(batch=2), valid=torch.tensor([[True] * 5, [False] * 5])), ValueError, "batch 1, head 0.*all padding"),
    "negative headroom": (lambda: RaggedLayer.from_dense(*dense(), headroom=-1), ValueError, "headroom must be an int of at least 0, got -1"),
    "float sinks": (lambda: RaggedLayer.from_dense(*dense(), sinks=torch.ones(1, 2), recent=1), TypeError, "sinks must be an int tensor"),
    "bool recent": (lambda: RaggedLayer.from_dense(*dense(), recent=True), TypeError, "recent must be an int of at least 0, got True"),
    "no rows": (lambda: RaggedLayer.from_rows([]), ValueError, "at least one batch entry"),
    "rows of unequal heads": (lambda: RaggedLayer.from_rows([[(torch.zeros(1, 4),) * 2] * 2, [(torch.zeros(1, 4),) * 2]]), ValueError, r"rows\[1\] must have 2 heads"),
    "rows of unequal D": (lambda: RaggedLayer.from_rows([[(torch.zeros(1, 4),) * 2, (torch.zeros(1, 8),) * 2]]), ValueError, r"rows\[0\]\[1\].*\[n, 4\]"),
    "positions that fall": (lambda: RaggedLayer.from_rows([[(torch.zeros(2, 4),) * 2]], positions=[[torch.tensor([3, 1])]]), ValueError, r"positions\[0\]\[0\] must be increasing"),
}  # fmt: skip


@pytest.mark.parametrize("make, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


BAD_CALLS = {
    "append of another dtype": (lambda layer: layer.append(*dense(1, dtype=torch.float16)), TypeError, "layer's dtype"),
    "append of another D": (lambda layer: layer.append(*dense(1, dim=8)), ValueError, r"\[1, 2, T >= 1, 4\]"),
    "append of nothing": (lambda layer: layer.append(*dense(0)), ValueError, "T >= 1"),
    "append on another device": (lambda layer: layer.append(*(t.to("meta") for t in dense(1))), ValueError, "layer's device cpu, got meta"),
    "evict to empty": (lambda layer: layer.evict(torch.zeros(1, 2, 5).bool()), ValueError, "batch 0, head 0.*empty"),
    "evict by a short mask": (lambda layer: layer.evict(torch.ones(1, 2, 4).bool()), ValueError, "keep must have shape"),
    "crop of more than seen": (lambda layer: layer.crop(6), ValueError, "at most the 5 tokens seen, got 6"),
    "negative crop": (lambda layer: layer.crop(-1), ValueError, "tokens must be an int of at least 0"),
    "reorder out of range": (lambda layer: layer.reorder(torch.tensor([1])), ValueError, r"\[0, 1\)"),
    "reorder by floats": (lambda layer: layer.reorder(torch.tensor([0.0])), TypeError, "1-D int tensor"),
    "row that is not there": (lambda layer: layer.row(0, 2), IndexError, r"head in \[0, 2\)"),
}  # fmt: skip


@pytest.mark.parametrize("call, error, message", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_calls_change_nothing(call, error, message):
    layer = RaggedLayer.from_dense(*dense())
    before = layer.snapshot()
    with pytest.raises(error, match=message):
        call(layer)
    assert before.numbers == layer.snapshot().numbers
    for name, tensor in before.tensors.items():
        assert tensor is None or torch.equal(tensor.nan_to_num(), getattr(layer, name).nan_to_num())


def test_crop_back_into_evicted_entries_is_refused():
    keep = torch.ones(1, HEADS, 10, dtype=torch.bool)
    keep[0, 1, 6] = False
    layer = RaggedLayer.from_dense(*dense(10), keep=keep)
    layer.crop(3)
    with pytest.raises(ValueError, match="head 1.*evicted entries"):
        layer.crop(1)
    assert layer.seen == 7


def test_compensation_is_said_once():
    """Rows that compensate already keep their sums: to say it again would forget them."""
    keys, values = torch.randn(2, 1, 2, 20, 8)
    layer = RaggedLayer.from_dense(
        keys, values, sinks=1, recent=4, compensate=torch.tensor([[True, False]]), headroom=0
    )
    layer.trim(1)
    before, again = layer.snapshot(), torch.tensor([[False, True]])
    for change in (
        lambda: layer.set_windows(1, 4, again),
        lambda: layer.evict(torch.ones(1, 2, int(layer.length.max()), dtype=torch.bool), compensate=again),
    ):
        with pytest.raises(
            ValueError, match="compensate must be None on a layer whose rows compensate already"
        ):
            change()
    assert all(
        torch.equal(before.tensors[name], getattr(layer, name)) for name in ("count", "key_sum", "length")
    )


def test_an_empty_layer_can_be_trimmed():
    empty = torch.zeros(0, 8)
    layer = RaggedLayer.from_rows([[(empty, empty)]], sinks=1, recent=1)
    layer.trim(3)
    assert layer.capacity.tolist() == [3] and layer.length.tolist() == [0]


@pytest.mark.parametrize("padding", [(0, 0), (0, 3), (5, 2)], ids=str)
def test_to_dense_is_the_inverse_of_from_dense(padding):
    keys, values = torch.randn(2, 2, 3, 9, 4, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(9) >= torch.tensor(padding)[:, None]
    layer = RaggedLayer.from_dense(keys, values, valid=valid if sum(padding) else None, headroom=2)
    got = layer.to_dense()
    assert (got.valid is None) == (sum(padding) == 0)
    assert got.valid is None or torch.equal(got.valid, valid)
    real = valid[:, None].expand(2, 3, 9)
    assert torch.equal(got.keys[real], keys[real]) and torch.equal(got.values[real], values[real])


def test_to_dense_says_where_a_sequence_stores_something():
    keys = torch.arange(6.0).view(1, 1, 6, 1).expand(1, 2, 6, 1).contiguous()
    keep = torch.tensor([[[1, 0, 0, 0, 1, 0], [0, 0, 0, 1, 1, 0]]]).bool()
    dense = RaggedLayer.from_dense(keys, keys, keep=keep).to_dense()
    assert dense.valid.tolist() == [[True, False, False, True, True, False]]
    assert (dense.keys[0, 0, [0, 4], 0].tolist(), dense.keys[0, 1, [3, 4], 0].tolist()) == ([0, 4], [3, 4])


def test_a_layer_is_made_by_its_rows():
    with pytest.raises(TypeError, match="missing .* required positional arguments: 'keys', 'values'"):
        RaggedLayer()


def test_select_leaves_the_layer_as_it_was():
    keys, values = torch.randn(2, 3, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    layer = RaggedLayer.from_dense(keys, values, headroom=1)
    chosen = layer.select(torch.tensor([2]))
    assert (layer.batch_size, chosen.batch_size) == (3, 1)
    chosen.append(*torch.ones(2, 1, 2, 1, 4))
    assert torch.equal(chosen.row(0, 1).keys[:5], keys[2, 1]) and layer.lengths().tolist() == [[5, 5]] * 3


def test_the_kernels_read_rows_by_the_same_names():
    """What `headkv_kernels.Rows` describes for itself, as it knows nothing of headkv, are fields of `Rows`."""
    kernels = pytest.importorskip("headkv_kernels.rows", reason="needs Triton: pip install triton")
    ours, theirs = ({f.name for f in dataclasses.fields(rows)} for rows in (Rows, kernels.Rows))
    assert ours - theirs == {"capacity", "evicted_end", "trimmed_end", "num_kv_heads", "seen"}
    assert theirs < ours
