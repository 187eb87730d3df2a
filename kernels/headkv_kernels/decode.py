"""Attention of one new token over ragged rows: checks, how the work is cut, and the two launches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headkv_kernels.arguments import New, Rule, Strided
from headkv_kernels.combine import combine_segments
from headkv_kernels.rows import (
    FUSED,
    INTERPRETED,
    PACKED,
    Rows,
    check_positions,
    check_queries,
    device_traits,
    guard,
    padded,
)
from headkv_kernels.shares import UNIT, decode_shares

BESIDES = 24 * 1024  # of shared memory, what the ring of codes takes besides its blocks
RING_BYTES = 164 * 1024  # of shared memory for a ring of 4 blocks of 32 KiB, and what merging its parts takes


@dataclass(frozen=True)
class DecodeConfig:
    """How the work is cut. The default suits all sizes; results differ by rounding only.

    Attributes:
        programs: equal shares of the entries.
        block: entries read at a time, a power of two.
        stages: blocks that are in flight, plus one.
        warps: of 32 threads, a program.
        early: start each kernel while the one before it ends (programmatic dependent launch; Hopper on).
        ring: blocks of the ring of `ring.py` or `ring_codes.py`, at least 2, where that kernel serves (`ring_serves`);
            0 or elsewhere: the portable kernel, for codes in a cut of its own. A ring of codes has a multiprocessor for
            itself: more programs than these wait for one another.
        gap: entries that could be read in the time that one more segment takes a program.
    """

    programs: int
    block: int
    stages: int = 3
    warps: int = 4
    early: bool = False
    ring: int = 0
    gap: int = 128

    def __post_init__(self) -> None:
        if self.programs < 1 or self.gap < 0:
            raise ValueError(
                f"programs must be at least 1 and gap at least 0, got {self.programs} and {self.gap}"
            )

    @classmethod
    def default(cls, rows: Rows, ring: bool = True) -> DecodeConfig:
        """One program for each multiprocessor, and through a ring on Hopper what it serves. Without one, up to 32 KiB
        of keys and values at a time, of codes for float32 once they are that. `ring` False: without.

        The fastest of those in `benchmarks/gpu_attention.py`.
        """
        numbers = sum(pool.element_size() / PACKED.get(pool.dtype, 1) for pool in (rows.keys, rows.values))
        entry = int(rows.dim_pad * (8 if rows.dtype == torch.float32 else numbers))
        programs, early, shared = device_traits(rows.keys.device)
        ring = ring and early and shared >= RING_BYTES and fits_ring(rows)
        if ring and rows.scales is not None:
            return cls(programs, block=256, early=True, ring=2, gap=768)
        block, warps = max(16, min(128, 1 << (32768 // entry).bit_length() - 1)), 4
        if rows.scales is not None:
            # Codes are widened in registers, by as few warps as have room for them: more would do the same work twice.
            block, warps = min(block, 64), max(4, min(8, rows.dim_pad // 32))
            # A second program keeps a multiprocessor busy meanwhile, where there are blocks enough for both.
            if rows.keys.shape[0] >= 4 * block * programs:
                programs *= 2
        stages = 3 if block * entry <= 32768 else 2
        return cls(programs, block, stages, warps, early=early, ring=4 if ring else 0)


def fits_ring(rows: Rows) -> bool:
    """Whether these are rows for a ring: numbers of 16 bits, D 64 or 128, nothing but entries, that can be copied 16
    bytes at a time (of codes, scales 4)."""
    plain = rows.count is None and rows.residual_count is None
    aligned = all(pool.data_ptr() % 16 == 0 for pool in (rows.keys, rows.values))
    aligned = aligned and (rows.scales is None or rows.scales.data_ptr() % 4 == 0)
    return rows.dtype.itemsize == 2 and rows.dim in (64, 128) and plain and aligned


def ring_serves(config: DecodeConfig, rows: Rows, q: Tensor, group: int, sliding_window: int | None) -> bool:
    """Whether `ring.py` or, for codes, `ring_codes.py` can do it: for rows that fit, up to 16 queries a row (codes: 4)
    of their dtype, and no sliding window."""
    fits = fits_ring(rows) and q.dtype == rows.dtype and sliding_window is None and not INTERPRETED
    if rows.scales is None:
        return fits and group <= 16 and config.ring > 1 and config.block >= 16 * config.warps
    shared = device_traits(rows.keys.device)[2]
    cut = config.ring > 1 and config.warps in (4, 8) and config.block >= 32 * config.warps
    entry = sum(pool.shape[1] * pool.element_size() for pool in (rows.keys, rows.values, rows.scales))
    return fits and group <= 4 and cut and config.ring * config.block * entry + BESIDES <= shared


def ring_kernel(rows: Rows) -> Any:
    """The one for these rows. Gluon, in which it is written, is there on GPUs only."""
    if rows.scales is not None:
        from headkv_kernels.ring_codes import ring_codes

        return ring_codes
    from headkv_kernels.ring import ring_shares

    return ring_shares


def new_ticket(rows: Rows) -> Tensor:
    """`[1]` int32 zero: counts, in a step over these rows, the programs that have read the lengths. It is zero
    again after every step; steps that may run at the same time need tickets of their own."""
    return torch.zeros(1, dtype=torch.int32, device=rows.keys.device)


def ragged_decode(
    q: Tensor,
    rows: Rows,
    *,
    query_positions: Tensor | None = None,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    ahead: bool = False,
    config: DecodeConfig | None = None,
) -> Tensor:
    """One new token a sequence, already stored: it sees all of its rows. `q` `[B, HQ, D]` -> `[B, HQ, D]`.

    Args:
        query_positions: `[B]` int, on the device; only read, and then needed, with a sliding window.
        scale, softcap: logits are `softcap * tanh(scale * q k / softcap)`.
        sliding_window: entries at a distance of `sliding_window` or more positions are not visible.
        sink_logits: `[HQ]` float32, bfloat16 or float16: of each query head one more logit, without a value;
            -inf: none. What is not a number makes that head's output not a number.
        ahead: read the rows even before the launches before this one in the stream have ended. Right only
            if none of those that may still run (kernels that let the next one start early) writes them.
        config: default: `DecodeConfig.default(rows)`.

    Raises:
        ValueError, TypeError: before anything is launched.
    """
    group = check_queries(q, rows, 3, scale, sliding_window, softcap, sink_logits)
    if sliding_window is not None:
        if query_positions is None:
            raise ValueError("query_positions must be given with a sliding window, got None")
        check_positions(query_positions, (q.shape[0],), rows)
        query_positions = query_positions.contiguous()
    rule = Rule(scale, softcap, sliding_window, sink_logits)
    return _launch(q, rows, group, rule, ahead, config, query_positions=query_positions)


def ragged_step(
    q: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    rows: Rows,
    capacity: Tensor,
    ticket: Tensor,
    seen: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    ahead: bool = False,
    config: DecodeConfig | None = None,
) -> Tensor:
    """`ragged_append` of one token and `ragged_decode`, together. `q` `[B, HQ, D]` -> `[B, HQ, D]`.

    Args:
        new_keys, new_values: `[B, H, D]` in the dtype of the rows; any strides, but 1 along D.
        rows: `rows.length` grows by one, in place, except for rows without room: these lose the token.
        capacity: `[rows]` int64, slots that each row owns; contiguous.
        ticket: from `new_ticket(rows)`.
        seen: `[1]` int64 on the device, the position of the new token; only read.
        scale, softcap, sliding_window, sink_logits, ahead, config: as in `ragged_decode`.

    Raises:
        ValueError, TypeError: before anything is launched.
    """
    group = check_queries(q, rows, 3, scale, sliding_window, softcap, sink_logits)
    device, shape = rows.keys.device, (q.shape[0], rows.number // q.shape[0], rows.dim)
    for name, tensor in (("new_keys", new_keys), ("new_values", new_values)):
        if tensor.dtype != rows.dtype or tensor.device != device:
            raise TypeError(
                f"{name} must be {rows.dtype} on {device} like the rows, got {tensor.dtype} on {tensor.device}"
            )
        if tensor.shape != shape or tensor.stride(2) != 1:
            got = f"{list(tensor.shape)} with strides {list(tensor.stride())}"
            raise ValueError(f"{name} must have shape {list(shape)} and stride 1 along D, got {got}")
    whole = (("capacity", capacity, torch.int64, rows.number), ("seen", seen, torch.int64, 1))
    for name, tensor, dtype, number in (*whole, ("ticket", ticket, torch.int32, 1)):
        if tensor.dtype != dtype or tensor.shape != (number,) or tensor.device != device:
            got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name} must be {str(dtype)[6:]} [{number}] on {device}, got {got}")
    if not capacity.is_contiguous():
        raise ValueError(f"capacity must be contiguous, got strides {list(capacity.stride())}")
    new = New(Strided.of(new_keys), Strided.of(new_values), seen)
    rule = Rule(scale, softcap, sliding_window, sink_logits)
    return _launch(q, rows, group, rule, ahead, config, new=new, capacity=capacity, ticket=ticket)


def _launch(
    q: Tensor,
    rows: Rows,
    group: int,
    rule: Rule,
    ahead: bool,
    config: DecodeConfig | None,
    *,
    query_positions: Tensor | None = None,
    new: New | None = None,
    capacity: Tensor | None = None,
    ticket: Tensor | None = None,
) -> Tensor:
    dim, group_pad, dim_pad = rows.dim, padded(group), rows.dim_pad
    cut = config or DecodeConfig.default(rows)
    if ring_serves(cut, rows, q, group, rule.sliding_window):
        kernel, stages = ring_kernel(rows), cut.ring
    else:
        if rows.scales is not None and cut.ring:  # its blocks are too large to be widened
            cut = replace(DecodeConfig.default(rows, ring=False), early=cut.early)
        kernel, stages = decode_shares, cut.stages
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # Of every segment an output and, behind all outputs, a log-sum-exp.
    partial = torch.empty((cut.programs + rows.number) * group * (dim + 1), device=q.device)
    table, gap = rows.table(rows.number // q.shape[0], capacity), cut.gap // UNIT.value
    shape = {"PAD": padded(rows.number), "G": group, "D": dim, "EARLY": cut.early}
    # Not all targets know launch_pdl.
    launch = FUSED | ({"launch_pdl": True} if cut.early else {})
    rotated = rows.scales is not None
    columns = dim_pad if rotated else min(dim_pad, 64)
    with guard(q):
        kernel[(cut.programs,)](
            *(Strided.of(q), query_positions, table, rows.pools, new, rule, gap, partial),
            **shape,
            G_PAD=group_pad,
            D_PAD=dim_pad,
            BLOCK=cut.block,
            STAGES=stages,
            OPERAND=rows.operand(q),
            AHEAD=cut.early and ahead,
            num_warps=cut.warps,
            **launch,
        )
        combine_segments[(rows.number * group, dim_pad // columns)](
            *(table, rule, gap, cut.programs, ticket, partial, out),
            **shape,
            BLOCK=64,
            COLUMNS=columns,
            ROTATED=rotated,
            num_warps=max(4, columns // 16),
            **launch,
        )
    return out
