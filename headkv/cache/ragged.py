"""One layer's ragged key/value store: every row keeps its own number of entries, and only those are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from headkv import _checks
from headkv.cache import batches, checks, layout, moves, quantised, residual, windows
from headkv.cache.rows import Dense, LayerSnapshot, Pools, Row, Rows
from headkv.cache.windows import Gone, Sums

Storage = Literal["model", "int8", "k8v4", "int4"]
STORAGES: tuple[Storage, ...] = get_args(Storage)
MIN_HEADROOM = 64  # free slots a row gets at least when its pool is rewritten
HEADROOM_SHARE = 1 / 16  # and this share of the mean row, so that rewriting costs O(1) a token, amortised


@dataclass(eq=False, repr=False)
class RaggedLayer(Rows):
    """The flattened cache of one decoder layer: its rows (see `Rows`), and how they grow and shrink.

    Made by `from_rows`, `from_dense` or `from_snapshot`. Every change is all or nothing: what needs memory comes first,
    so that a layer is as it was after an `OutOfMemoryError`, and the call can be made again.

    Attributes (beside those of `Rows`):
        rollback: hidden entries that a trimmed windowed row still holds, so that `crop` can undo as many tokens.
        ticket: `[1]` int32 that the Triton kernels count with, made when they first run; no part of the contents.
    """

    rollback: int = 0
    ticket: Tensor | None = None
    _free: int = (
        0  # tokens that fit into every row for certain: a lower bound on the host, so that nothing waits
    )

    # -- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Sequence[tuple[Tensor, Tensor]]],
        *,
        positions: Sequence[Sequence[Tensor]] | None = None,
        sinks: int | Tensor = 0,
        recent: int | Tensor = 0,
        headroom: int = 0,
    ) -> RaggedLayer:
        """A layer by hand: `rows[batch][head] = (keys [n, D], values [n, D])`, where `n` may differ from row to row.

        Args:
            rows: one pair of tensors a row; every batch entry has the same number of heads.
            positions: `positions[batch][head]` `[n]`, increasing; default: each row ends at the longest row's end.
            sinks, recent: for all rows (int) or for each, `[B, H]`; `recent=0` means an ordinary row.
            headroom: free slots behind each row.

        Raises:
            ValueError, TypeError: on rows that do not fit together; the message names the row.
        """
        pairs, batch_size, num_kv_heads = checks.rows(rows)
        keys, values = (torch.cat(side) for side in zip(*pairs, strict=True))
        length = torch.tensor([k.shape[0] for k, _ in pairs], device=keys.device)
        seen = int(length.max())
        if positions is None:
            where = [torch.arange(seen - k.shape[0], seen, device="cpu") for k, _ in pairs]
        else:
            where = checks.positions(positions, pairs, batch_size, num_kv_heads)
            seen = max((int(p[-1]) + 1 for p in where if p.numel()), default=0)
        pools = Pools(keys, values, torch.cat(where).to(keys.device, torch.int32))
        layer = cls._bare(pools, layout.starts(length), length, num_kv_heads, seen)
        layer.set_windows(sinks, recent)
        if headroom:
            layer._rewrite(layer.capacity + _checks.whole("headroom", headroom))
        return layer

    @classmethod
    def from_dense(
        cls,
        keys: Tensor,
        values: Tensor,
        *,
        keep: Tensor | None = None,
        valid: Tensor | None = None,
        sinks: int | Tensor = 0,
        recent: int | Tensor = 0,
        compensate: Tensor | None = None,
        headroom: int = MIN_HEADROOM,
        rollback: int = 0,
        storage: Storage = "model",
        residual_length: int = 0,
    ) -> RaggedLayer:
        """Store the kept entries of a dense prefill; padding is left out.

        Args:
            keys, values: `[B, H, n, D]`, same dtype and device.
            keep: `[B, H, n]` bool, the entries to store; default: all.
            valid: `[B, n]` bool, False where the text is padding.
            sinks, recent: as in `from_rows`.
            compensate: `[B, H]` bool, rows that remember the mean of what they drop.
            headroom: free slots behind each row.
            rollback: see the class.
            storage, residual_length: "model" and 0: entries are stored as they come; or what `quantise` takes.

        Raises:
            ValueError, TypeError: on tensors that do not fit together, or on a row that would be left empty.
        """
        checks.dense(keys, values)
        batch_size, num_kv_heads, n, _ = keys.shape
        grid, rows = (batch_size, num_kv_heads), batch_size * num_kv_heads
        valid = checks.valid(valid, keys)
        keep = checks.keep(keep, (*grid, n), keys.device)
        headroom, rollback = _checks.whole("headroom", headroom), _checks.whole("rollback", rollback)
        checks.storage(storage, STORAGES, keys.shape[-1], residual_length)
        checks.window_tensors(sinks, recent, compensate, grid, keys.device)
        everything = keys.new_ones((), dtype=torch.bool) if valid is None else valid[:, None]
        everything = everything.expand(*grid, n).reshape(rows, n)
        wanted = everything if keep is None else everything & keep.reshape(rows, n)

        pools, start, step = layout.of_dense(keys, values)
        layer = cls._bare(pools, start, torch.full_like(start, n), num_kv_heads, n)
        layer.rollback = rollback
        layer.sinks, layer.recent = (layer._per_row(x) for x in (sinks, recent))
        empty, folds = checks.contents(wanted.sum(1), layer.sinks, layer.recent, compensate)
        if empty:
            batch, head = divmod(int((~wanted.any(1)).nonzero()[0]), num_kv_heads)
            padding = not bool(everything[batch * num_kv_heads].any())
            why = "is all padding" if padding else "would be left empty by keep"
            raise ValueError(
                f"row (batch {batch}, head {head}) {why}; every row must store at least one entry"
            )
        sums = None if compensate is None or not folds else Sums.none(compensate, layer.head_dim)
        layer._keep_only(wanted, everything & ~wanted, headroom, sums, step)
        # Which of what is gone a window hides, and which was evicted, nobody says: age decides.
        behind = (n - rollback - layer.recent + 1).clamp(min=0)
        layer.trimmed_end = torch.where(layer.recent > 0, torch.minimum(layer.evicted_end, behind), 0)
        layer.quantise(storage, residual_length)
        return layer

    @classmethod
    def _bare(cls, pools: Pools, start: Tensor, length: Tensor, num_kv_heads: int, seen: int) -> RaggedLayer:
        none = torch.zeros_like(start)
        windows = none, none.clone(), none.clone(), none.clone()
        per_row = start, length, length.clone(), *windows
        return cls(pools.keys, pools.values, pools.positions, *per_row, num_kv_heads, seen)

    def set_windows(
        self, sinks: int | Tensor, recent: int | Tensor, compensate: Tensor | None = None
    ) -> None:
        """Make rows windowed: `sinks` and `recent` for all rows (int) or for each, `[B, H]`; `recent=0`: ordinary.

        Args:
            compensate: `[B, H]` bool, rows that remember the mean of what they drop from now on; default: as they were.

        Raises:
            ValueError, TypeError: on windows that do not fit, or when some rows compensate already.
        """
        grid = (self.batch_size, self.num_kv_heads)
        checks.window_tensors(sinks, recent, compensate, grid, self.device)
        self._compensates_not_yet(compensate)
        sinks, recent = self._per_row(sinks), self._per_row(recent)
        _, folds = checks.contents(self.length, sinks, recent, compensate)
        sums = None if compensate is None or not folds else Sums.none(compensate, self.head_dim)
        self.become(sinks=sinks, recent=recent)
        if sums is not None:
            self.key_sum, self.value_sum, self.count = sums

    def _per_row(self, given: int | Tensor) -> Tensor:
        if isinstance(given, Tensor):
            return given.reshape(-1).to(self.device, torch.int64, copy=True)
        return torch.full((self.rows,), given, dtype=torch.int64, device=self.device)

    def _compensates_not_yet(self, compensate: Tensor | None) -> None:
        if compensate is not None and self.count is not None:
            raise ValueError("compensate must be None on a layer whose rows compensate already, got a tensor")

    # -- looking ----------------------------------------------------------------------------------------------------

    @property
    def storage(self) -> Storage:
        """How entries are stored: "model", as they come, or as `quantise` did it."""
        return cast(Storage, quantised.storage_of(self.pools))

    @property
    def nbytes(self) -> int:
        """Bytes that this layer holds from the allocator: pools with their head room, and all bookkeeping."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._held()}
        return sum(storages.values())

    @property
    def parts(self) -> tuple[RaggedLayer, ...]:
        """Itself: of a `MixedLayer` there are several."""
        return (self,)

    @property
    def heads(self) -> tuple[tuple[int, ...], ...]:
        """Of each part the numbers of its heads."""
        return (tuple(range(self.num_kv_heads)),)

    def lengths(self) -> Tensor:
        """Stored entries of each row, `[B, H]` int64."""
        return self.length.view(self.batch_size, self.num_kv_heads).clone()

    def row(self, batch: int, head: int) -> Row:
        """The entries of one row, oldest first."""
        if not (0 <= batch < self.batch_size and 0 <= head < self.num_kv_heads):
            allowed = f"batch in [0, {self.batch_size}) and head in [0, {self.num_kv_heads})"
            raise IndexError(f"row(batch={batch}, head={head}) does not exist; allowed: {allowed}")
        r = batch * self.num_kv_heads + head
        length = int(self.length[r])
        here = slice(int(self.start[r]), int(self.start[r]) + length)
        keys, values = quantised.entries(self.pools, here)
        if self.residual_length:
            newest = int(residual.seen_as_they_came(self)[r])
            at = torch.arange(length - newest, length, device=self.device)
            residual.placed(self, keys, values, torch.full_like(at, r), at, at)
        return Row(keys, values, self.positions[here])

    def to_dense(self) -> Dense:
        """Every entry at its position in the text: the inverse of `from_dense` where nothing was evicted.

        What is not stored (evicted, or padding) holds other entries' bytes; `valid` is False where no row of a
        sequence stores the position.
        """
        source, stored = layout.source_of_text(self.start, self.length, self.positions, self.seen)
        shape = (self.batch_size, self.num_kv_heads, self.seen)
        valid = None if stored is None else stored.view(shape).any(1)
        keys, values = quantised.entries(moves.gather(self.pools, source), slice(None))
        keys, values = keys.to(self.dtype), values.to(self.dtype)
        if self.residual_length:
            entry = residual.entries_in_slots(self.length, self.residual_length)
            oldest = self.length - residual.seen_as_they_came(self)
            row, slot = (entry >= oldest[:, None]).nonzero(as_tuple=True)
            entry = entry[row, slot]
            at = row * self.seen + self.positions[self.start[row] + entry]
            residual.placed(self, keys, values, row, entry, at)
        keys, values = (x.view(*shape, -1) for x in (keys, values))
        return Dense(keys, values, valid)

    def __repr__(self) -> str:
        shape = f"batch {self.batch_size} x {self.num_kv_heads} KV heads x D {self.head_dim}"
        return f"RaggedLayer({shape}, {int(self.length.sum())} entries of {self.seen} tokens a row, {self.keys.dtype})"

    # -- growing ----------------------------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None = None) -> None:
        """Store T new tokens at the end of every row, in place: O(T) amortised, whatever is stored already.

        Args:
            keys, values: `[B, H, T, D]` in the layer's dtype and device.
            valid: `[B, T]` bool, False where the new text is padding; padding is counted but not stored.
        """
        checks.appendable(self, keys, values)
        valid = checks.valid(valid, keys)
        tokens = keys.shape[2]
        self.reserve(tokens)
        moves.append(self, keys.detach(), values.detach(), valid)
        self.advance(tokens)

    def reserve(self, tokens: int) -> None:
        """Make sure that every row has room for `tokens` more; the entries move to new pools if need be."""
        if tokens > self._free:
            self._make_room(tokens)

    def advance(self, tokens: int) -> None:
        """Count tokens that a kernel has stored, on the device, in room that was reserved."""
        self.seen += tokens
        self._free -= tokens

    def _make_room(self, tokens: int) -> None:
        skip = windows.hidden_for_good(self, self.rollback)
        length = self.length - skip
        free, free_trimmed = (self.capacity - self.length).min(), (self.capacity - length).min()
        figures = torch.stack([free, free_trimmed, skip.sum(), length.sum()]).tolist()
        self._free, most_free, skipped, stored = figures
        if tokens <= self._free:
            return
        gone = windows.trimmed(self, skip) if skipped else None
        if tokens <= most_free:
            windows.trim_in_place(self, skip)
            self._free = most_free
        else:
            headroom = max(MIN_HEADROOM, int(stored / self.rows * HEADROOM_SHARE), tokens)
            # A windowed row is trimmed again when its room is used up, so that it needs no room in proportion.
            room = torch.where(self.recent > 0, max(MIN_HEADROOM, tokens), headroom)
            self._rewrite(length + room, skip)
        if gone is not None:
            self._note(gone)

    def _rewrite(self, capacity: Tensor, skip: Tensor | None = None) -> None:
        """Move every row into new pools with the given capacities `[rows]`, without the trimmed entries."""
        length = self.length if skip is None else self.length - skip
        start, free = layout.starts(capacity), int((capacity - length).min())
        source = layout.source_of_rows(self.start, length, capacity, self.sinks, skip)
        held = None if skip is None else residual.trimmed(self, skip)
        pools = moves.gather(self.pools, source)
        self.become(
            **pools._asdict(), **_fields(held), start=start, length=length, capacity=capacity, _free=free
        )

    def quantise(self, storage: Storage = "int8", residual_length: int = 0) -> None:
        """Store entries in few bits from now on, those that are there and those that come.

        Keys and values are rotated by a Hadamard matrix (as far as a power of two divides D) and rounded to steps of a
        scale that each vector has for itself, in the layer's dtype (`headkv.cache.quantised`). What is returned, as by
        `row`, and what attention sees, is what the codes stand for, but for newest entries that are held as they came.

        Args:
            storage: "int8": 255 steps, half the bytes of 16 bits; "int4": 16 steps, about a quarter; "k8v4": keys in 8
                bits, values in 4. 4 bits take an even D. A layer that is stored so already stays as it is.
            residual_length: of each row this many newest entries are also kept in the layer's dtype, and seen so
                (`headkv.cache.residual`); every row takes the bytes of as many, however few it stores.

        Raises:
            ValueError: another storage, or entries that were rounded already, to something else.
        """
        checks.storage(storage, STORAGES, self.head_dim, residual_length)
        if (storage, residual_length) == (self.storage, self.residual_length):
            return
        if self.scales is not None:
            raise ValueError(
                f"storage and residual_length must be {self.storage!r} and {self.residual_length}, as entries are "
                f"rounded once, got {storage!r} and {residual_length!r}"
            )
        held = residual.newest(self, residual_length) if residual_length else None
        pools = self.pools.each(Tensor.detach)
        self.become(**moves.quantise(pools, quantised.BITS[storage])._asdict(), **_fields(held))

    # -- shrinking --------------------------------------------------------------------------------------------------

    def evict(
        self,
        keep: Tensor,
        *,
        sinks: int | Tensor | None = None,
        recent: int | Tensor | None = None,
        compensate: Tensor | None = None,
        headroom: int = MIN_HEADROOM,
    ) -> None:
        """Keep only some entries of each row, in new, tight pools; the old ones are freed.

        Args:
            keep: `[B, H, L]` bool with L the longest row; column `j` is the row's `j`-th entry.
            sinks, recent, compensate: as in `from_dense`; default: as the rows were.
            headroom: free slots behind each row.

        Raises:
            ValueError, TypeError: on a mask that does not fit or would leave a row empty; the layer is unchanged then.
        """
        grid, longest = (self.batch_size, self.num_kv_heads), int(self.length.max())
        mask = checks.keep(keep, (*grid, longest), self.device)
        assert mask is not None
        headroom = _checks.whole("headroom", headroom)
        new_sinks, new_recent = 0 if sinks is None else sinks, 0 if recent is None else recent
        checks.window_tensors(new_sinks, new_recent, compensate, grid, self.device)
        self._compensates_not_yet(compensate)
        window = self.sinks, self.recent
        if sinks is not None or recent is not None:
            window = self._per_row(new_sinks), self._per_row(new_recent)
        stored = torch.arange(longest, device=self.device) < self.length[:, None]
        wanted = mask.reshape(self.rows, longest) & stored
        empty, folds = checks.contents(wanted.sum(1), *window, compensate)
        if empty:
            batch, head = divmod(int((~wanted.any(1)).nonzero()[0]), self.num_kv_heads)
            raise ValueError(
                f"keep would leave row (batch {batch}, head {head}) empty; keep at least one entry of each"
            )
        sums = Sums.of(self)
        if sums is None and compensate is not None and folds:
            sums = Sums.none(compensate, self.head_dim)
        self._keep_only(wanted, stored & ~wanted, headroom, sums)
        self.sinks, self.recent = window

    def trim(self, headroom: int = MIN_HEADROOM) -> None:
        """Drop now what windowed rows hide for good, and leave `headroom` free slots behind each row."""
        headroom = _checks.whole("headroom", headroom)
        skip = windows.hidden_for_good(self, self.rollback)
        gone = windows.trimmed(self, skip)
        self._rewrite(self.length - skip + headroom, skip)
        self._note(gone)

    def _keep_only(
        self, wanted: Tensor, dropped: Tensor, headroom: int, sums: Sums | None, step: int = 1
    ) -> None:
        """Move the `wanted` entries into tight pools and note the `dropped` ones, both `[rows, L]` bool."""
        gone = windows.dropped(self, dropped, sums, step)
        source, length = layout.source_of_kept(self.start, wanted, headroom, step)
        capacity = length + headroom
        start, held = layout.starts(capacity), residual.kept(self, wanted)
        pools = moves.gather(self.pools, source)
        self.become(
            **pools._asdict(), **_fields(held), start=start, length=length, capacity=capacity, _free=headroom
        )
        self._note(gone)

    def _note(self, gone: Gone) -> None:
        """Entries have gone: take over what was computed while they were there. Allocates nothing."""
        self.evicted_end, self.trimmed_end = gone.evicted_end, gone.trimmed_end
        sums, held = gone.sums, Sums.of(self)
        if sums is None:
            return
        if held is None:
            self.key_sum, self.value_sum, self.count = sums
            return
        with torch.inference_mode():  # in place, as a CUDA graph may hold the tensors, and whoever made them
            for old, new in zip(held, sums, strict=True):
                old.copy_(new)

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens of the text (speculative decoding's rollback).

        Raises:
            ValueError: when entries would be needed that are gone; the layer is unchanged then.
        """
        self.cropping(tokens)()

    def cropping(self, tokens: int) -> Callable[[], None]:
        """`crop`, checked but still to be done, so that several layers do it or none.

        Raises:
            ValueError: as `crop`.
        """
        tokens = _checks.whole("tokens", tokens)
        if tokens > self.seen:
            raise ValueError(f"tokens must be at most the {self.seen} tokens seen, got {tokens}")
        if tokens == 0:
            return self.become
        seen = self.seen - tokens
        length, intact = windows.cropped(self, tokens)
        if not bool(intact.all()):
            batch, head = divmod(int((~intact).nonzero()[0]), self.num_kv_heads)
            raise ValueError(
                f"cannot crop {tokens} tokens: row (batch {batch}, head {head}) would be empty, or has evicted entries "
                f"that the text of {seen} tokens needs; crop less, or restore a snapshot taken before"
            )
        held = residual.cropped(self, length)
        return partial(self.become, length=length, seen=seen, residual_count=held)

    # -- batch and copies -------------------------------------------------------------------------------------------

    def reorder(self, index: Tensor) -> None:
        """Make batch entry `i` a copy of batch entry `index[i]` (beam search, repeat, select). `index` `[new B]`."""
        self.become(**batches.selected(self, index))

    def select(self, index: Tensor) -> RaggedLayer:
        """A new layer with copies of the batch entries `index` `[new B]`."""
        changes: dict[str, Any] = batches.selected(self, index)
        return replace(self, **changes, ticket=None)

    def of_heads(self, heads: Sequence[int]) -> RaggedLayer:
        """A new layer with copies of the rows of these heads."""
        changes: dict[str, Any] = batches.of_heads(self, heads)
        return replace(self, **changes, num_kv_heads=len(heads), ticket=None)

    @classmethod
    def join(cls, layers: Sequence[RaggedLayer]) -> RaggedLayer:
        """The sequences of several layers as one batch; all have seen as many tokens.

        Raises:
            ValueError: layers that do not fit together.
        """
        joined: dict[str, Any] = batches.joined(layers)
        return replace(layers[0], **joined, ticket=None, _free=min(layer._free for layer in layers))

    def snapshot(self) -> LayerSnapshot:
        """A copy of the layer, to come back to with `restore` as often as you like."""
        copies = {name: tensor.clone() for name, tensor in self.tensors() if name != "ticket"}
        numbers = {name: x for f in fields(self) if isinstance(x := getattr(self, name := f.name), int)}
        return LayerSnapshot(copies, numbers)

    def restore(self, snapshot: LayerSnapshot) -> None:
        """Become what the layer was when `snapshot` was taken."""
        copy = RaggedLayer.from_snapshot(snapshot)
        self.become(**{f.name: getattr(copy, f.name) for f in fields(copy)})

    @classmethod
    def from_snapshot(cls, snapshot: LayerSnapshot) -> RaggedLayer:
        """A new layer in the state of `snapshot`."""
        copies = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
        contents: dict[str, Any] = {**copies, **snapshot.numbers}
        return cls(**contents)

    def to(self, device: torch.device | str) -> None:
        """Move everything to `device`."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors()}
        self.become(**{**moved, "ticket": None})

    def addresses(self) -> tuple[int, ...]:
        """Where everything lies that a kernel reads or writes: what a recorded CUDA graph relies on."""
        return tuple(tensor.data_ptr() for name, tensor in self.tensors() if not name.endswith("_end"))

    def record_stream(self) -> None:
        """Let the tensors, which another stream may have made, wait for this one before their memory is used again."""
        for tensor in self._held():
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))

    def become(self, **changes: Any) -> None:
        """Take over new fields at once."""
        self.record_stream()
        for name, value in changes.items():
            setattr(self, name, value)

    def _held(self) -> list[Tensor]:
        return [tensor for _, tensor in self.tensors()]


def _fields(held: residual.Residual | None) -> dict[str, Tensor]:
    return {} if held is None else held._asdict()
