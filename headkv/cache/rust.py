"""The moves of a layer's entries in Rust, and their rounding, bit for bit equal to torch's; how tensors get there."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from headkv.cache.quantised import bits_of, empty_codes
from headkv.cache.residual import Residual
from headkv.cache.rows import Pools, Rows

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
        return pools.each(lambda pool: pool.new_zeros((source.numel(), *pool.shape[1:])))
    target = pools.each(lambda pool: pool.new_empty((source.numel(), *pool.shape[1:])))
    old, new = (_arrays(side.each(Tensor.contiguous)) for side in (pools, target))
    extension().gather(old, array("source", source), new, torch.get_num_threads())
    return target


def quantise(pools: Pools, bits: tuple[int, int]) -> Pools:
    """Pools of float entries as codes of so many bits; `quantised.quantised_pools`."""
    keys, values, scales = _quantised((pools.keys, pools.values), bits)
    return Pools(keys, values, pools.positions, scales)


def _quantised(sides: tuple[Tensor, Tensor], bits: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """`quantised.quantised` of keys and of values `[..., D]`: the codes of both, and scales `[..., 2]`."""
    codes = [empty_codes(x, one) for x, one in zip(sides, bits, strict=True)]
    scales = [x.new_empty(x.shape[:-1]) for x in sides]
    for x, code, scale in zip(sides, codes, scales, strict=True):
        extension().quantise(
            array("vectors", x.contiguous().view(scale.numel(), x.shape[-1])),
            str(x.dtype).removeprefix("torch."),
            array("codes", code.view(scale.numel(), code.shape[-1])),
            array("scales", scale.view(-1)),
        )
    return codes[0], codes[1], torch.stack(scales, -1)


def append(rows: Rows, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
    """Write T new tokens behind each row, in place, and lengthen the rows; see `headkv.cache.moves.append`.

    Raises:
        ValueError: when a row has no room or lies outside the pools; nothing is written then.
    """
    scales = None
    stored = keys.shape[2] if valid is None else valid.sum(1).repeat_interleave(rows.num_kv_heads)
    length, held = rows.length + stored, Residual.of(rows)
    count = None if held is None else (held.residual_count + stored).clamp(max=held.size)
    mask = None if valid is None else array("valid", valid)
    to_hold = [
        (
            array("rings", ring),
            array("new", side.contiguous().view(rows.rows, -1, rows.head_dim)),
            str(side.dtype).removeprefix("torch."),
            array("length", rows.length),
            mask,
        )
        for ring, side in zip(held or (), (keys, values), strict=False)
    ]
    if rows.scales is None:
        keys, values = (_apart(x, rows) for x in (keys, values))
    else:
        keys, values, scales = _quantised((keys, values), bits_of(rows.pools))
    extension().append(
        _arrays(rows.pools),
        *(array(name, getattr(rows, name)) for name in ("start", "length", "capacity")),
        *(array("new " + name, _bytes(x)) for name, x in (("keys", keys), ("values", values))),
        None if scales is None else array("new scales", _bytes(scales)),
        mask,
        rows.seen,
        torch.get_num_threads(),
    )
    # What needs memory is done: nothing fails between one ring and the next.
    for arguments in to_hold:
        extension().hold(*arguments)
    rows.length, rows.residual_count = length, count


def _arrays(pools: Pools) -> SimpleNamespace:
    """What the extension moves: bytes, whatever they hold."""
    moved = {name: x for name, x in pools._asdict().items() if x is not None}
    given = ((name, x if name == "positions" else _bytes(x)) for name, x in moved.items())
    return arrays(given, scales=None)


def _bytes(entries: Tensor) -> Tensor:
    return entries.detach().view(torch.uint8)


def arrays(tensors: Iterable[tuple[str, Tensor]], **missing: None) -> SimpleNamespace:
    """Tensors by name as an object with numpy arrays of these names, not copied: what the extension reads."""
    return SimpleNamespace(**{**missing, **{name: array(name, tensor) for name, tensor in tensors}})


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


def _apart(new: Tensor, rows: Rows) -> Tensor:
    """New entries that are contiguous and no view of the rows' own pools."""
    new = new.contiguous()
    pools = (rows.keys, rows.values)
    shared = any(new.untyped_storage().data_ptr() == pool.untyped_storage().data_ptr() for pool in pools)
    return new.clone() if shared else new
