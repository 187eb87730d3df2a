"""Attention of one new token over ragged rows: checks, how the work is cut, and the two launches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton.language as tl
from torch import Tensor

from headkv_kernels.rows import FUSED, Rows, check_positions, check_queries, guard, padded
from headkv_kernels.shares import combine_segments, decode_shares

NO_WINDOW = 2**31 - 1


@dataclass(frozen=True)
class DecodeConfig:
    """How the work is cut. The default suits all sizes; results differ by rounding only.

    Attributes:
        programs: equal shares of the entries.
        block: entries read at a time, a power of two of at least 16.
        stages: blocks that are in flight, plus one.
        warps: of 32 threads, a program.
        early: start each kernel while the one before it ends (programmatic dependent launch; Hopper on).
    """

    programs: int
    block: int
    stages: int = 3
    warps: int = 4
    early: bool = False

    @classmethod
    def default(cls, rows: Rows) -> DecodeConfig:
        """One program for each multiprocessor; 32 KiB of keys and values at a time."""
        entry = 2 * padded(rows.dim) * rows.keys.element_size()
        programs, early = device_traits(rows.keys.device)
        block = max(16, min(128, 32768 // entry))
        return cls(programs, block, stages=3 if block * entry <= 32768 else 2, early=early)


@cache
def device_traits(device: torch.device) -> tuple[int, bool]:
    """Multiprocessors, and whether kernels can start early; a few and no for Triton's interpreter."""
    if device.type != "cuda":
        return 4, False
    traits = torch.cuda.get_device_properties(device)
    return traits.multi_processor_count, traits.major >= 9 and hasattr(tl.extra.cuda, "gdc_wait")


def ragged_decode(
    q: Tensor,
    rows: Rows,
    *,
    query_positions: Tensor | None = None,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    config: DecodeConfig | None = None,
) -> Tensor:
    """One new token a sequence, already stored: it sees all of its rows. `q` `[B, HQ, D]` -> `[B, HQ, D]`.

    Args:
        query_positions: `[B]` int, on the device; only read, and then needed, with a sliding window.
        scale, softcap: logits are `softcap * tanh(scale * q k / softcap)`.
        sliding_window: entries at a distance of `sliding_window` or more positions are not visible.
        config: default: `DecodeConfig.default(rows)`.

    Raises:
        ValueError, TypeError: before anything is launched.
    """
    group = check_queries(q, rows, 3, scale, sliding_window, softcap)
    if sliding_window is not None:
        if query_positions is None:
            raise ValueError("query_positions must be given with a sliding window, got None")
        check_positions(query_positions, (q.shape[0],), rows)
        query_positions = query_positions.contiguous()
    config = config or DecodeConfig.default(rows)
    segments = config.programs + rows.number
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    partial = torch.empty((segments, group, rows.dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((segments, group), dtype=torch.float32, device=q.device)
    line = (rows.length, rows.sinks, rows.recent, rows.count, rows.number, sliding_window or NO_WINDOW)
    shape = {"PAD": padded(rows.number), "G": group, "D": rows.dim, "D_PAD": padded(rows.dim)}
    shape |= {"COMPENSATE": rows.count is not None, "EARLY": config.early}
    launch = FUSED | ({"launch_pdl": True} if config.early else {})  # not all targets know launch_pdl
    with guard(q):
        decode_shares[(config.programs,)](
            *line,
            *(q, q.stride(0), q.stride(1), query_positions, rows.number // q.shape[0]),
            *(rows.keys, rows.values, rows.positions, rows.start, rows.key_sum, rows.value_sum),
            *(partial, lse, scale, softcap or 1.0),
            **shape,
            G_PAD=padded(group),
            BLOCK=config.block,
            STAGES=config.stages,
            OPERAND=rows.operand(q),
            SLIDING=sliding_window is not None,
            SOFTCAP=softcap is not None,
            num_warps=config.warps,
            **launch,
        )
        combine_segments[(rows.number * group,)](
            *line, partial, lse, out, config.programs, **shape, BLOCK=32, num_warps=4, **launch
        )
    return out
