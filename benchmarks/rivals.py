"""A decode step over rows of unequal length by what others offer, each (sequence, KV head) a sequence of its own.

Every rival reads the very rows that `gpu_attention.py` made, in its own layout where it needs one, and its queries lie
as it likes them best: the group that shares a KV head is the heads of one query. None is a dependency of headkv; one
that is not installed raises ImportError.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from headkv.cache.layout import rows_of_slots

if TYPE_CHECKING:
    from gpu_attention import Layer

    from headkv_kernels import Rows

WORKSPACE = 128 << 20  # bytes, what FlashInfer's documentation gives a wrapper
FLASH_PAGE = 256  # the smallest that FlashAttention 2 takes


@dataclass(frozen=True)
class Decoder:
    """One way to decode one layer.

    Attributes:
        step: attention `[HQ, D]` over the entries of its rows, and over the new ones if it appends.
        plan: what has to be called, outside a CUDA graph, whenever lengths have changed; was called once.
    """

    step: Callable[[], Tensor]
    plan: Callable[[], object] | None = None


@dataclass(frozen=True)
class Rival:
    """One way to decode any layer.

    Attributes:
        name: what it is.
        prepare: makes the decoder of a layer.
        appends: whether a step also stores the new entries, behind the others. Lengths stay, so that each does again.
    """

    name: str
    prepare: Callable[[Layer], Decoder]
    appends: bool = False


@dataclass(frozen=True)
class Pages:
    """Rows in pages of equal size.

    Attributes:
        keys, values: `[pages, size, 1, D]`.
        index: int32, the pages of row 0, then those of row 1, ...
        ends: `[rows + 1]` int32, where each row's pages begin and end in `index`.
        last: `[rows]` int32, entries in each row's last page.
    """

    keys: Tensor
    values: Tensor
    index: Tensor
    ends: Tensor
    last: Tensor

    @property
    def table(self) -> Tensor:
        """`[rows, most]` int32: each row's pages, then zeros."""
        counts = self.ends.diff()
        row, turn = rows_of_slots(counts.long())
        table = self.index.new_zeros(len(counts), int(counts.max()))
        table[row, turn] = self.index
        return table


def in_pages(rows: Rows, size: int, room: int = 0) -> Pages:
    """The rows' entries, and room for `room` more each. Pages of one entry are the pools as they are."""
    lengths, device = rows.length, rows.length.device
    row, offset = rows_of_slots(lengths)
    slots = rows.start[row] + offset
    counts = (lengths + room + size - 1) // size
    ends = F.pad(counts.cumsum(0), (1, 0))
    if size == 1:
        index, pools = slots, [rows.keys, rows.values]
    else:
        index = torch.arange(int(ends[-1]), device=device)
        to = ends[row] * size + offset
        pools = [pool.new_zeros(len(index) * size, pool.shape[1]) for pool in (rows.keys, rows.values)]
        pools = [
            new.index_copy_(0, to, pool[slots])
            for new, pool in zip(pools, (rows.keys, rows.values), strict=True)
        ]
    keys, values = (pool.view(-1, size, 1, pool.shape[1]) for pool in pools)
    return Pages(keys, values, index.int(), ends.int(), ((lengths - 1) % size + 1).int())


def by_row(q: Tensor, rows: Rows) -> Tensor:
    """Queries `[1, HQ, D]` as `[rows, G, D]`: a sequence of one token each, with a head for each of its group."""
    return q.view(rows.number, -1, q.shape[-1])


def flash_varlen(layers: Sequence[Layer], scale: float) -> Iterator[Rival]:
    """torch's own FlashAttention, over rows that lie one after another and, where it knows them, over pages."""
    known = inspect.signature(varlen_attn).parameters
    options = {"scale": scale} | ({"enable_gqa": True} if "enable_gqa" in known else {})

    def prepare(layer: Layer, size: int | None) -> Decoder:
        rows, q = layer.rows, by_row(layer.q, layer.rows)
        each = torch.arange(rows.number + 1, device=q.device, dtype=torch.int32)
        if size is None:
            row, offset = rows_of_slots(rows.length)
            pools = [pool[rows.start[row] + offset, None] for pool in (rows.keys, rows.values)]
            ends, most, more = F.pad(rows.length.cumsum(0), (1, 0)).int(), int(rows.length.max()), {}
        else:
            pages = in_pages(rows, size)
            pools, ends, most = [pages.keys, pages.values], None, size * pages.table.shape[1]
            more = {"seqused_k": rows.length.int(), "block_table": pages.table}
        return Decoder(lambda: varlen_attn(q, *pools, each, ends, 1, most, **options, **more).flatten(0, 1))

    yield Rival("flash varlen, group packed", partial(prepare, size=None))
    if "block_table" in known:
        yield Rival(f"flash varlen, group packed, pages of {FLASH_PAGE}", partial(prepare, size=FLASH_PAGE))


