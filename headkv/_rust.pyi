"""The compiled extension. Arrays are C-contiguous; those of bfloat16 and float16 hold the bits, as uint16."""

from typing import Literal, Protocol, TypeAlias

from numpy import bool_, float32, int32, int64, uint16
from numpy.typing import NDArray

__all__ = ["append", "attend", "gather", "instruction_sets"]

_Stored: TypeAlias = NDArray[float32] | NDArray[uint16]

class _PoolArrays(Protocol):
    @property
    def keys(self) -> _Stored: ...  # [slots, D]
    @property
    def values(self) -> _Stored: ...  # [slots, D]
    @property
    def positions(self) -> NDArray[int32]: ...  # [slots]

class _LayerArrays(_PoolArrays, Protocol):
    @property
    def start(self) -> NDArray[int64]: ...  # [rows]
    @property
    def length(self) -> NDArray[int64]: ...  # [rows]
    @property
    def capacity(self) -> NDArray[int64]: ...  # [rows]
    @property
    def sinks(self) -> NDArray[int64]: ...  # [rows]
    @property
    def recent(self) -> NDArray[int64]: ...  # [rows]; 0: no window
    @property
    def key_sum(self) -> NDArray[float32] | None: ...  # [rows, D]; all three, or none
    @property
    def value_sum(self) -> NDArray[float32] | None: ...  # [rows, D]
    @property
    def count(self) -> NDArray[int64] | None: ...  # [rows]

def attend(
    q: NDArray[float32],  # [B, HQ, T, D]
    query_positions: NDArray[int64],  # [B, T]
    layer: _LayerArrays,
    dtype: Literal["float32", "bfloat16", "float16"],  # what keys and values hold
    out: NDArray[float32],  # [B, HQ, T, D], written
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: NDArray[float32] | None = None,  # [HQ]
    threads: int = 1,
    isa: str | None = None,
) -> None: ...
def append(
    pools: _PoolArrays,  # written
    start: NDArray[int64],  # [rows]
    length: NDArray[int64],  # [rows]
    capacity: NDArray[int64],  # [rows]
    keys: _Stored,  # [B, H, T, D]
    values: _Stored,  # [B, H, T, D]
    valid: NDArray[bool_] | None,  # [B, T]
    first_position: int,
    threads: int,
) -> None: ...
def gather(
    pools: _PoolArrays,
    source: NDArray[int64],  # [entries], slots of `pools`
    target: _PoolArrays,  # written
    threads: int,
) -> None: ...
def instruction_sets() -> list[str]: ...
