"""The CPU backend: adapts a layer's tensors to the compiled extension, which does the work."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from headkv.cache.ragged import RaggedLayer
from headkv.cache.rust import array, available, extension
from headkv.cache.rust import extension as require

__all__ = ["available", "decode", "extend", "require"]


class LayerArrays(NamedTuple):
    """A layer's tensors as numpy arrays."""

    keys: Any
    values: Any
    positions: Any
    start: Any
    length: Any
    capacity: Any
    sinks: Any
    recent: Any
    key_sum: Any
    value_sum: Any
    count: Any


def decode(
    q: Tensor,
    layer: RaggedLayer,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One new token a sequence, already appended. `q` `[B, HQ, D]` -> `[B, HQ, D]`."""
    last = torch.full((q.shape[0], 1), layer.seen - 1, device=q.device)
    out = extend(
        q[:, :, None],
        layer,
        query_positions=last,
        scale=scale,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    return out[:, :, 0]


def extend(
    q: Tensor,
    layer: RaggedLayer,
    *,
    query_positions: Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    isa: str | None = None,
) -> Tensor:
    """T new tokens, already appended, causal among themselves. `q` `[B, HQ, T, D]` -> `[B, HQ, T, D]`.

    Args:
        isa: one of `headkv._rust.instruction_sets()`; default: the first, which is the best.

    Raises:
        ImportError: without the compiled extension.
        ValueError, TypeError: on a layer whose rows do not lie within its pools; nothing is read then.
    """
    queries = q.to(torch.float32).contiguous()
    out = torch.empty_like(queries)
    extension().attend(
        array("q", queries),
        array("query_positions", query_positions.to(torch.int64).contiguous()),
        layer_arrays(layer),
        str(layer.dtype).removeprefix("torch."),
        array("out", out),
        scale=scale,
        sliding_window=sliding_window,
        softcap=softcap,
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return out.to(q.dtype)


def layer_arrays(layer: RaggedLayer) -> LayerArrays:
    """The layer's memory, not copied."""
    tensors = ((name, getattr(layer, name)) for name in LayerArrays._fields)
    return LayerArrays(*(None if tensor is None else array(name, tensor) for name, tensor in tensors))
