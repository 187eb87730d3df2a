"""What a ragged layer accepts. Each check names the argument, what it was and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from headkv import _checks
from headkv.cache.quantised import BITS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def storable(name: str, tensor: Any) -> None:
    """A floating tensor of a dtype that the pools can hold."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")


def dense(keys: Tensor, values: Tensor) -> None:
    """Keys and values `[B, H, n, D]` that belong together."""
    storable("keys", keys)
    storable("values", values)
    if keys.ndim != 4 or 0 in keys.shape:
        raise ValueError(f"keys must have shape [B, H, n, D] with no empty dimension, got {list(keys.shape)}")
    same(keys, values)


def same(keys: Tensor, values: Tensor) -> None:
    """Keys and values of one shape, dtype and device."""
    if values.shape != keys.shape:
        raise ValueError(f"values must have the shape of keys {list(keys.shape)}, got {list(values.shape)}")
    if values.dtype != keys.dtype:
        raise TypeError(f"values must have the dtype of keys {keys.dtype}, got {values.dtype}")
    if values.device != keys.device:
        raise ValueError(f"values must be on the device of keys {keys.device}, got {values.device}")


class Stored(Protocol):
    """A layer that is stored, in one part or several."""

    @property
    def batch_size(self) -> int:
        """Sequences, B."""

    @property
    def num_kv_heads(self) -> int:
        """H."""

    @property
    def head_dim(self) -> int:
        """D."""

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values that come in."""

    @property
    def device(self) -> torch.device:
        """Where they lie."""


def appendable(layer: Stored, keys: Tensor, values: Tensor) -> None:
    """New tokens `[B, H, T, D]` for this layer."""
    storable("keys", keys)
    storable("values", values)
    want = (layer.batch_size, layer.num_kv_heads, layer.head_dim)
    if keys.ndim != 4 or (keys.shape[0], keys.shape[1], keys.shape[3]) != want or keys.shape[2] == 0:
        allowed = f"[{want[0]}, {want[1]}, T >= 1, {want[2]}]"
        raise ValueError(f"keys must have shape {allowed} to be appended, got {list(keys.shape)}")
    same(keys, values)
    if keys.dtype != layer.dtype:
        raise TypeError(f"keys must have the layer's dtype {layer.dtype}, got {keys.dtype}")
    if keys.device != layer.device:
        raise ValueError(f"keys must be on the layer's device {layer.device}, got {keys.device}")


def storage(given: Any, allowed: Sequence[str], head_dim: int, residual_length: Any = 0) -> None:
    """How vectors of `head_dim` channels are stored."""
    _checks.one_of("storage", given, allowed)
    residual(residual_length, given)
    if head_dim % 2 and 4 in BITS.get(given, ()):
        raise ValueError(
            f"storage must be 'model' or 'int8' where head_dim is odd, as 4 bits take two channels a byte, "
            f"got {given!r} and {head_dim}"
        )


def residual(length: Any, storage: str) -> None:
    """How many newest entries are held as they came, beside codes."""
    if _checks.whole("residual_length", length) and storage == "model":
        raise ValueError(
            f"residual_length must be 0 with storage 'model', which rounds nothing, got {length}"
        )


def mask(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A bool tensor of this shape on this device."""
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:
        raise TypeError(
            f"{name} must be a bool tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}"
        )
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    return tensor


def keep(tensor: Tensor | None, shape: tuple[int, int, int], device: torch.device) -> Tensor | None:
    """`keep` `[B, H, n]` bool, or None."""
    return None if tensor is None else mask("keep", tensor, shape, device)


def valid(tensor: Tensor | None, keys: Tensor) -> Tensor | None:
    """`valid` `[B, n]` bool for keys `[B, H, n, D]`, or None."""
    if tensor is None:
        return None
    return mask("valid", tensor, (keys.shape[0], keys.shape[2]), keys.device).contiguous()


