"""What the kernels are given, in named tuples: a kernel reads `rows.length` as the launcher does.

None stands for what a launch does without. Triton compiles a kernel for what is there, so that `if new is not None`
costs nothing in it. Its own tuples have an attribute `values`, hence names in the singular; and 3.6 can not compare a
tuple that holds None, so that `New`, which may itself be None, holds none.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Strided(NamedTuple):
    """A tensor `[B, H, D]` or `[B, H, T, D]`, and its strides except D's, which is 1."""

    data: Tensor
    batch: int
    head: int
    token: int = 0

    @classmethod
    def of(cls, tensor: Tensor) -> Strided:
        """That tensor."""
        return cls(tensor, *tensor.stride()[:-1])


class Pools(NamedTuple):
    """The flat storage, of each slot its `key` and `value`, `[slots, D]` or `[slots, D // 2]`, and `position`,
    `[slots]` int32.

    `scale` `[slots, 2]`: `Rows.scales`.
    """

    key: Tensor
    value: Tensor
    position: Tensor
    scale: Tensor | None


class Table(NamedTuple):
    """What `Rows` tells of each row, the slots that it owns, and how many rows there are, `heads` of them a sequence.

    `dropped` `[rows]` int64: `Rows.count`. `residual` `[rows]` int64: `Rows.residual_count`, of rings of `ring_size`.
    """

    number: int
    heads: int
    start: Tensor
    length: Tensor
    capacity: Tensor | None
    sinks: Tensor
    recent: Tensor
    dropped: Tensor | None
    key_sum: Tensor | None
    value_sum: Tensor | None
    residual: Tensor | None
    residual_key: Tensor | None
    residual_value: Tensor | None
    ring_size: int | None


class New(NamedTuple):
    """The new tokens' keys and values, and `seen` `[1]` int64, the position of the first of them."""

    key: Strided
    value: Strided
    seen: Tensor


class Rule(NamedTuple):
    """How queries see keys, as in `ragged_decode`."""

    scale: float
    softcap: float | None
    sliding_window: int | None
    sink_logits: Tensor | None
