"""A row's newest entries in the dtype in which they came, beside their codes.

A question stands at the end of its rows, and its own entries make most of the error that 4 bits bring. So the newest R
entries of each row are held a second time, in full (KIVI's residual, arXiv 2402.02750, section 3.2). They have codes
all the same: nothing is left to round later, and what moves entries need not know. Attention sees an entry as it came
as long as it is one of the row's newest `residual_count`, in a windowed row within the window; then by its codes. So
what a question sees of itself depends on R, and on how many tokens come at once: R should hold a question.

Entry `i` of a row lies in slot `i % R` of its ring, rotated as codes are, so that one query, rotated once, meets both.
The rotation happens in float32, and its result is rounded to the dtype. What `crop` takes back leaves fewer than R.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headkv.cache.quantised import rotated
from headkv.cache.rows import Rows

NAMES = ("residual_keys", "residual_values", "residual_count")  # of `Rows`, where newest entries are held


class Residual(NamedTuple):
    """Rings `[rows, R, D]` of rotated keys and values, and how many of a row's newest entries they hold, `[rows]`."""

    residual_keys: Tensor
    residual_values: Tensor
    residual_count: Tensor

    @property
    def size(self) -> int:
        """R."""
        return self.residual_keys.shape[1]

    @classmethod
    def of(cls, rows: Rows) -> Residual | None:
        """What these rows hold; None where entries are codes alone, or no codes."""
        if rows.residual_keys is None or rows.residual_values is None or rows.residual_count is None:
            return None
        return cls(rows.residual_keys, rows.residual_values, rows.residual_count)

    def shifted(self, dropped: Tensor, count: Tensor) -> Residual:
        """The same once `dropped[r]` entries before the `count[r]` newest are gone: the others have new numbers."""
        slots = torch.arange(self.size, device=dropped.device) + dropped[:, None]
        slots = (slots % self.size)[..., None].expand_as(self.residual_keys)
        return Residual(self.residual_keys.gather(1, slots), self.residual_values.gather(1, slots), count)

    def tidied(self, length: Tensor) -> Residual:
        """The same with zeros in the slots that hold none of the `residual_count` newest of `length` `[rows]`."""
        entry, oldest = entries_in_slots(length, self.size), length - self.residual_count
        here = ((entry >= 0) & (entry >= oldest[:, None]))[..., None]
        keys, values = (torch.where(here, ring, 0) for ring in self[:2])
        return Residual(keys, values, self.residual_count)


def newest(rows: Rows, size: int) -> Residual:
    """The last `size` entries of each row; `rows` are not quantised yet."""
    entry = entries_in_slots(rows.length, size)
    source = (rows.start[:, None] + entry).clamp(0, max(rows.keys.shape[0] - 1, 0))
    here = (entry >= 0)[..., None]
    if rows.keys.shape[0] == 0:
        keys = values = rows.keys.new_zeros(*source.shape, rows.head_dim)
    else:
        keys, values = (
            torch.where(here, _turned(pool.detach()[source]), 0) for pool in (rows.keys, rows.values)
        )
    return Residual(keys, values.clone(), rows.length.clamp(max=size))


def entries_in_slots(length: Tensor, size: int) -> Tensor:
    """For each slot of the rings, which of a row's last `size` entries lies there, `[rows, size]`; below 0: none.

    >>> entries_in_slots(torch.tensor([5, 2]), 3).tolist()
    [[3, 4, 2], [0, 1, -1]]
    """
    last = length[:, None] - 1
    return last - (last - torch.arange(size, device=length.device)) % size


def appended(rows: Rows, keys: Tensor, values: Tensor, valid: Tensor | None) -> Residual | None:
    """What is held once new entries `[B, H, T, D]` stand behind the rows, in new tensors. See `moves.append`."""
    held = Residual.of(rows)
    if held is None:
        return None
    tokens, head_dim = keys.shape[2:]
    stored, order = torch.full_like(rows.length, tokens), None
    if valid is not None:
        stored = valid.sum(1).repeat_interleave(rows.num_kv_heads)
        order = (~valid).long().argsort(dim=1, stable=True).repeat_interleave(rows.num_kv_heads, 0)
    new = entries_in_slots(rows.length + stored, held.size) - rows.length[:, None]  # [rows, R]
    token = new.clamp(min=0)
    if order is not None:
        token = order.gather(1, token)
    rings = []
    for ring, side in zip(held[:2], (keys, values), strict=True):
        picked = side.reshape(rows.rows, tokens, head_dim).gather(1, token[..., None].expand_as(ring))
        rings.append(torch.where((new >= 0)[..., None], _turned(picked), ring))
    return Residual(rings[0], rings[1], (held.residual_count + stored).clamp(max=held.size))


def write(rows: Rows, new: Residual | None) -> None:
    """Hold that, in place, as a CUDA graph may hold the tensors, and whoever made them. Allocates nothing."""
    held = Residual.of(rows)
    with torch.inference_mode():
        for old, changed in zip(held or (), new or (), strict=True):
            old.copy_(changed)


def kept(rows: Rows, wanted: Tensor) -> Residual | None:
    """What is held once only the `wanted` entries `[rows, L]` bool are left: the newest, up to the first that goes."""
    held = Residual.of(rows)
    if held is None:
        return None
    age = torch.arange(1, held.size + 1, device=wanted.device)
    entry = (rows.length[:, None] - age).clamp(min=0)
    run = (wanted.gather(1, entry) & (age <= held.residual_count[:, None])).long().cumprod(1).sum(1)
    return held.shifted(rows.length - wanted.sum(1), run)


def trimmed(rows: Rows, skip: Tensor) -> Residual | None:
    """What is held once `skip[r]` entries behind the sinks of row `r` are gone."""
    held = Residual.of(rows)
    if held is None:
        return None
    behind = torch.minimum(held.residual_count, (rows.length - rows.sinks - skip).clamp(min=0))
    return held.shifted(skip, torch.where(skip > 0, behind, held.residual_count))


def cropped(rows: Rows, length: Tensor) -> Tensor | None:
    """`residual_count` once the rows end at `length`."""
    held = Residual.of(rows)
    return None if held is None else (held.residual_count - rows.length + length).clamp(min=0)


def seen_as_they_came(rows: Rows) -> Tensor:
    """How many of each row's newest entries attention sees so, `[rows]` int64."""
    held = Residual.of(rows)
    assert held is not None
    count = held.residual_count
    return torch.where(rows.recent > 0, torch.minimum(count, rows.recent), count)


def placed(rows: Rows, keys: Tensor, values: Tensor, row: Tensor, entry: Tensor, at: Tensor) -> None:
    """Write the entries `entry` of the rows `row`, `[m]` each, as they came to the places `at` of keys and values
    `[n, D]`."""
    held = Residual.of(rows)
    assert held is not None
    for target, ring in zip((keys, values), held[:2], strict=True):
        target[at] = rotated(ring[row, entry % held.size].float()).to(target.dtype)


def _turned(x: Tensor) -> Tensor:
    return rotated(x.float()).to(x.dtype)
