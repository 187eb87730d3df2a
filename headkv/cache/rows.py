"""The rows of a ragged layer: tensors, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

SUMS = ("key_sum", "value_sum", "count")  # of `Rows`, where rows compensate


class Pools(NamedTuple):
    """The flat storage of one layer: `keys` and `values` `[slots, D]`, `positions` `[slots]` int32."""

    keys: Tensor
    values: Tensor
    positions: Tensor


@dataclass(eq=False, repr=False)
class Rows:
    """Ragged rows in flat pools. A row is one (batch, KV head) pair, `row = b * H + h`.

    The kernels and the compiled extension read these tensors by these names.

    Attributes (all tensors on one device):
        keys, values: `[slots, D]` float32, bfloat16 or float16, the flat pools.
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
    def pools(self) -> Pools:
        """Keys, values and positions together."""
        return Pools(self.keys, self.values, self.positions)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that is there, by its name."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield field.name, value


class Row(NamedTuple):
    """The entries of one row: `keys`, `values` `[n, D]`, `positions` `[n]` int32 (views into the pools)."""

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
