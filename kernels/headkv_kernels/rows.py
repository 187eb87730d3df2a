"""The ragged rows that the kernels read, and what the launchers check before they launch."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from headkv_kernels.arguments import Pools, Table

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
PACKED = {torch.int8: 1, torch.uint8: 2}  # codes a number
MAX_DIM = 512
# Of a launch: a * b + c rounds once. Triton's own default is about to change.
FUSED = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Rows:
    """Ragged rows in flat pools; row `b * H + h` is sequence `b`, KV head `h`. All tensors are contiguous.

    Attributes:
        keys, values: `[slots, D]` float32, bfloat16 or float16; where there are `scales`, of each the codes, in 8 bits
            `[slots, D]` int8, in 4 bits `[slots, D // 2]` uint8.
        positions: `[slots]` int32, where in the text each entry came from; increasing along a row.
        start, length: `[rows]` int64; the entries of row `r` are the `length[r]` slots from `start[r]` on.
        sinks, recent: `[rows]` int64; `recent > 0`: only the first `sinks` and the last `recent` entries are
            visible.
        key_sum, value_sum, count: `[rows, D]` float32 twice and `[rows]` int64, or None: sums over `count`
            entries that are no longer stored. They and the hidden entries take part as one compensation
            entry; `count` -1: they do not.
        scales: `[slots, 2]` float32, bfloat16 or float16, or None: of each entry the scales of its key's and of its
            value's codes, which stand for vectors as `quantised.py` says. New entries are of the scales' dtype.
        residual_keys, residual_values, residual_count: `[rows, R, D]` in the scales' dtype twice and `[rows]` int64, or
            None: rings of rotated vectors. A row's newest `residual_count` entries, in a windowed row those within
            the window, are seen as these have them: entry `i` in slot `i % R`.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    start: Tensor
    length: Tensor
    sinks: Tensor
    recent: Tensor
    key_sum: Tensor | None = None
    value_sum: Tensor | None = None
    count: Tensor | None = None
    scales: Tensor | None = None
    residual_keys: Tensor | None = None
    residual_values: Tensor | None = None
    residual_count: Tensor | None = None

    def __post_init__(self) -> None:
        if self.keys.ndim != 2 or not 1 <= self.dim <= MAX_DIM:
            allowed = f"[slots, D] with D from 1 to {MAX_DIM} (in 4 bits [slots, D // 2])"
            raise ValueError(f"keys must have shape {allowed}, got {list(self.keys.shape)}")
        if self.scales is None and self.keys.dtype not in DTYPES:
            raise TypeError(f"keys must be float32, bfloat16 or float16, got {self.keys.dtype}")
        if self.scales is not None:
            self._expect_codes()
        on_device("keys", self.keys)
        slots, rows, dim = self.keys.shape[0], self.start.numel(), self.dim
        whole, wide = torch.int64, torch.float32
        if self.scales is None:
            self._expect("values", (slots, dim), self.keys.dtype)
        else:
            self._expect("values", (slots, dim // PACKED[self.values.dtype]), self.values.dtype)
        self._expect("positions", (slots,), torch.int32)
        for name in ("start", "length", "sinks", "recent"):
            self._expect(name, (rows,), whole)
        if self.count is not None:
            self._expect("count", (rows,), whole)
            self._expect("key_sum", (rows, dim), wide)
            self._expect("value_sum", (rows, dim), wide)
        if self.scales is not None:
            if self.scales.dtype not in DTYPES:
                raise TypeError(f"scales must be float32, bfloat16 or float16, got {self.scales.dtype}")
            self._expect("scales", (slots, 2), self.scales.dtype)
        if self.residual_count is not None:
            self._expect_rings()
        if not self.keys.is_contiguous():
            raise ValueError(f"keys must be contiguous, got strides {list(self.keys.stride())}")

    def _expect_codes(self) -> None:
        for name in ("keys", "values"):
            dtype = getattr(getattr(self, name), "dtype", None)
            if dtype not in PACKED:
                raise TypeError(f"{name} must be int8 or uint8 where there are scales, got {dtype}")
        if self.dim % PACKED[self.values.dtype]:
            raise ValueError(f"values must be int8 where D is odd, got {self.values.dtype} and D {self.dim}")

    def _expect_rings(self) -> None:
        if self.scales is None:
            raise ValueError("scales must be given with residual_count, got None")
        rows, rings = self.start.numel(), self.residual_keys
        size = rings.shape[1] if isinstance(rings, Tensor) and rings.ndim == 3 else 1
        self._expect("residual_count", (rows,), torch.int64)
        for name in ("residual_keys", "residual_values"):
            self._expect(name, (rows, max(size, 1), self.dim), self.scales.dtype)

    def _expect(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        tensor = getattr(self, name)
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
            got = getattr(tensor, "dtype", type(tensor).__name__)
            raise TypeError(f"{name} must be a tensor of {dtype}, got {got}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.device != self.keys.device:
            raise ValueError(f"{name} must be on {self.keys.device} like keys, got {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")

    @property
    def number(self) -> int:
        """How many rows there are."""
        return self.start.numel()

    @property
    def dim(self) -> int:
        """D, the size of one key."""
        return self.keys.shape[1] * PACKED.get(self.keys.dtype, 1)

    @property
    def packed(self) -> bool:
        """Whether keys or values are in 4 bits."""
        return torch.uint8 in (self.keys.dtype, self.values.dtype)

    @property
    def dim_pad(self) -> int:
        """The block of channels that holds D; of codes each half or quarter, which `tl.dot` takes from 16 on."""
        return padded(self.dim, 64 if self.packed else 16 if self.scales is None else 32)

    @property
    def pools(self) -> Pools:
        """The flat storage, as kernels are given it."""
        return Pools(self.keys, self.values, self.positions, self.scales)

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values as they come: of the pools, or where these are codes, of their scales."""
        return self.keys.dtype if self.scales is None else self.scales.dtype

    def table(self, heads: int, capacity: Tensor | None = None) -> Table:
        """The rows, `heads` of them a sequence, as kernels are given them."""
        sums = (self.count, self.key_sum, self.value_sum)
        windows = (self.sinks, self.recent)
        rings = (self.residual_count, self.residual_keys, self.residual_values)
        size = None if self.residual_keys is None else self.residual_keys.shape[1]
        return Table(self.number, heads, self.start, self.length, capacity, *windows, *sums, *rings, size)

    def operand(self, q: Tensor) -> tl.dtype:
        """The dtype in which queries meet keys: their own, or float32 if it differs."""
        # The interpreter multiplies bfloat16 as the integers of its bits.
        alike = q.dtype == self.dtype and not (INTERPRETED and q.dtype == torch.bfloat16)
        return DTYPES[q.dtype] if alike else tl.float32


def check_queries(
    q: Tensor,
    rows: Rows,
    ndim: int,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> int:
    """The group size G of queries `[B, HQ, (T,) D]` over these rows, once all fits."""
    if q.ndim != ndim or 0 in q.shape or q.shape[-1] != rows.dim:
        tokens = "" if ndim == 3 else "T, "
        raise ValueError(
            f"q must have shape [B, HQ, {tokens}{rows.dim}], none of them 0, got {list(q.shape)}"
        )
    if q.dtype not in DTYPES:
        raise TypeError(f"q must be float32, bfloat16 or float16, got {q.dtype}")
    if q.device != rows.keys.device:
        raise ValueError(f"q must be on {rows.keys.device} like keys, got {q.device}")
    if q.stride(-1) != 1:
        raise ValueError(f"q must have stride 1 along D, got strides {list(q.stride())}")
    if rows.number == 0 or rows.number % q.shape[0] or q.shape[0] * q.shape[1] % rows.number:
        raise ValueError(
            f"q must have B dividing {rows.number} rows and HQ a multiple of H, got {list(q.shape)}"
        )
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    if sliding_window is not None and (sliding_window < 1 or rows.count is not None):
        allowed = "None (with count: always) or at least 1"
        raise ValueError(f"sliding_window must be {allowed}, got {sliding_window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be None or positive, got {softcap}")
    if sinks is not None and sinks.dtype not in DTYPES:
        raise TypeError(f"sink_logits must be float32, bfloat16 or float16, got {sinks.dtype}")
    if sinks is not None and (
        sinks.shape != q.shape[1:2] or sinks.device != q.device or sinks.stride(0) != 1
    ):
        got = f"{list(sinks.shape)} with strides {list(sinks.stride())} on {sinks.device}"
        raise ValueError(f"sink_logits must be contiguous [{q.shape[1]}] on {q.device}, got {got}")
    return q.shape[0] * q.shape[1] // rows.number


def check_positions(query_positions: Tensor, shape: tuple[int, ...], rows: Rows) -> None:
    """Query positions of that shape, whole numbers, on the device of the rows."""
    if query_positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"query_positions must be int32 or int64, got {query_positions.dtype}")
    if tuple(query_positions.shape) != shape:
        raise ValueError(f"query_positions must have shape {list(shape)}, got {list(query_positions.shape)}")
    if query_positions.device != rows.keys.device:
        raise ValueError(
            f"query_positions must be on {rows.keys.device} like keys, got {query_positions.device}"
        )


def on_device(name: str, tensor: Tensor) -> None:
    """A tensor that the kernels can reach."""
    if tensor.device.type == "cuda" or (INTERPRETED and tensor.device.type == "cpu"):
        return
    raise ValueError(
        f"{name} must be on a CUDA device, got {tensor.device} "
        "(a CPU works only in Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported)"
    )


def guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches inside go to the device of `tensor`."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def device_traits(device: torch.device) -> tuple[int, bool, int]:
    """Multiprocessors, whether kernels can start early, and bytes of shared memory that a program can have. Of Triton's
    interpreter: 4, no and 0."""
    if device.type != "cuda":
        return 4, False, 0
    traits = torch.cuda.get_device_properties(device)
    early = traits.major >= 9 and hasattr(tl.extra.cuda, "gdc_wait")
    return traits.multi_processor_count, early, getattr(traits, "shared_memory_per_block_optin", 0)


def padded(size: int, least: int = 16) -> int:
    """The next power of two, at least `least`: what a block of `size` needs."""
    return max(least, triton.next_power_of_2(size))
