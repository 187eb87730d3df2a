"""Where each row's entries lie in the flat pools, and how entries move between two such layouts.

A layout is three int64 tensors of shape `[rows]`: row `r` owns the slots `start[r] .. start[r] + capacity[r]`, and its
first `length[r]` slots hold entries in the order of the text. The functions here only compute indices; the moves
themselves (`gather`, `scatter`) are one line of torch each, which specifies what the compiled backends do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headkv.cache.rows import Pools


def starts(capacity: Tensor) -> Tensor:
    """First slot of each row when rows lie one after another: the exclusive running sum of `capacity` `[rows]`.

    >>> starts(torch.tensor([5, 3, 6])).tolist()
    [0, 5, 8]
    """
    return capacity.cumsum(0) - capacity


def rows_of_slots(capacity: Tensor) -> tuple[Tensor, Tensor]:
    """For every slot of a layout packed by `starts`: the row that owns it and its offset in that row, `[slots]` each.

    >>> [x.tolist() for x in rows_of_slots(torch.tensor([2, 3]))]
    [[0, 0, 1, 1, 1], [0, 1, 0, 1, 2]]
    """
    rows = torch.repeat_interleave(torch.arange(capacity.numel(), device=capacity.device), capacity)
    offsets = torch.arange(rows.numel(), device=capacity.device) - starts(capacity)[rows]
    return rows, offsets


def of_dense(keys: Tensor, values: Tensor) -> tuple[Pools, Tensor, int]:
    """Dense keys and values `[B, H, n, D]` as pools, not copied where they lie as models make them: `[B, n, H, D]`.

    Returns:
        The pools, `start` `[rows]` int64, and `step`: entry `j` of row `r` is slot `start[r] + j * step`.

    >>> keys = torch.arange(12.0).view(1, 3, 2, 2).transpose(1, 2)  # 2 heads, 3 tokens
    >>> pools, start, step = of_dense(keys, keys)
    >>> pools.keys.data_ptr() == keys.data_ptr(), pools.positions.tolist(), start.tolist(), step
    (True, [0, 0, 1, 1, 2, 2], [0, 1], 2)
    """
    batch_size, heads, n, head_dim = keys.shape
    text = torch.arange(n, dtype=torch.int32, device=keys.device)
    sequence = torch.arange(batch_size, device=keys.device)[:, None] * (heads * n)
    turned = keys.transpose(1, 2), values.transpose(1, 2)
    if not keys.is_contiguous() and all(side.is_contiguous() for side in turned):
        keys, values = turned
        positions, between, step = text.repeat_interleave(heads), 1, heads
    else:
        positions, between, step = text.repeat(heads), n, 1
    pools = Pools(keys.reshape(-1, head_dim), values.reshape(-1, head_dim), positions.repeat(batch_size))
    return pools, (sequence + torch.arange(heads, device=keys.device) * between).reshape(-1), step


def source_of_kept(start: Tensor, keep: Tensor, headroom: int, step: int = 1) -> tuple[Tensor, Tensor]:
    """The move that keeps some entries of each row and leaves `headroom` free slots behind them.

    Args:
        start: `[rows]` int64, the present layout.
        keep: `[rows, L]` bool, which entries of each row stay (column `j` is the row's `j`-th entry).
        headroom: free slots to leave at the end of each row.
        step: slots from one entry of a row to its next.

    Returns:
        `source` `[new slots]` int64, the old slot that each new slot takes (slot 0 where nothing is asked for), and the
        new `length` `[rows]`. The new capacities are `length + headroom`.

    >>> keep = torch.tensor([[True, False, True], [False, True, False]])
    >>> source, length = source_of_kept(torch.tensor([0, 3]), keep, headroom=1)
    >>> source.tolist(), length.tolist()
    ([0, 2, 0, 4, 0], [2, 1])
    """
    length = keep.sum(1)
    rows, entries = keep.nonzero(as_tuple=True)  # the one thing here that waits for the device
    rank = torch.arange(rows.numel(), device=keep.device) - starts(length)[rows]
    slots = rows.numel() + headroom * length.numel()
    source = torch.zeros(slots, dtype=torch.int64, device=keep.device)
    source[starts(length + headroom)[rows] + rank] = start[rows] + entries * step
    return source, length


def source_of_rows(
    start: Tensor, length: Tensor, capacity: Tensor, skip_at: Tensor | None = None, skip: Tensor | None = None
) -> Tensor:
    """The move that gives each row a new capacity, leaving out `skip[r]` entries from entry `skip_at[r]` on.

    Args:
        start: `[rows]` int64, where the rows begin now.
        length: `[rows]` int64, entries after the move.
        capacity: `[rows]` int64, slots after the move, at least `length`.
        skip_at, skip: `[rows]` int64, or None to leave out nothing.

    Returns:
        `source` `[new slots]` int64; head room repeats the row's last entry (its content is never read).

    >>> source_of_rows(torch.tensor([0, 4]), torch.tensor([2, 1]), torch.tensor([3, 2])).tolist()
    [0, 1, 1, 4, 4]
    """
    rows, offsets = rows_of_slots(capacity)
    offsets = torch.minimum(offsets, (length - 1).clamp(min=0)[rows])
    source = start[rows] + offsets
    if skip is not None and skip_at is not None:
        source = source + torch.where(offsets >= skip_at[rows], skip[rows], 0)
    return source


def source_of_text(
    start: Tensor, length: Tensor, positions: Tensor, seen: int
) -> tuple[Tensor, Tensor | None]:
    """The move that puts every entry at its position in a text of `seen` tokens.

    Returns:
        `source` `[rows * seen]` int64 (any slot where a row stores nothing), and which of them are stored, bool; None
        when all are.

    >>> source, stored = source_of_text(torch.tensor([0, 3]), torch.tensor([2, 1]), torch.tensor([0, 1, 9, 1]), seen=2)
    >>> source.tolist(), stored.tolist()
    ([0, 1, 0, 3], [True, True, False, True])
    """
    rows, offsets = rows_of_slots(length)
    slots = start[rows] + offsets
    places = rows * seen + positions[slots].long()
    source = torch.zeros(length.numel() * seen, dtype=torch.int64, device=start.device)
    source[places] = slots
    if slots.numel() == source.numel():
        return source, None
    stored = torch.zeros_like(source, dtype=torch.bool)
    stored[places] = True
    return source, stored


def gather(pools: Pools, source: Tensor) -> Pools:
    """New pools whose slot `i` holds a copy of slot `source[i]`. `source` `[new slots]` int64."""
    if pools.keys.shape[0] == 0:
        return pools.each(lambda pool: pool.new_zeros((source.numel(), *pool.shape[1:])))
    source = source.clamp(max=pools.keys.shape[0] - 1)
    return pools.each(lambda pool: pool.index_select(0, source))


def scatter(pools: Pools, slots: Tensor, new: Pools) -> None:
    """Write entries in place: the m slots of `new` go to `slots` `[m]` int64, distinct."""
    with torch.inference_mode():  # pools made in that mode can only be written to in it, all others as well
        for pool, entries in zip(pools, new, strict=True):
            if pool is not None and entries is not None:
                pool.index_copy_(0, slots, entries)