def flash_attn(layers: Sequence[Layer], scale: float) -> Iterator[Rival]:
    """FlashAttention 2's decoding from pages, with and without its append."""
    from flash_attn import flash_attn_with_kvcache

    def prepare(layer: Layer, append: bool) -> Decoder:
        rows, q = layer.rows, by_row(layer.q, layer.rows)[:, None]
        pages = in_pages(rows, FLASH_PAGE, room=1)
        keys, values = (new.view(rows.number, 1, 1, -1) for new in layer.new)
        options = {"k": keys, "v": values} if append else {}
        options |= {"cache_seqlens": rows.length.int(), "block_table": pages.table, "softmax_scale": scale}
        return Decoder(lambda: flash_attn_with_kvcache(q, pages.keys, pages.values, **options).flatten(0, 2))

    for append in (False, True):
        name = f"flash-attn, pages of {FLASH_PAGE}" + (", its append" if append else "")
        yield Rival(name, partial(prepare, append=append), append)


def flashinfer(layers: Sequence[Layer], scale: float) -> Iterator[Rival]:
    """FlashInfer's batch decode, planned anew for new lengths, into buffers that stay; and as if lengths stayed."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    scratch = torch.empty(WORKSPACE, dtype=torch.uint8, device=layers[0].q.device)

    def prepare(layer: Layer, size: int, tensor_cores: bool, graph: bool) -> Decoder:
        pages, q = in_pages(layer.rows, size), by_row(layer.q, layer.rows)
        buffers = {"indptr": pages.ends, "indices": pages.index, "last_page_len": pages.last}
        own = {f"paged_kv_{name}_buffer": tensor.clone() for name, tensor in buffers.items()} if graph else {}
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            scratch, use_cuda_graph=graph, use_tensor_cores=tensor_cores, **own
        )
        # What it asks for on the host is there, as serving engines have it.
        where = (pages.ends.cpu(), pages.index, pages.last.cpu(), q.shape[1], 1, q.shape[2], size)
        plan = partial(wrapper.plan, *where, q_data_type=q.dtype, kv_data_type=q.dtype, sm_scale=scale)
        plan()
        return Decoder(lambda: wrapper.run(q, (pages.keys, pages.values)).flatten(0, 1), plan)

    for size, tensor_cores in itertools.product((16, 1), (True, False)):
        cores = "tensor" if tensor_cores else "CUDA"
        name = f"FlashInfer, pages of {size}, {cores} cores"
        yield Rival(name, partial(prepare, size=size, tensor_cores=tensor_cores, graph=True))
    name = "FlashInfer, pages of 16, for no other lengths"
    yield Rival(name, partial(prepare, size=16, tensor_cores=True, graph=False))


def fastdms(layers: Sequence[Layer], scale: float) -> Iterator[Rival]:
    """FastDMS's ragged split-K over our pools as they are, with and without the append that its engine launches."""
    from fastdms.layers.compact_attention import compact_decode_attention, store_compact_kvcache

    # Its engine has one bound for all layers.
    most = 1 + max(int(layer.rows.length.max()) for layer in layers)

    def prepare(layer: Layer, append: bool) -> Decoder:
        rows = layer.rows
        new, start, live = (
            x.int()[None] for x in (rows.start + rows.length, rows.start, rows.length + append)
        )

        def step() -> Tensor:
            if append:
                store_compact_kvcache(*layer.new, rows.keys, rows.values, new)
            return compact_decode_attention(layer.q, rows.keys, rows.values, start, live, scale, most)[0]

        return Decoder(step)

    for append in (False, True):
        name = "FastDMS" + (", its append" if append else "")
        yield Rival(name, partial(prepare, append=append), append)


RIVALS = (flash_varlen, flash_attn, flashinfer, fastdms)
