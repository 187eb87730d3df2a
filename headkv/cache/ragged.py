"""One layer's ragged key/value store: every row keeps its own number of entries, and only those are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from headkv.cache import checks, layout, moves
from headkv.cache.layout import Pools

MIN_HEADROOM = 64  # free slots a row gets at least when its pool is rewritten
HEADROOM_SHARE = 1 / 16  # and this share of the mean row, so that rewriting costs O(1) a token, amortised


class Row(NamedTuple):
    """The entries of one row: `keys`, `values` `[n, D]`, `positions` `[n]` int32 (views into the pools)."""

    keys: Tensor
    values: Tensor
    positions: Tensor


class Sums(NamedTuple):
    """What compensating rows have dropped: sums `[rows, D]` float32, and how many `[rows]` int64, -1 for other rows."""

    keys: Tensor
    values: Tensor
    number: Tensor

    @classmethod
    def none(cls, compensate: Tensor, head_dim: int) -> Sums:
        """Nothing yet, for the rows where `compensate`, `[B, H]` bool."""
        number = compensate.reshape(-1).long() - 1
        keys = torch.zeros(number.numel(), head_dim, device=number.device)
        return cls(keys, torch.zeros_like(keys), number)

    @torch.no_grad()
    def including(self, pools: Pools, rows: Tensor, slots: Tensor) -> Sums:
        """A copy with the entries at `slots` of the compensating `rows`, `[m]` each, added."""
        new = Sums(*(old.clone() for old in self))
        # In parts, which bounds the float32 copies.
        for some_rows, some_slots in zip(rows.split(8192), slots.split(8192), strict=True):
            new.keys.index_add_(0, some_rows, pools.keys[some_slots].float())
            new.values.index_add_(0, some_rows, pools.values[some_slots].float())
        new.number.index_add_(0, rows, torch.ones_like(rows))
        return new


@dataclass(frozen=True)
class LayerSnapshot:
    """A copy of everything that `RaggedLayer.restore` needs."""

    tensors: dict[str, Tensor | None]
    numbers: dict[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes that the copy holds."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors.values() if t is not None)


class RaggedLayer:
    """The flattened cache of one decoder layer. A row is one (batch, KV head) pair, `row = b * H + h`.

    Every change is all or nothing: what needs memory comes first, so that a layer is as it was after an
    `OutOfMemoryError`, and the call can be made again.

    Attributes (all tensors on one device):
        keys, values: `[slots, D]` float32, bfloat16 or float16, the flat pools.
        positions: `[slots]` int32, where in the text each entry came from (padding counts, but is never stored).
        start, length, capacity: `[rows]` int64; row `r` owns `capacity[r]` slots from `start[r]`, `length[r]` are used.
        sinks, recent: `[rows]` int64. `recent > 0` makes a windowed row: attention sees its first `sinks` and its last
            `recent` entries, and what lies between is dropped when the row's head room is used up.
        key_sum, value_sum, count: `[rows, D]` float32 twice, `[rows]` int64, or None when no row compensates:
            what compensating rows have dropped so far (RazorAttention, arXiv 2407.15891); `count` is -1 for
            the rows that do not compensate.
        evicted_end: `[rows]` int64, one more than the last position that was ever dropped from the row (0: none).
        seen: logical tokens so far, also those that are no longer stored.
        rollback: hidden entries that a trimmed windowed row still holds, so that `crop` can undo as many tokens.
        ticket: `[1]` int32 that the Triton kernels count with, made when they first run; no part of the contents.
    """

    _TENSORS = (
        *("keys", "values", "positions", "start", "length", "capacity", "sinks", "recent"),
        *("key_sum", "value_sum", "count", "evicted_end"),
    )
    _NUMBERS = ("batch_size", "num_kv_heads", "seen", "rollback", "_free")

    keys: Tensor
    values: Tensor
    positions: Tensor
    start: Tensor
    length: Tensor
    capacity: Tensor
    sinks: Tensor
    recent: Tensor
    key_sum: Tensor | None
    value_sum: Tensor | None
    count: Tensor | None
    evicted_end: Tensor
    batch_size: int
    num_kv_heads: int
    seen: int
    rollback: int
    ticket: Tensor | None = None
    _free: int  # tokens that fit into every row for certain: a lower bound kept on the host, so that nothing waits

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
        layer = cls._bare(
            keys, values, torch.cat(where).to(keys.device, torch.int32), batch_size, num_kv_heads, seen
        )
        layer.length = length
        layer.capacity = length.clone()
        layer.start = layout.starts(length)
        layer.set_windows(sinks, recent)
        if headroom:
            layer._rewrite(layer.capacity + checks.count("headroom", headroom))
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

        Raises:
            ValueError, TypeError: on tensors that do not fit together, or on a row that would be left empty.
        """
        checks.dense(keys, values)
        batch_size, num_kv_heads, n, _ = keys.shape
        grid, rows = (batch_size, num_kv_heads), batch_size * num_kv_heads
        valid = checks.valid(valid, keys)
        keep = checks.keep(keep, (*grid, n), keys.device)
        headroom, rollback = checks.count("headroom", headroom), checks.count("rollback", rollback)
        checks.window_tensors(sinks, recent, compensate, grid, keys.device)
        everything = keys.new_ones((), dtype=torch.bool) if valid is None else valid[:, None]
        everything = everything.expand(*grid, n).reshape(rows, n)
        wanted = everything if keep is None else everything & keep.reshape(rows, n)

        pools, start, step = layout.of_dense(keys, values)
        layer = cls._bare(*pools, batch_size, num_kv_heads, n)
        layer.rollback, layer.start = rollback, start
        layer.sinks, layer.recent = (layer._per_row(x) for x in (sinks, recent))
        empty, folds = checks.contents(wanted.sum(1), layer.sinks, layer.recent, compensate)
        if empty:
            batch, head = divmod(int((~wanted.any(1)).nonzero()[0]), num_kv_heads)
            why = (
                "is all padding"
                if not bool(everything[batch * num_kv_heads].any())
                else "would be left empty by keep"
            )
            raise ValueError(
                f"row (batch {batch}, head {head}) {why}; every row must store at least one entry"
            )
        sums = None if compensate is None or not folds else Sums.none(compensate, layer.head_dim)
        layer._keep_only(wanted, everything & ~wanted, headroom, sums, step)
        return layer

    @classmethod
    def _bare(
        cls, keys: Tensor, values: Tensor, positions: Tensor, batch_size: int, heads: int, seen: int
    ) -> RaggedLayer:
        layer = cls.__new__(cls)
        layer.keys, layer.values, layer.positions = keys, values, positions
        layer.batch_size, layer.num_kv_heads, layer.seen = batch_size, heads, seen
        layer.key_sum = layer.value_sum = layer.count = None
        layer.evicted_end = torch.zeros(batch_size * heads, dtype=torch.int64, device=keys.device)
        layer.rollback = layer._free = 0
        return layer

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
        windows = self._per_row(sinks), self._per_row(recent)
        _, folds = checks.contents(self.length, *windows, compensate)
        sums = None if compensate is None or not folds else Sums.none(compensate, self.head_dim)
        self._let_go()
        self.sinks, self.recent = windows
        if sums is not None:
            self.key_sum, self.value_sum, self.count = sums

    def _per_row(self, given: int | Tensor) -> Tensor:
        if isinstance(given, Tensor):
            return given.reshape(-1).to(self.device, torch.int64, copy=True)
        return torch.full((self.rows,), given, dtype=torch.int64, device=self.device)

    # -- looking ----------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Number of rows, `batch_size * num_kv_heads`."""
        return self.batch_size * self.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Width D of a key and of a value."""
        return self.keys.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype of keys and values."""
        return self.keys.dtype

    @property
    def device(self) -> torch.device:
        """Where the pools are."""
        return self.keys.device

    @property
    def nbytes(self) -> int:
        """Bytes that this layer holds from the allocator: pools with their head room, and all bookkeeping."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._held()}
        return sum(storages.values())

    def lengths(self) -> Tensor:
        """Stored entries of each row, `[B, H]` int64."""
        return self.length.view(self.batch_size, self.num_kv_heads).clone()

    def row(self, batch: int, head: int) -> Row:
        """The entries of one row, oldest first."""
        if not (0 <= batch < self.batch_size and 0 <= head < self.num_kv_heads):
            allowed = f"batch in [0, {self.batch_size}) and head in [0, {self.num_kv_heads})"
            raise IndexError(f"row(batch={batch}, head={head}) does not exist; allowed: {allowed}")
        r = batch * self.num_kv_heads + head
        here = slice(int(self.start[r]), int(self.start[r] + self.length[r]))
        return Row(self.keys[here], self.values[here], self.positions[here])

    def __repr__(self) -> str:
        shape = f"batch {self.batch_size} x {self.num_kv_heads} KV heads x D {self.head_dim}"
        return f"RaggedLayer({shape}, {int(self.length.sum())} entries of {self.seen} tokens a row, {self.dtype})"

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
        moves.append(self, keys, values, valid)
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
        skip = self._trimmable()
        length = self.length - skip
        free, free_trimmed = (self.capacity - self.length).min(), (self.capacity - length).min()
        figures = torch.stack([free, free_trimmed, skip.sum(), length.sum()]).tolist()
        self._free, most_free, skipped, stored = figures
        if tokens <= self._free:
            return
        noted = self._without_window(skip) if skipped else None
        if tokens <= most_free:
            self._trim_in_place(skip)
            self._free = most_free
        else:
            headroom = max(MIN_HEADROOM, int(stored / self.rows * HEADROOM_SHARE), tokens)
            # A windowed row is trimmed again when its room is used up, so that it needs no room in proportion.
            room = torch.where(self.recent > 0, max(MIN_HEADROOM, tokens), headroom)
            self._rewrite(length + room, skip)
        if noted is not None:
            self._note(*noted)

    def _trimmable(self) -> Tensor:
        """Entries `[rows]` that windowed rows hide for good: all hidden ones but the last `rollback`."""
        hidden = self.length - self.sinks - self.recent - self.rollback
        return torch.where(self.recent > 0, hidden.clamp(min=0), 0)

    def _without_window(self, skip: Tensor) -> tuple[Tensor, Sums | None]:
        """What `evicted_end` and the sums will be once `skip[r]` entries behind the sinks of row `r` are gone."""
        behind = self.start + self.sinks
        end, sums = self._evicted_end(behind + skip - 1, skip > 0), self._sums()
        if sums is not None:
            rows, offsets = layout.rows_of_slots(torch.where(sums.number >= 0, skip, 0))
            sums = sums.including(self.pools, rows, behind[rows] + offsets)
        return end, sums

    def _trim_in_place(self, skip: Tensor) -> None:
        moved = torch.where(skip > 0, self.length - self.sinks - skip, 0)
        rows, offsets = layout.rows_of_slots(moved)
        target = (self.start + self.sinks)[rows] + offsets
        kept = layout.gather(self.pools, target + skip[rows])
        layout.scatter(self.pools, target, *kept)
        with torch.inference_mode():  # in place, as a CUDA graph may hold the tensor, and whoever made it
            self.length -= skip

    def _rewrite(self, capacity: Tensor, skip: Tensor | None = None) -> None:
        """Move every row into new pools with the given capacities `[rows]`, without the trimmed entries."""
        length = self.length if skip is None else self.length - skip
        start, free = layout.starts(capacity), int((capacity - length).min())
        source = layout.source_of_rows(self.start, length, capacity, self.sinks, skip)
        self.pools = moves.gather(self.pools, source)
        self.start, self.length, self.capacity, self._free = start, length, capacity, free

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
        headroom = checks.count("headroom", headroom)
        new_sinks, new_recent = 0 if sinks is None else sinks, 0 if recent is None else recent
        checks.window_tensors(new_sinks, new_recent, compensate, grid, self.device)
        self._compensates_not_yet(compensate)
        windows = self.sinks, self.recent
        if sinks is not None or recent is not None:
            windows = self._per_row(new_sinks), self._per_row(new_recent)
        stored = torch.arange(longest, device=self.device) < self.length[:, None]
        wanted = mask.reshape(self.rows, longest) & stored
        empty, folds = checks.contents(wanted.sum(1), *windows, compensate)
        if empty:
            batch, head = divmod(int((~wanted.any(1)).nonzero()[0]), self.num_kv_heads)
            raise ValueError(
                f"keep would leave row (batch {batch}, head {head}) empty; keep at least one entry of each"
            )
        sums = self._sums()
        if sums is None and compensate is not None and folds:
            sums = Sums.none(compensate, self.head_dim)
        self._keep_only(wanted, stored & ~wanted, headroom, sums)
        self.sinks, self.recent = windows

    def trim(self, headroom: int = MIN_HEADROOM) -> None:
        """Drop now what windowed rows hide for good, and leave `headroom` free slots behind each row."""
        headroom = checks.count("headroom", headroom)
        skip = self._trimmable()
        noted = self._without_window(skip)
        self._rewrite(self.length - skip + headroom, skip)
        self._note(*noted)

    def _keep_only(
        self, wanted: Tensor, dropped: Tensor, headroom: int, sums: Sums | None, step: int = 1
    ) -> None:
        """Move the `wanted` entries into tight pools and note the `dropped` ones, both `[rows, L]` bool.

        Args:
            headroom: free slots behind each row.
            sums: of what compensating rows dropped before.
            step: slots from one entry of a row to its next.
        """
        # Positions increase along a row, so that its last dropped entry tells.
        place = torch.arange(1, dropped.shape[1] + 1, dtype=torch.int32, device=self.device)
        last = torch.where(dropped, place, 0).amax(1).long() - 1
        end = self._evicted_end(self.start + last * step, last >= 0)
        if sums is not None:
            rows, entries = (dropped & (sums.number >= 0)[:, None]).nonzero(as_tuple=True)
            sums = sums.including(self.pools, rows, self.start[rows] + entries * step)
        source, length = layout.source_of_kept(self.start, wanted, headroom, step)
        capacity = length + headroom
        start = layout.starts(capacity)
        self.pools = moves.gather(self.pools, source)
        self.start, self.length, self.capacity, self._free = start, length, capacity, headroom
        self._note(end, sums)

    def _evicted_end(self, last: Tensor, some: Tensor) -> Tensor:
        """`evicted_end` once the entries until slot `last[r]` have gone from the rows `r` where `some[r]`."""
        if self.positions.numel() == 0:
            return self.evicted_end
        position = self.positions[torch.where(some, last, 0)].long()
        return torch.where(some, torch.maximum(self.evicted_end, position + 1), self.evicted_end)

    def _compensates_not_yet(self, compensate: Tensor | None) -> None:
        if compensate is not None and self.count is not None:
            raise ValueError("compensate must be None on a layer whose rows compensate already, got a tensor")

    def _sums(self) -> Sums | None:
        if self.key_sum is None or self.value_sum is None or self.count is None:
            return None
        return Sums(self.key_sum, self.value_sum, self.count)

    def _note(self, evicted_end: Tensor, sums: Sums | None) -> None:
        """Entries have gone: take over what was computed while they were there. Allocates nothing."""
        self.evicted_end, held = evicted_end, self._sums()
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
        tokens = checks.count("tokens", tokens)
        if tokens > self.seen:
            raise ValueError(f"tokens must be at most the {self.seen} tokens seen, got {tokens}")
        if tokens == 0:
            return
        seen = self.seen - tokens
        age = torch.arange(1, tokens + 1, device=self.device)
        slots = (self.start + self.length)[:, None] - age  # [rows, tokens], newest first
        inside = age <= self.length[:, None]
        positions = self.positions[slots.clamp(min=0)] if self.positions.numel() else slots
        length = self.length - (inside & (positions >= seen)).sum(1)
        full = self.sinks + self.recent  # a window that was full must stay full
        emptied = (
            (self.recent > 0)
            & (self.length >= full)
            & (length < full)
            & (self.evicted_end > seen - self.recent)
        )
        intact = (length > 0) & ((self.evicted_end == 0) | ((self.evicted_end <= seen) & ~emptied))
        if not bool(intact.all()):
            batch, head = divmod(int((~intact).nonzero()[0]), self.num_kv_heads)
            raise ValueError(
                f"cannot crop {tokens} tokens: row (batch {batch}, head {head}) would be empty, or has evicted entries "
                f"that the text of {seen} tokens needs; crop less, or restore a snapshot taken before"
            )
        self._let_go()
        self.length, self.seen = length, seen

    # -- batch and copies -------------------------------------------------------------------------------------------

    def reorder(self, index: Tensor) -> None:
        """Make batch entry `i` a copy of batch entry `index[i]` (beam search, repeat, select). `index` `[new B]`."""
        index = checks.batch_index(index, self.batch_size).to(self.device)
        heads = torch.arange(self.num_kv_heads, device=self.device)
        rows = (index[:, None] * self.num_kv_heads + heads).reshape(-1)
        source = layout.source_of_rows(self.start[rows], self.length[rows], self.capacity[rows])
        names = ("length", "capacity", "sinks", "recent", "key_sum", "value_sum", "count", "evicted_end")
        tensors = {name: None if (old := getattr(self, name)) is None else old[rows] for name in names}
        start = layout.starts(self.capacity[rows])
        self.pools = moves.gather(self.pools, source)
        vars(self).update(tensors, start=start, batch_size=index.numel())

    def snapshot(self) -> LayerSnapshot:
        """A copy of the layer, to come back to with `restore` as often as you like."""
        tensors = {name: getattr(self, name) for name in self._TENSORS}
        copies = {name: None if t is None else t.clone() for name, t in tensors.items()}
        return LayerSnapshot(copies, {name: getattr(self, name) for name in self._NUMBERS})

    def restore(self, snapshot: LayerSnapshot) -> None:
        """Become what the layer was when `snapshot` was taken."""
        copies = {name: None if t is None else t.clone() for name, t in snapshot.tensors.items()}
        self._let_go()
        vars(self).update(copies, ticket=None, **snapshot.numbers)

    @classmethod
    def from_snapshot(cls, snapshot: LayerSnapshot) -> RaggedLayer:
        """A new layer in the state of `snapshot`."""
        layer = cls.__new__(cls)
        layer.restore(snapshot)
        return layer

    def to(self, device: torch.device | str) -> None:
        """Move everything to `device`."""
        tensors = {name: getattr(self, name) for name in self._TENSORS}
        moved = {name: None if t is None else t.to(device) for name, t in tensors.items()}
        self._let_go()
        vars(self).update(moved, ticket=None)

    def addresses(self) -> tuple[int, ...]:
        """Where everything lies that a kernel reads or writes: what a recorded CUDA graph relies on."""
        names = (*self._TENSORS, "ticket")
        tensors = (getattr(self, name) for name in names if name != "evicted_end")
        return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)

    @property
    def pools(self) -> Pools:
        """Keys, values and positions together."""
        return Pools(self.keys, self.values, self.positions)

    @pools.setter
    def pools(self, pools: Pools) -> None:
        self._let_go()
        self.keys, self.values, self.positions = pools

    def _let_go(self) -> None:
        """Before tensors are replaced, which another stream may have made: their memory waits for this stream."""
        for tensor in self._held():
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))

    def _held(self) -> list[Tensor]:
        return [t for name in (*self._TENSORS, "ticket") if (t := getattr(self, name, None)) is not None]