def window_tensors(
    sinks: int | Tensor,
    recent: int | Tensor,
    compensate: Tensor | None,
    shape: tuple[int, int],
    device: torch.device,
) -> None:
    """`sinks`, `recent` (int, or `[B, H]` whole numbers) and `compensate` (`[B, H]` bool or None); see `contents`."""
    for name, value in (("sinks", sinks), ("recent", recent)):
        if not isinstance(value, Tensor):
            _checks.whole(name, value)
            continue
        if value.dtype.is_floating_point or value.dtype in (torch.bool, torch.complex64):
            raise TypeError(f"{name} must be an int tensor, got {value.dtype}")
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}")
    if compensate is not None:
        mask("compensate", compensate, shape, device)


def contents(
    length: Tensor, sinks: Tensor, recent: Tensor, compensate: Tensor | None = None
) -> tuple[bool, bool]:
    """Checks that need values, all in one transfer from the device: no window is negative.

    Returns:
        Whether a row of these lengths is empty, and whether any row compensates.
    """
    facts = [length.min(), sinks.min(), recent.min()]
    if compensate is not None:
        facts.append(compensate.any().long())
    shortest, *least, folds = [*torch.stack(facts).tolist(), 0][:4]
    for name, low in zip(("sinks", "recent"), least, strict=True):
        if low < 0:
            raise ValueError(f"{name} must be at least 0 everywhere, got {low}")
    return shortest == 0, folds == 1


def rows(given: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> tuple[list[tuple[Tensor, Tensor]], int, int]:
    """`rows[batch][head] = (keys [n, D], values [n, D])`, all of one D, dtype and device."""
    if len(given) == 0 or len(given[0]) == 0:
        raise ValueError("rows must hold at least one batch entry with at least one head, got none")
    heads = len(given[0])
    pairs: list[tuple[Tensor, Tensor]] = []
    for b, batch in enumerate(given):
        if len(batch) != heads:
            raise ValueError(f"rows[{b}] must have {heads} heads like rows[0], got {len(batch)}")
        for h, (keys, values) in enumerate(batch):
            try:
                storable("keys", keys)
                storable("values", values)
                same(keys, values)
                first = pairs[0][0] if pairs else keys
                if keys.ndim != 2 or keys.shape[1] != first.shape[1] or keys.shape[1] == 0:
                    raise ValueError(f"keys must have shape [n, {first.shape[-1]}], got {list(keys.shape)}")
                if keys.dtype != first.dtype or keys.device != first.device:
                    raise ValueError(
                        f"keys must be {first.dtype} on {first.device} like rows[0][0], "
                        f"got {keys.dtype} on {keys.device}"
                    )
            except (TypeError, ValueError) as error:
                raise type(error)(f"rows[{b}][{h}]: {error}") from None
            pairs.append((keys, values))
    return pairs, len(given), heads


def positions(
    given: Sequence[Sequence[Tensor]],
    pairs: Sequence[tuple[Tensor, Tensor]],
    batch_size: int,
    num_kv_heads: int,
) -> list[Tensor]:
    """`positions[batch][head]` `[n]`: increasing, at least 0, one an entry."""
    if len(given) != batch_size or any(len(batch) != num_kv_heads for batch in given):
        raise ValueError(f"positions must hold {batch_size} x {num_kv_heads} rows like rows")
    flat = [torch.as_tensor(p) for batch in given for p in batch]
    for r, (where, (keys, _)) in enumerate(zip(flat, pairs, strict=True)):
        name = f"positions[{r // num_kv_heads}][{r % num_kv_heads}]"
        if tuple(where.shape) != (keys.shape[0],):
            raise ValueError(f"{name} must have shape [{keys.shape[0]}], got {list(where.shape)}")
        if where.numel() and (int(where[0]) < 0 or bool((where.diff() <= 0).any())):
            raise ValueError(f"{name} must be increasing and at least 0, got {where.tolist()[:8]} ...")
    return flat


def batch_index(index: Tensor, batch_size: int) -> Tensor:
    """`index` `[new B]` int64 into the batch."""
    if not isinstance(index, Tensor) or index.ndim != 1 or index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"index must be a 1-D int tensor, got {index!r}")
    if index.numel() == 0 or int(index.min()) < 0 or int(index.max()) >= batch_size:
        raise ValueError(f"index must be non-empty and lie in [0, {batch_size}), got {index.tolist()}")
    return index.long()
