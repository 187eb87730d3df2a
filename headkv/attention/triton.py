"""The GPU backend: hands a layer's tensors to the Triton kernels of the distribution headkv-kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headkv.cache.ragged import RaggedLayer
from headkv.cache.triton import available, kernels, rows_of
from headkv.cache.triton import kernels as require

__all__ = ["available", "decode", "extend", "kernels", "require", "rows_of", "step"]


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
    options: dict[str, Any] = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap}
    return kernels().ragged_decode(_storable(q), rows_of(layer), query_positions=last, **options).to(q.dtype)


def step(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    layer: RaggedLayer,
    *,
    seen: Tensor | None = None,
    ahead: bool = False,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One new token a sequence, stored and attended to. `q` `[B, HQ, D]` -> `[B, HQ, D]`.

    Args:
        keys, values: `[B, H, D]` of the new token; the layer has room for it.
        seen: `[1]` int64 on the device, the new token's position; default: `layer.seen`.
        ahead: as in `headkv.ragged_step`.
    """
    if seen is None:
        seen = torch.full((1,), layer.seen, device=q.device)
    options: dict[str, Any] = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap}
    rows, new = rows_of(layer), (_storable(keys), _storable(values))
    out = kernels().ragged_step(
        _storable(q), *new, rows, layer.capacity, _ticket(layer, rows), seen, ahead=ahead, **options
    )
    return out.to(q.dtype)


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
    options: dict[str, Any] = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap}
    return kernels().ragged_extend(_storable(q), rows_of(layer), query_positions=where, **options).to(q.dtype)


def _ticket(layer: RaggedLayer, rows: Any) -> Tensor:
    if layer.ticket is None:
        layer.ticket = kernels().new_ticket(rows)
    return layer.ticket


def _storable(x: Tensor) -> Tensor:
    """A tensor as the kernels read it: no float64, dense along D."""
    x = x.float() if x.dtype == torch.float64 else x
    return x if x.stride(-1) == 1 else x.contiguous()
