"""A layer's rows for the Triton kernels of the distribution headkv-kernels, and append by them."""

from __future__ import annotations

import importlib
import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from headkv.cache.rows import Rows

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


def rows_of(rows: Rows) -> Any:
    """The same rows as the kernels have them, a `headkv_kernels.Rows`: the same tensors, not copied."""
    theirs = kernels().Rows
    return theirs(**{name: getattr(rows, name) for name in theirs.__dataclass_fields__})


def append(rows: Rows, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
    """Write T new tokens behind each row, in place, and lengthen the rows; see `headkv.cache.moves.append`."""
    keys, values = (new if new.stride(-1) == 1 else new.contiguous() for new in (keys, values))
    kernels().ragged_append(rows_of(rows), rows.capacity, keys, values, seen=rows.seen, valid=valid)
