"""The sequences of a batch: some of them, those of several layers together, or some of their heads, in new tensors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from headkv.cache import checks, layout, moves
from headkv.cache.quantised import storage_of
from headkv.cache.rows import SUMS, Pools, Rows
from headkv.cache.windows import Sums

_MOVED = {*Pools._fields, "ticket"}  # all other tensors have an entry a row


def selected(rows: Rows, index: Tensor) -> dict[str, Tensor]:
    """The tensors of `Rows` for the batch entries `index` `[new B]`, which may repeat.

    Raises:
        TypeError, ValueError: an index outside the batch.
    """
    index = checks.batch_index(index, rows.batch_size).to(rows.device)
    heads = torch.arange(rows.num_kv_heads, device=rows.device)
    return _taken(rows, (index[:, None] * rows.num_kv_heads + heads).reshape(-1))


def of_heads(rows: Rows, heads: Sequence[int]) -> dict[str, Tensor | None]:
    """The tensors of `Rows` for these heads of every sequence; no sums where none of their rows compensates."""
    batch = torch.arange(rows.batch_size, device=rows.device)[:, None] * rows.num_kv_heads
    taken: dict[str, Tensor | None] = {
        **_taken(rows, (batch + torch.tensor(heads, device=rows.device)).reshape(-1))
    }
    count = taken.get("count")
    return taken if count is None or bool((count >= 0).any()) else taken | dict.fromkeys(SUMS)


def _taken(rows: Rows, which: Tensor) -> dict[str, Tensor]:
    """The tensors of `Rows` for the rows `which`, which may repeat."""
    source = layout.source_of_rows(rows.start[which], rows.length[which], rows.capacity[which])
    per_row = {name: tensor[which] for name, tensor in rows.tensors() if name not in _MOVED}
    per_row["start"] = layout.starts(per_row["capacity"])
    return {**moves.gather(rows.pools, source)._asdict(), **per_row}


def nbytes_alone(rows: Rows) -> list[int]:
    """For each sequence the bytes that it would hold as a layer of its own: slots, bookkeeping, any sums."""
    by_sequence = (rows.batch_size, rows.num_kv_heads)
    held = rows.capacity.view(by_sequence).sum(1) * sum(x[:1].nbytes for x in rows.pools if x is not None)
    per_row = {name: x.nbytes // rows.batch_size for name, x in rows.tensors() if name not in _MOVED}
    if rows.count is not None:
        sums = sum(per_row.pop(name) for name in SUMS)
        held = held + sums * (rows.count.view(by_sequence) >= 0).any(1)
    found: list[int] = (held + sum(per_row.values())).tolist()
    return found


def joined(layers: Sequence[Rows]) -> dict[str, Tensor]:
    """The tensors of `Rows` for the sequences of all `layers`, one behind the other.

    Raises:
        ValueError: layers that do not fit together.
    """
    alike = {
        (x.num_kv_heads, x.seen, x.head_dim, x.dtype, storage_of(x.pools), x.residual_length, x.device)
        for x in layers
    }
    if len(alike) != 1:
        raise ValueError(
            "layers must be alike in heads, tokens seen, D, dtype, storage, residual_length and device, "
            f"got {list(alike)}"
        )
    names = {name for name, _ in layers[0].tensors()} - {"start", "ticket", *SUMS}
    tensors = {name: torch.cat([getattr(x, name) for x in layers]) for name in names}
    offsets = [0, *itertools.accumulate(x.keys.shape[0] for x in layers[:-1])]
    tensors["start"] = torch.cat([x.start + offset for x, offset in zip(layers, offsets, strict=True)])
    if any(layer.count is not None for layer in layers):
        sums = [
            Sums.of(x) or Sums.none(torch.zeros_like(x.start, dtype=torch.bool), x.head_dim) for x in layers
        ]
        for name, parts in zip(SUMS, zip(*sums, strict=True), strict=True):
            tensors[name] = torch.cat(parts)
    return tensors
