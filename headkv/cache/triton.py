"""A layer's rows for the Triton kernels of the distribution headkv-kernels, and append by them."""

from __future__ import annotations

import importlib
import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from headkv.cache.ragged import RaggedLayer

INSTALL = "pip install headkv-kernels (from a checkout: pip install -e ./kernels)"


@cache
def available() -> bool:
    """Whether the kernels are installed and can run: on a CUDA device, or in Triton's interpreter."""
    installed = find_spec("headkv_kernels") is not None and find_spec("triton") is not None
    return installed and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1")


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


def append(layer: RaggedLayer, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
    """Write T new tokens behind each row, in place, and lengthen the rows; see `headkv.cache.moves.append`."""
    keys, values = (new if new.stride(-1) == 1 else new.contiguous() for new in (keys, values))
    kernels().ragged_append(rows_of(layer), layer.capacity, keys, values, seen=layer.seen, valid=valid)
