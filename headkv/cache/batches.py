"""The sequences of a batch: some of them, or those of several layers together, in new tensors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from headkv.cache import checks, layout, moves
from headkv.cache.rows import Pools, Rows
from headkv.cache.windows import Sums


def selected(rows: Rows, index: Tensor) -> dict[str, Tensor]:
    """The tensors of `Rows` for the batch entries `index` `[new B]`, which may repeat.

    Raises:
        TypeError, ValueError: an index outside the batch.
    """
    index = checks.batch_index(index, rows.batch_size).to(rows.device)
    heads = torch.arange(rows.num_kv_heads, device=rows.device)
    which = (index[:, None] * rows.num_kv_heads + heads).reshape(-1)
    source = layout.source_of_rows(rows.start[which], rows.length[which], rows.capacity[which])
    moved = {*Pools._fields, "ticket"}
    per_row = {name: tensor[which] for name, tensor in rows.tensors() if name not in moved}
    per_row["start"] = layout.starts(per_row["capacity"])
    return {**moves.gather(rows.pools, source)._asdict(), **per_row}


def nbytes_alone(rows: Rows) -> list[int]:
    """For each sequence the bytes that it would hold as a layer of its own: slots, bookkeeping, any sums."""
    sequences, pools, sums = (
        (rows.batch_size, rows.num_kv_heads),
        set(Pools._fields),
        {"key_sum", "value_sum", "count"},
    )
    slots = rows.capacity.view(sequences).sum(1)
    held = slots * sum(tensor[:1].nbytes for tensor in rows.pools)
    for name, tensor in rows.tensors():
        if name in pools or name == "ticket":
            continue
        has = (rows.count.view(sequences) >= 0).any(1) if name in sums and rows.count is not None else 1
        held = held + has * (tensor.nbytes // rows.batch_size)
    found: list[int] = held.tolist()
    return found


def joined(layers: Sequence[Rows]) -> dict[str, Tensor]:
    """The tensors of `Rows` for the sequences of all `layers`, one behind the other.

    Raises:
        ValueError: layers that do not fit together.
    """
    alike = {(x.num_kv_heads, x.seen, x.head_dim, x.dtype, x.device) for x in layers}
    if len(alike) != 1:
        raise ValueError(
            f"layers must be alike in heads, tokens seen, D, dtype and device, got {list(alike)}"
        )
    names = {name for name, _ in layers[0].tensors()} - {"start", "ticket", "key_sum", "value_sum", "count"}
    tensors = {name: torch.cat([getattr(x, name) for x in layers]) for name in names}
    offsets = [0, *itertools.accumulate(x.keys.shape[0] for x in layers[:-1])]
    tensors["start"] = torch.cat([x.start + offset for x, offset in zip(layers, offsets, strict=True)])
    if any(layer.count is not None for layer in layers):
        sums = [
            Sums.of(x) or Sums.none(torch.zeros_like(x.start, dtype=torch.bool), x.head_dim) for x in layers
        ]
        for name, parts in zip(("key_sum", "value_sum", "count"), zip(*sums, strict=True), strict=True):
            tensors[name] = torch.cat(parts)
    return tensors
