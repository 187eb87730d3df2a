"""Arrays are numpy arrays, C-contiguous; bfloat16 and float16 pools are uint16 arrays of their bits."""

from typing import Any, Protocol

class _Pools(Protocol):
    keys: Any  # [slots, D] float32 or uint16
    values: Any  # [slots, D]
    positions: Any  # [slots] int32

def attend(
    q: Any,  # [B, HQ, T, D] float32
    query_positions: Any,  # [B, T] int64
    layer: Any,  # keys, values, positions, start, length, capacity, sinks, recent, key_sum, value_sum, count
    dtype: str,  # "float32", "bfloat16" or "float16": what keys and values hold
    out: Any,  # [B, HQ, T, D] float32, written
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    threads: int = 1,
    isa: str | None = None,
) -> None: ...
def append(
    pools: _Pools,  # written
    start: Any,  # [rows] int64
    length: Any,  # [rows] int64
    capacity: Any,  # [rows] int64
    keys: Any,  # [B, H, T, D]
    values: Any,  # [B, H, T, D]
    valid: Any | None,  # [B, T] bool
    first_position: int,
    threads: int,
) -> None: ...
def gather(pools: _Pools, source: Any, target: _Pools, threads: int) -> None: ...
def instruction_sets() -> list[str]: ...
