"""The two moves of a layer's entries in Rust, bit for bit equal to torch's; and how tensors get there."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headkv.cache.layout import Pools

if TYPE_CHECKING:
    from headkv.cache.ragged import RaggedLayer

INSTALL = "pip install headkv (from a checkout: maturin develop --release)"


@cache
def available() -> bool:
    """Whether the compiled extension is installed."""
    try:
        extension()
    except ImportError:
        return False
    return True


@cache
def extension() -> ModuleType:
    """The compiled extension.

    Raises:
        ImportError: when it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module("headkv._rust")
    except ImportError as error:
        raise ImportError(f"the rust backend needs headkv's compiled extension: {INSTALL}") from error


def gather(pools: Pools, source: Tensor) -> Pools:
    """New pools whose slot `i` is slot `source[i]` of `pools`, `source` `[new slots]`; `layout.gather`."""
    if pools.keys.shape[0] == 0:
        return Pools(*(pool.new_zeros((source.numel(), *pool.shape[1:])) for pool in pools))
    target = Pools(*(pool.new_empty((source.numel(), *pool.shape[1:])) for pool in pools))
    pools = Pools(*(pool.contiguous() for pool in pools))
    extension().gather(_arrays(pools), array("source", source), _arrays(target), torch.get_num_threads())
    return target


def append(layer: RaggedLayer, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
    """Write T new tokens behind each row, in place, and lengthen the rows; see `headkv.cache.moves.append`.

    Args:
        layer: has room for T more entries in every row; `seen` is still the position of the first new token.
        keys, values: `[B, H, T, D]`.
        valid: `[B, T]` bool or None; only True tokens are stored.

    Raises:
        ValueError: when a row has no room or lies outside the pools; nothing is written then.
    """
    keys, values = (_apart(new, layer) for new in (keys, values))
    extension().append(
        _arrays(layer.pools),
        *(array(name, getattr(layer, name)) for name in ("start", "length", "capacity")),
        array("keys", keys),
        array("values", values),
        None if valid is None else array("valid", valid),
        layer.seen,
        torch.get_num_threads(),
    )
    if valid is None:
        layer.length = layer.length + keys.shape[2]
    else:
        layer.length = layer.length + valid.sum(1).repeat_interleave(layer.num_kv_heads)


def array(name: str, tensor: Tensor) -> Any:
    """A CPU tensor's memory as a numpy array, not copied; 16-bit floats become the uint16 of their bits.

    numpy's array keeps the memory alive and torch refuses to resize it from then on.

    Raises:
        ValueError: when the tensor is not contiguous, not on the CPU, or its memory was released.
    """
    if not tensor.is_cpu:
        raise ValueError(f"{name} must be on the CPU for the rust backend, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")
    needed = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    held = tensor.untyped_storage().nbytes()
    if held < needed:
        raise ValueError(f"{name} must lie within its memory of {held} bytes, got {needed} bytes")
    if tensor.requires_grad:
        tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()


class _Arrays:
    """Pools as numpy arrays."""

    __slots__ = ("keys", "positions", "values")


def _arrays(pools: Pools) -> _Arrays:
    arrays = _Arrays()
    for name, pool in zip(Pools._fields, pools, strict=True):
        setattr(arrays, name, array(name, pool))
    return arrays


def _apart(new: Tensor, layer: RaggedLayer) -> Tensor:
    """New entries that are contiguous and no view of the layer's own pools."""
    new = new.contiguous()
    pools = (layer.keys, layer.values)
    shared = any(new.untyped_storage().data_ptr() == pool.untyped_storage().data_ptr() for pool in pools)
    return new.clone() if shared else new
