"""The rows of a ragged layer: tensors, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

SUMS = ("key_sum", "value_sum", "count")  # of `Rows`, where rows compensate


class Pools(NamedTuple):
    """The flat storage of one layer: `keys` and `values` `[slots, D]`, `positions` `[slots]` int32.

    Where keys and values are codes, `scales` `[slots, 2]` says what they stand for; see `cache.quantised`.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    scales: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Pools:
        """The same with every tensor that is there changed."""
        keys, values, positions = change(self.keys), change(self.values), change(self.positions)
        return Pools(keys, values, positions, None if self.scales is None else change(self.scales))


def channels(pool: Tensor) -> int:
    """D of what a pool holds: codes of 4 bits are two channels a byte."""
    return pool.shape[1] * (2 if pool.dtype == torch.uint8 else 1)


@dataclass(eq=False, repr=False)
class Rows:
    """Ragged rows in flat pools. A row is one (batch, KV head) pair, `row = b * H + h`.

    The kernels and the compiled extension read these tensors by these names.

    Attributes (all tensors on one device):
        keys, values: `[slots, D]` float32, bfloat16 or float16, the flat pools. Where entries are quantised: int8, or
            `[slots, D // 2]` uint8, two codes of 4 bits a byte; values may have fewer bits than keys.
        positions: `[slots]` int32, where in the text each entry came from (padding counts, but is never stored).
        start, length, capacity: `[rows]` int64; row `r` owns `capacity[r]` slots from `start[r]`, `length[r]` are used.
        sinks, recent: `[rows]` int64. `recent > 0` makes a windowed row: attention sees its first `sinks` and its last
            `recent` entries, and what lies between is dropped when the row's head room is used up.
        evicted_end: `[rows]` int64, one more than the last position that was ever dropped from the row (0: none).
        trimmed_end: `[rows]` int64, the same of what windows dropped: a text before that has holes (0: none).
        num_kv_heads: H.
        seen: logical tokens so far, also those that are no longer stored.
        key_sum, value_sum, count: `[rows, D]` float32 twice, `[rows]` int64, or None when no row compensates:
            what compensating rows have dropped so far (RazorAttention, arXiv 2407.15891); `count` is -1 for
            the rows that do not compensate.
        scales: `[slots, 2]` float32, bfloat16 or float16, of each entry the scales of its key's and of its value's
            codes; None where entries are stored as they come. See `headkv.cache.quantised`.
        residual_keys, residual_values, residual_count: `[rows, R, D]` in the dtype of the scales twice, `[rows]` int64,
            or None: newest entries beside their codes. See `headkv.cache.residual`.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    start: Tensor
    length: Tensor
    capacity: Tensor
    sinks: Tensor
    recent: Tensor
    evicted_end: Tensor
    trimmed_end: Tensor
    num_kv_heads: int
    seen: int
    key_sum: Tensor | None = None
    value_sum: Tensor | None = None
    count: Tensor | None = None
    scales: Tensor | None = None
    residual_keys: Tensor | None = None
    residual_values: Tensor | None = None
    residual_count: Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of rows, `batch_size * num_kv_heads`."""
        return self.start.numel()

    @property
    def batch_size(self) -> int:
        """Sequences, B."""
        return self.rows // self.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Width D of a key and of a value."""
        return channels(self.keys)

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values that come in: float32, bfloat16 or float16, also where they are stored as codes."""
        return self.keys.dtype if self.scales is None else self.scales.dtype

    @property
    def residual_length(self) -> int:
        """How many of each row's newest entries are held as they came, beside their codes, R; 0: none."""
        return 0 if self.residual_keys is None else self.residual_keys.shape[1]

    @property
    def compensates(self) -> bool:
        """Whether some rows remember the mean of what they drop."""
        return self.count is not None

    @property
    def device(self) -> torch.device:
        """Where the pools are."""
        return self.keys.device

    @property
    def pools(self) -> Pools:
        """Keys, values, positions, and any scales, together."""
        return Pools(self.keys, self.values, self.positions, self.scales)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that is there, by its name."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield field.name, value


class Row(NamedTuple):
    """The entries of one row: `keys`, `values` `[n, D]`, `positions` `[n]` int32.

    Views into the pools, but for keys and values that are stored as codes: those are made from them, in float32, and
    newest ones from what is held of them.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor


class Dense(NamedTuple):
    """A layer spread over its text: `keys`, `values` `[B, H, seen, D]`, `valid` `[B, seen]` bool or None (all)."""

    keys: Tensor
    values: Tensor
    valid: Tensor | None


@dataclass(frozen=True)
class LayerSnapshot:
    """A copy of everything that `RaggedLayer.restore` needs."""

    tensors: dict[str, Tensor]
    numbers: dict[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes that the copy holds."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors.values())
