"""What windowed rows hide, what they drop for good, and what compensating rows remember of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headkv.cache import layout, quantised, residual
from headkv.cache.rows import Pools, Rows


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

    @classmethod
    def of(cls, rows: Rows) -> Sums | None:
        """What these rows remember; None where none compensates."""
        if rows.key_sum is None or rows.value_sum is None or rows.count is None:
            return None
        return cls(rows.key_sum, rows.value_sum, rows.count)

    @torch.no_grad()
    def including(self, pools: Pools, rows: Tensor, slots: Tensor) -> Sums:
        """A copy with the entries at `slots` of the compensating `rows`, `[m]` each, added."""
        new = Sums(*(old.clone() for old in self))
        # In parts, which bounds the float32 copies.
        for some_rows, some_slots in zip(rows.split(8192), slots.split(8192), strict=True):
            for side, entries in zip(new[:2], quantised.entries(pools, some_slots), strict=True):
                side.index_add_(0, some_rows, entries.float())
        new.number.index_add_(0, rows, torch.ones_like(rows))
        return new


class Gone(NamedTuple):
    """What rows will know of their past once entries are gone: computed before, taken over after they are."""

    evicted_end: Tensor
    trimmed_end: Tensor
    sums: Sums | None


def hidden_for_good(rows: Rows, rollback: int) -> Tensor:
    """Entries behind the sinks `[rows]` that no later query sees: all hidden ones but the last `rollback`."""
    hidden = rows.length - rows.sinks - rows.recent - rollback
    return torch.where(rows.recent > 0, hidden.clamp(min=0), 0)


def trimmed(rows: Rows, skip: Tensor) -> Gone:
    """What is known once `skip[r]` entries behind the sinks of row `r` are gone."""
    behind = rows.start + rows.sinks
    evicted, trimmed = (
        _end(known, rows, behind + skip - 1, skip > 0) for known in (rows.evicted_end, rows.trimmed_end)
    )
    sums = Sums.of(rows)
    if sums is not None:
        which, offsets = layout.rows_of_slots(torch.where(sums.number >= 0, skip, 0))
        sums = sums.including(rows.pools, which, behind[which] + offsets)
    return Gone(evicted, trimmed, sums)


def dropped(rows: Rows, mask: Tensor, sums: Sums | None, step: int = 1) -> Gone:
    """What is known once the entries where `mask` `[rows, L]` bool are gone.

    Args:
        sums: of what compensating rows dropped before.
        step: slots from one entry of a row to its next.
    """
    # Positions increase along a row, so that its last dropped entry tells.
    place = torch.arange(1, mask.shape[1] + 1, dtype=torch.int32, device=mask.device)
    last = torch.where(mask, place, 0).amax(1).long() - 1
    end = _end(rows.evicted_end, rows, rows.start + last * step, last >= 0)
    if sums is not None:
        which, entries = (mask & (sums.number >= 0)[:, None]).nonzero(as_tuple=True)
        sums = sums.including(rows.pools, which, rows.start[which] + entries * step)
    return Gone(end, rows.trimmed_end, sums)


def trim_in_place(rows: Rows, skip: Tensor) -> None:
    """Close the gap that `skip[r]` entries behind the sinks of row `r` leave; the rows' last slots become free."""
    moved = torch.where(skip > 0, rows.length - rows.sinks - skip, 0)
    which, offsets = layout.rows_of_slots(moved)
    target = (rows.start + rows.sinks)[which] + offsets
    kept = layout.gather(rows.pools, target + skip[which])
    held = residual.trimmed(rows, skip)
    layout.scatter(rows.pools, target, kept)
    residual.write(rows, held)
    with torch.inference_mode():  # in place, as a CUDA graph may hold the tensor, and whoever made it
        rows.length -= skip


def cropped(rows: Rows, tokens: int) -> tuple[Tensor, Tensor]:
    """Entries of each row without the last `tokens` tokens of the text, and whether it still holds all that it needs.

    Such a row is not empty, has evicted nothing of a later text, and its window, if it was full, is so again with the
    next token.

    Returns:
        `length` `[rows]` int64 and `intact` `[rows]` bool.
    """
    seen = rows.seen - tokens
    age = torch.arange(1, tokens + 1, device=rows.device)
    slots = (rows.start + rows.length)[:, None] - age  # [rows, tokens], newest first
    inside = age <= rows.length[:, None]
    positions = rows.positions[slots.clamp(min=0)] if rows.positions.numel() else slots
    length = rows.length - (inside & (positions >= seen)).sum(1)
    # Beside itself the next token sees this many entries, and what is older than the oldest of them may be gone.
    full, oldest = rows.sinks + rows.recent - 1, (seen - rows.recent + 1).clamp(min=0)
    holes = (rows.recent > 0) & (length < full) & (rows.trimmed_end > oldest)
    return length, (length > 0) & (rows.evicted_end <= seen) & ~holes


def _end(known: Tensor, rows: Rows, last: Tensor, some: Tensor) -> Tensor:
    """`known`, an `..._end` of `Rows`, once the entries until slot `last[r]` have gone from rows with `some[r]`."""
    if rows.positions.numel() == 0:
        return known
    position = rows.positions[torch.where(some, last, 0)].long()
    return torch.where(some, torch.maximum(known, position + 1), known)
