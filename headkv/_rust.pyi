"""The compiled extension. Arrays are C-contiguous; those of bfloat16 and float16 hold the bits, as uint16.

Keys and values in 8 bits are int8 arrays, in 4 bits uint8 ones of half the width; `scales` say what codes stand for.
What is only moved is given as uint8 arrays of its bytes.
"""

from typing import Literal, Protocol, TypeAlias

from numpy import bool_, float32, int8, int32, int64, uint8, uint16
from numpy.typing import NDArray

__all__ = ["append", "attend", "gather", "hold", "instruction_sets", "quantise"]

_Float: TypeAlias = NDArray[float32] | NDArray[uint16]
_Codes: TypeAlias = NDArray[int8] | NDArray[uint8]

class _PoolArrays(Protocol):
    @property
    def keys(self) -> NDArray[uint8]: ...  # [slots, bytes of a key]
    @property
    def values(self) -> NDArray[uint8]: ...  # [slots, bytes of a value]
    @property
    def positions(self) -> NDArray[int32]: ...  # [slots]
    @property
    def scales(self) -> NDArray[uint8] | None: ...  # [slots, bytes of two scales]

class _LayerArrays(Protocol):
    @property
    def keys(self) -> _Float | _Codes: ...  # [slots, D], [slots, D // 2] in 4 bits
    @property
    def values(self) -> _Float | _Codes: ...  # [slots, D], [slots, D // 2] in 4 bits
    @property
    def positions(self) -> NDArray[int32]: ...  # [slots]
    @property
    def scales(self) -> _Float | None: ...  # [slots, 2]
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
    @property
    def residual_keys(self) -> _Float | None: ...  # [rows, R, D], of dtype; all three, or none
    @property
    def residual_values(self) -> _Float | None: ...  # [rows, R, D]
    @property
    def residual_count(self) -> NDArray[int64] | None: ...  # [rows]

def attend(
    q: NDArray[float32],  # [B, HQ, T, D]
    query_positions: NDArray[int64],  # [B, T]
    layer: _LayerArrays,
    dtype: Literal["float32", "bfloat16", "float16"],  # what keys and values hold, or their scales
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
    keys: NDArray[uint8],  # [B, H, T, bytes of a key]
    values: NDArray[uint8],  # [B, H, T, bytes of a value]
    scales: NDArray[uint8] | None,  # [B, H, T, bytes of two scales]
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
def quantise(
    vectors: _Float,  # [m, D]
    dtype: Literal["float32", "bfloat16", "float16"],  # what they hold
    codes: _Codes,  # [m, D], [m, D // 2] in 4 bits, written
    scales: _Float,  # [m], written
) -> None: ...
def hold(
    rings: _Float,  # [rows, R, D], written
    new: _Float,  # [rows, T, D]
    dtype: Literal["float32", "bfloat16", "float16"],  # what both hold
    length: NDArray[int64],  # [rows], without the new tokens
    valid: NDArray[bool_] | None,  # [B, T]
) -> None: ...
def instruction_sets() -> list[str]: ...
