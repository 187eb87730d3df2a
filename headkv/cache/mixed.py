"""A layer whose heads are stored in different ways: one ragged layer for each storage, over the heads that have it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headkv.cache import checks
from headkv.cache.ragged import MIN_HEADROOM, STORAGES, RaggedLayer, Storage
from headkv.cache.residual import NAMES as RESIDUAL
from headkv.cache.rows import SUMS, Dense, LayerSnapshot, Row

Heads = tuple[int, ...]  # KV heads of a layer, in ascending order


@dataclass(frozen=True)
class MixedSnapshot:
    """A copy of everything that `MixedLayer.restore` needs: of each part, and which heads it has."""

    parts: tuple[LayerSnapshot, ...]
    heads: tuple[Heads, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that the copy holds."""
        return sum(part.nbytes for part in self.parts)


class MixedLayer:
    """One decoder layer in parts, each a `RaggedLayer` with some of the heads. It is used as a `RaggedLayer` is.

    What is asked of it is asked of each part, for its heads; heads are numbered as in the model throughout. A change is
    all or nothing here, too: parts change in copies first, which share what they do not replace.

    Attributes:
        parts: their KV heads are all heads of the layer, each once.
        heads: of each part the numbers of its heads, ascending.

    Raises:
        ValueError: parts that do not make up one layer.
    """

    def __init__(self, parts: Sequence[RaggedLayer], heads: Sequence[Sequence[int]]) -> None:
        self.parts, self.heads = tuple(parts), tuple(map(tuple, heads))
        every = sorted(h for own in self.heads for h in own)
        if every != list(range(len(every))) or any(list(own) != sorted(own) for own in self.heads):
            raise ValueError(f"heads must hold each of a layer's heads once, ascending, got {self.heads}")
        if [part.num_kv_heads for part in self.parts] != [len(own) for own in self.heads]:
            got = [part.num_kv_heads for part in self.parts]
            raise ValueError(f"parts must have as many heads as `heads` says, {self.heads}, got {got}")
        alike = {(x.batch_size, x.seen, x.rollback, x.head_dim, x.dtype, x.device) for x in self.parts}
        if len(alike) != 1:
            raise ValueError(
                f"parts must be alike in batch, tokens seen, rollback, D, dtype and device, got {list(alike)}"
            )
        self.where = [_where(own, self.device) for own in self.heads]

    @classmethod
    def of(cls, layer: RaggedLayer, storages: Sequence[Storage], residual_length: int = 0) -> MixedLayer:
        """The entries of `layer`, which are not quantised, in the storage that each head has in `storages`.

        Args:
            residual_length: of the heads that are quantised; see `RaggedLayer.quantise`.

        Raises:
            ValueError: not one storage a head, or one that there is not; the layer stays as it is.
        """
        if len(storages) != layer.num_kv_heads:
            raise ValueError(
                f"storages must hold one for each of the {layer.num_kv_heads} heads, got {list(storages)}"
            )
        for storage in storages:
            checks.storage(storage, STORAGES, layer.head_dim)
        heads = [[h for h, own in enumerate(storages) if own == storage] for storage in STORAGES]
        parts = []
        for storage, own in zip(STORAGES, heads, strict=True):
            if own:
                parts.append(layer.of_heads(own))
                if storage != "model":
                    parts[-1].quantise(storage, residual_length)
        return cls(parts, [own for own in heads if own])

    # -- looking ----------------------------------------------------------------------------------------------------

    @property
    def num_kv_heads(self) -> int:
        """H."""
        return sum(map(len, self.heads))

    @property
    def batch_size(self) -> int:
        """Sequences, B."""
        return self.parts[0].batch_size

    @property
    def head_dim(self) -> int:
        """Width D of a key and of a value."""
        return self.parts[0].head_dim

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values that come in."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the pools are."""
        return self.parts[0].device

    @property
    def seen(self) -> int:
        """Tokens so far, also those that are no longer stored."""
        return self.parts[0].seen

    @property
    def storage(self) -> tuple[Storage, ...]:
        """How the entries of each head are stored."""
        named = {h: part.storage for part, own in self._each() for h in own}
        return tuple(named[h] for h in range(len(named)))

    @property
    def residual_length(self) -> int:
        """How many of a row's newest entries are held as they came, where heads are quantised."""
        return max(part.residual_length for part in self.parts)

    @property
    def rollback(self) -> int:
        """Hidden entries that a trimmed windowed row still holds."""
        return self.parts[0].rollback

    @rollback.setter
    def rollback(self, tokens: int) -> None:
        for part in self.parts:
            part.rollback = tokens

    @property
    def recent(self) -> Tensor:
        """`[rows]` int64, the window of each row; 0: none."""
        return self._of_rows([part.recent for part in self.parts]).flatten()

    @property
    def compensates(self) -> bool:
        """Whether some rows remember the mean of what they drop."""
        return any(part.compensates for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes that this layer holds from the allocator: pools with their head room, and all bookkeeping."""
        indices = sum(where.nbytes for where in self.where if isinstance(where, Tensor))
        return indices + sum(part.nbytes for part in self.parts)

    def lengths(self) -> Tensor:
        """Stored entries of each row, `[B, H]` int64."""
        return self._of_rows([part.length for part in self.parts])

    def row(self, batch: int, head: int) -> Row:
        """The entries of one row, oldest first."""
        for part, own in self._each():
            if head in own:
                return part.row(batch, own.index(head))
        raise IndexError(
            f"row(batch={batch}, head={head}) does not exist; allowed: head in [0, {self.num_kv_heads})"
        )

    def to_dense(self) -> Dense:
        """Every entry at its position in the text; see `RaggedLayer.to_dense`."""
        dense = [part.to_dense() for part in self.parts]
        shape = self.batch_size, self.num_kv_heads, self.seen, self.head_dim
        keys, values = (dense[0].keys.new_empty(shape) for _ in range(2))
        for own, where in zip(dense, self.where, strict=True):
            keys[:, where], values[:, where] = own.keys, own.values
        masks = [own.valid for own in dense if own.valid is not None]
        return Dense(keys, values, torch.stack(masks).any(0) if len(masks) == len(dense) else None)

    def __repr__(self) -> str:
        shape = f"batch {self.batch_size} x {self.num_kv_heads} KV heads x D {self.head_dim}"
        heads = ", ".join(f"heads {', '.join(map(str, own))} in {part.storage}" for part, own in self._each())
        return (
            f"MixedLayer({shape}, {int(self.lengths().sum())} entries of {self.seen} tokens a row, {heads})"
        )

    # -- growing ----------------------------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None = None) -> None:
        """Store T new tokens `[B, H, T, D]` at the end of every row, in place; see `RaggedLayer.append`."""
        checks.appendable(self, keys, values)
        valid = checks.valid(valid, keys)
        self.reserve(keys.shape[2])
        before = [_written(part) for part in self.parts]
        try:
            for part, where in zip(self.parts, self.where, strict=True):
                part.append(keys[:, where], values[:, where], valid)
        except BaseException:
            for part, changes in zip(self.parts, before, strict=True):
                part.become(**changes)
            raise

    def reserve(self, tokens: int) -> None:
        """Make sure that every row has room for `tokens` more."""
        for part in self.parts:
            part.reserve(tokens)

    def advance(self, tokens: int) -> None:
        """Count tokens that kernels have stored, on the device, in room that was reserved."""
        for part in self.parts:
            part.advance(tokens)

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
        """Keep only some entries of each row, `[B, H, L]` bool; see `RaggedLayer.evict`."""
        lengths = self.lengths()
        grid = (self.batch_size, self.num_kv_heads)
        mask = checks.keep(keep, (*grid, int(lengths.max())), self.device)
        assert mask is not None
        checks.window_tensors(
            0 if sinks is None else sinks, 0 if recent is None else recent, compensate, grid, self.device
        )

        def change(part: RaggedLayer, where: Any) -> None:
            own = mask[:, where, : int(part.length.max())]
            given = {"sinks": sinks, "recent": recent, "compensate": compensate}
            windows: dict[str, Any] = {
                name: x[:, where] if isinstance(x, Tensor) else x for name, x in given.items()
            }
            part.evict(own, **windows, headroom=headroom)

        self._change(change)

    def trim(self, headroom: int = MIN_HEADROOM) -> None:
        """Drop now what windowed rows hide for good, and leave `headroom` free slots behind each row."""
        self._change(lambda part, where: part.trim(headroom))

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens of the text; see `RaggedLayer.crop`."""
        self.cropping(tokens)()

    def cropping(self, tokens: int) -> Callable[[], None]:
        """`crop`, checked but still to be done.

        Raises:
            ValueError: as `RaggedLayer.crop`.
        """
        cropped = []
        for part, own in self._each():
            with _of_part(own):
                cropped.append(part.cropping(tokens))

        def crop() -> None:
            for one in cropped:
                one()

        return crop

    # -- batch and copies -------------------------------------------------------------------------------------------

    def reorder(self, index: Tensor) -> None:
        """Make batch entry `i` a copy of batch entry `index[i]`. `index` `[new B]`."""
        self._change(lambda part, where: part.reorder(index))

    def snapshot(self) -> MixedSnapshot:
        """A copy of the layer, to come back to with `restore` as often as you like."""
        return MixedSnapshot(tuple(part.snapshot() for part in self.parts), self.heads)

    def restore(self, snapshot: MixedSnapshot) -> None:
        """Become what the layer was when `snapshot` was taken."""
        self._become(MixedLayer.from_snapshot(snapshot))

    @classmethod
    def from_snapshot(cls, snapshot: MixedSnapshot) -> MixedLayer:
        """A new layer in the state of `snapshot`."""
        return cls([RaggedLayer.from_snapshot(part) for part in snapshot.parts], snapshot.heads)

    def to(self, device: torch.device | str) -> None:
        """Move everything to `device`."""
        self._change(lambda part, where: part.to(device))

    def addresses(self) -> tuple[int, ...]:
        """Where everything lies that a kernel reads or writes."""
        own = (where.data_ptr() for where in self.where if isinstance(where, Tensor))
        return (*own, *(address for part in self.parts for address in part.addresses()))

    def _each(self) -> Iterator[tuple[RaggedLayer, Heads]]:
        return zip(self.parts, self.heads, strict=True)

    def _of_rows(self, given: Sequence[Tensor]) -> Tensor:
        """What parts have for each of their rows, as `[B, H]`."""
        every = given[0].new_empty(self.batch_size, self.num_kv_heads)
        for own, where in zip(given, self.where, strict=True):
            every[:, where] = own.view(self.batch_size, -1)
        return every

    def _change(self, change: Callable[[RaggedLayer, Any], None]) -> None:
        """Do this to every part, or to none."""
        changed = []
        for part, own, where in zip(self.parts, self.heads, self.where, strict=True):
            changed.append(replace(part, **_written(part)))
            with _of_part(own):
                change(changed[-1], where)
        self._become(MixedLayer(changed, self.heads))

    def _become(self, other: MixedLayer) -> None:
        """Take over the parts of `other`."""
        for part in self.parts:
            part.record_stream()
        self.parts, self.heads, self.where = other.parts, other.heads, other.where


Store = RaggedLayer | MixedLayer


def stored_in(layer: RaggedLayer, storage: Storage | Sequence[Storage], residual_length: int = 0) -> Store:
    """The entries of `layer`, which are not quantised, in one storage for all heads, or in one for each.

    One for all is the layer itself, quantised; of several it has what each head has, and may go.
    """
    if not isinstance(storage, str):
        if len(set(storage)) > 1:
            return MixedLayer.of(layer, storage, residual_length)
        storage = storage[0]
    layer.quantise(storage, 0 if storage == "model" else residual_length)
    return layer


def from_snapshot(snapshot: LayerSnapshot | MixedSnapshot) -> Store:
    """A new layer in the state of `snapshot`."""
    if isinstance(snapshot, MixedSnapshot):
        return MixedLayer.from_snapshot(snapshot)
    return RaggedLayer.from_snapshot(snapshot)


def _written(part: RaggedLayer) -> dict[str, Any]:
    """Copies of what an append, or a note of what was dropped, changes in place, and what it counts."""
    names = ("length", *SUMS, *RESIDUAL)
    copies: dict[str, Any] = {name: x.clone() for name in names if (x := getattr(part, name)) is not None}
    return copies | {"seen": part.seen, "_free": part._free}


def _where(heads: Heads, device: torch.device) -> slice | Tensor:
    """What takes these heads of a dimension: a slice, which copies nothing, where they stand in a row."""
    if list(heads) == list(range(heads[0], heads[-1] + 1)):
        return slice(heads[0], heads[-1] + 1)
    return torch.tensor(heads, device=device)


@contextmanager
def _of_part(heads: Heads) -> Iterator[None]:
    """Errors that number the heads of a part say which those are."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"of the heads {', '.join(map(str, heads))} alone: {error}") from error
