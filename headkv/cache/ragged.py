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
        tickets: what the Triton kernels count with, made when they first run; no part of the contents.
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
    tickets: Tensor | None = None
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
            where = [torch.arange(seen - k.shape[0], seen) for k, _ in pairs]
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
        batch_size, num_kv_heads, n, head_dim = keys.shape
        valid = checks.valid(valid, keys)
        keep = checks.keep(keep, (batch_size, num_kv_heads, n), keys.device)
        checks.window_tensors(sinks, recent, compensate, (batch_size, num_kv_heads), keys.device)
        rows = batch_size * num_kv_heads
        everything = (
            keys.new_ones((batch_size, num_kv_heads, n), dtype=torch.bool)
            if valid is None
            else valid[:, None]
        )
        everything = everything.expand(batch_size, num_kv_heads, n).reshape(rows, n)
        wanted = everything if keep is None else everything & keep.reshape(rows, n)
        if not bool(wanted.any(1).all()):
            batch, head = divmod(int((~wanted.any(1)).nonzero()[0]), num_kv_heads)
            why = (
                "is all padding"
                if not bool(everything[batch * num_kv_heads].any())
                else "would be left empty by keep"
            )
            raise ValueError(
                f"row (batch {batch}, head {head}) {why}; every row must store at least one entry"
            )

        positions = torch.arange(n, dtype=torch.int32, device=keys.device).repeat(rows)
        layer = cls._bare(
            keys.reshape(-1, head_dim), values.reshape(-1, head_dim), positions, batch_size, num_kv_heads, n
        )
        layer.rollback = checks.count("rollback", rollback)
        layer.start = torch.arange(rows, device=keys.device) * n
        layer.length = torch.full_like(layer.start, n)
        layer.capacity = layer.length.clone()
        layer.set_windows(sinks, recent, compensate)
        layer._evict(wanted, everything, checks.count("headroom", headroom))
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
        """
        checks.window_tensors(sinks, recent, compensate, (self.batch_size, self.num_kv_heads), self.device)
        self.sinks, self.recent = (
            x.reshape(-1).to(self.device, torch.int64).clone()
            if isinstance(x, Tensor)
            else torch.full((self.rows,), x, dtype=torch.int64, device=self.device)
            for x in (sinks, recent)
        )
        self._set_compensation(compensate)

    def _set_compensation(self, compensate: Tensor | None) -> None:
        if compensate is None or not bool(compensate.any()):
            return
        self.key_sum = torch.zeros(self.rows, self.head_dim, device=self.device)
        self.value_sum = torch.zeros_like(self.key_sum)
        self.count = compensate.reshape(-1).to(self.device, torch.int64) - 1

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
        self._free = int((self.capacity - self.length).min())
        if tokens <= self._free:
            return
        skip = self._trimmable()
        self._fold_window(skip)
        length = self.length - skip
        headroom = max(MIN_HEADROOM, int(float(length.float().mean()) * HEADROOM_SHARE), tokens)
        # A windowed row is trimmed again when its room is used up, so that it needs no room in proportion.
        room = torch.where(self.recent > 0, max(MIN_HEADROOM, tokens), headroom)
        if bool((self.capacity - length >= tokens).all()):
            self._trim_in_place(skip)
        else:
            self._rewrite(length + room, skip)
        self._free = int((self.capacity - self.length).min())

    def _trimmable(self) -> Tensor:
        """Entries `[rows]` that windowed rows hide for good: all hidden ones but the last `rollback`."""
        hidden = self.length - self.sinks - self.recent - self.rollback
        return torch.where(self.recent > 0, hidden.clamp(min=0), 0)

    def _fold_window(self, skip: Tensor) -> None:
        """Before `skip[r]` entries behind the sinks of row `r` go: note how far, and add them to the row's sums."""
        rows, offsets = layout.rows_of_slots(skip)
        slots = (self.start + self.sinks)[rows] + offsets
        self._note_dropped(rows, slots)

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
        source = layout.source_of_rows(self.start, length, capacity, self.sinks, skip)
        self.pools = moves.gather(self.pools, source)
        self.start, self.length, self.capacity = layout.starts(capacity), length, capacity
        self._free = int((capacity - length).min())

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
        longest = int(self.length.max())
        mask = checks.keep(keep, (self.batch_size, self.num_kv_heads, longest), self.device)
        assert mask is not None
        headroom = checks.count("headroom", headroom)
        stored = torch.arange(longest, device=self.device) < self.length[:, None]
        wanted = mask.reshape(self.rows, longest) & stored
        if not bool(wanted.any(1).all()):
            batch, head = divmod(int((~wanted.any(1)).nonzero()[0]), self.num_kv_heads)
            raise ValueError(
                f"keep would leave row (batch {batch}, head {head}) empty; keep at least one entry of each"
            )
        new_sinks, new_recent = 0 if sinks is None else sinks, 0 if recent is None else recent
        checks.window_tensors(
            new_sinks, new_recent, compensate, (self.batch_size, self.num_kv_heads), self.device
        )
        if sinks is not None or recent is not None:
            self.set_windows(new_sinks, new_recent)
        if self.count is None:
            self._set_compensation(compensate)
        self._evict(wanted, stored, headroom)

    def trim(self, headroom: int = MIN_HEADROOM) -> None:
        """Drop now what windowed rows hide for good, and leave `headroom` free slots behind each row."""
        headroom = checks.count("headroom", headroom)
        skip = self._trimmable()
        self._fold_window(skip)
        self._rewrite(self.length - skip + headroom, skip)

    def _evict(self, wanted: Tensor, stored: Tensor, headroom: int) -> None:
        rows, entries = (stored & ~wanted).nonzero(as_tuple=True)
        self._note_dropped(rows, self.start[rows] + entries)
        source, length = layout.source_of_kept(self.start, wanted, headroom)
        self.pools = moves.gather(self.pools, source)
        self.length, self.capacity = length, length + headroom
        self.start = layout.starts(self.capacity)
        self._free = headroom

    def _note_dropped(self, rows: Tensor, slots: Tensor) -> None:
        """Entries at `slots` of `rows` (both `[m]`) are about to go."""
        if rows.numel() == 0:
            return
        self.evicted_end = self.evicted_end.scatter_reduce(0, rows, self.positions[slots].long() + 1, "amax")
        if self.count is None or self.key_sum is None or self.value_sum is None:
            return
        folded = self.count[rows] >= 0
        rows, slots = rows[folded], slots[folded]
        with torch.inference_mode():  # in place, whoever made the tensors
            for some_rows, some_slots in zip(
                rows.split(8192), slots.split(8192), strict=True
            ):  # bounds the float32 copies
                self.key_sum.index_add_(0, some_rows, self.keys[some_slots].float())
                self.value_sum.index_add_(0, some_rows, self.values[some_slots].float())
            self.count.index_add_(0, rows, torch.ones_like(rows))

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
        self.length, self.seen = length, seen

    # -- batch and copies -------------------------------------------------------------------------------------------

    def reorder(self, index: Tensor) -> None:
        """Make batch entry `i` a copy of batch entry `index[i]` (beam search, repeat, select). `index` `[new B]`."""
        index = checks.batch_index(index, self.batch_size).to(self.device)
        heads = torch.arange(self.num_kv_heads, device=self.device)
        rows = (index[:, None] * self.num_kv_heads + heads).reshape(-1)
        source = layout.source_of_rows(self.start[rows], self.length[rows], self.capacity[rows])
        self.pools = moves.gather(self.pools, source)
        for name in ("length", "capacity", "sinks", "recent", "key_sum", "value_sum", "count", "evicted_end"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor[rows])
        self.start = layout.starts(self.capacity)
        self.batch_size = index.numel()
        self.tickets = None

    def snapshot(self) -> LayerSnapshot:
        """A copy of the layer, to come back to with `restore` as often as you like."""
        tensors = {name: getattr(self, name) for name in self._TENSORS}
        copies = {name: None if t is None else t.clone() for name, t in tensors.items()}
        return LayerSnapshot(copies, {name: getattr(self, name) for name in self._NUMBERS})

    def restore(self, snapshot: LayerSnapshot) -> None:
        """Become what the layer was when `snapshot` was taken."""
        for name, tensor in snapshot.tensors.items():
            setattr(self, name, None if tensor is None else tensor.clone())
        for name, number in snapshot.numbers.items():
            setattr(self, name, number)

    @classmethod
    def from_snapshot(cls, snapshot: LayerSnapshot) -> RaggedLayer:
        """A new layer in the state of `snapshot`."""
        layer = cls.__new__(cls)
        layer.restore(snapshot)
        return layer

    def to(self, device: torch.device | str) -> None:
        """Move everything to `device`."""
        for name in self._TENSORS:
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(device))
        self.tickets = None

    def addresses(self) -> tuple[int, ...]:
        """Where everything lies that a kernel reads or writes: what a recorded CUDA graph relies on."""
        names = (*self._TENSORS, "tickets")
        tensors = (getattr(self, name) for name in names if name != "evicted_end")
        return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)

    @property
    def pools(self) -> Pools:
        """Keys, values and positions together."""
        return Pools(self.keys, self.values, self.positions)

    @pools.setter
    def pools(self, pools: Pools) -> None:
        self.keys, self.values, self.positions = pools

    def _held(self) -> list[Tensor]:
        return [t for name in (*self._TENSORS, "tickets") if (t := getattr(self, name)) is not None]
