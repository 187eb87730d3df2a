"""What this process holds, by the operating system's own figure."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys

import psutil


def resident_bytes() -> int:
    """Bytes of this process that are in memory; garbage and (with glibc) freed blocks are given back first."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # a C library other than glibc
            ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)
