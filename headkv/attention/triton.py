"""The GPU backend: hands a layer's tensors to the Triton kernels of the distribution headkv-kernels."""

from __future__ import annotations

import importlib
import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from headkv.cache.ragged import RaggedLayer

INSTALL = "pip install headkv-kernels (from a checkout: pip install -e ./kernels)"


def available() -> bool:
    """Whether the kernels are installed and can run: on a CUDA device, or in Triton's interpreter."""
    installed = find_spec("headkv_kernels") is not None and find_spec("triton") is not None
    return installed and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1")


def decode(
    q: Tensor,
    layer: RaggedLayer,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One new token a sequence, already appended. `q` `[B, HQ, D]` -> `[B, HQ, D]`.

    Raises:
        ImportError: without the kernels.
        ValueError: on a layer that is not on a CUDA device.
    """
    last = None
    if sliding_window is not None:
        last = torch.full((q.shape[0],), layer.seen - 1, device=q.device)
    options = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap}
    return kernels().ragged_decode(_storable(q), rows_of(layer), query_positions=last, **options).to(q.dtype)


def extend(
    q: Tensor,
    layer: RaggedLayer,
    *,
    query_positions: Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """T new tokens, already appended, causal among themselves. `q` `[B, HQ, T, D]` -> `[B, HQ, T, D]`.

    Raises:
        ImportError: without the kernels.
        ValueError: on a layer that is not on a CUDA device.
    """
    where = query_positions.to(q.device, torch.int64)
    options = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap}
    return kernels().ragged_extend(_storable(q), rows_of(layer), query_positions=where, **options).to(q.dtype)


@cache
def kernels() -> ModuleType:
    """The kernels' package.

    Raises:
        ImportError: when it, or Triton, is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module("headkv_kernels")
    except ImportError as error:
        raise ImportError(f"the triton backend needs headkv's kernels: {INSTALL}") from error


def rows_of(layer: RaggedLayer) -> Any:
    """The layer as a `headkv_kernels.Rows`: the same tensors, not copied."""
    rows = kernels().Rows
    return rows(**{name: getattr(layer, name) for name in rows.__dataclass_fields__})


def _storable(q: Tensor) -> Tensor:
    """Queries as the kernels read them: no float64, dense along D."""
    q = q.float() if q.dtype == torch.float64 else q
    return q if q.stride(-1) == 1 else q.contiguous()
