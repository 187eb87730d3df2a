"""The GPU backend: hands a layer's tensors to the Triton kernels of the distribution headkv-kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headkv.cache.ragged import RaggedLayer
from headkv.cache.triton import available, kernels, rows_of
from headkv.logits import Rule

__all__ = ["available", "decode", "extend", "kernels", "require", "rows_of", "step"]

require = kernels


def decode(q: Tensor, layer: RaggedLayer, rule: Rule) -> Tensor:
    """One new token a sequence, already appended. `q` `[B, HQ, D]` -> `[B, HQ, D]`.

    Raises:
        ImportError: without the kernels.
        ValueError: on a layer that is not on a CUDA device.
    """
    last = None
    if rule.sliding_window is not None:
        last = torch.full((q.shape[0],), layer.seen - 1, device=q.device)
    return kernels().ragged_decode(_dense(q), rows_of(layer), query_positions=last, **_keywords(rule))


def step(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    layer: RaggedLayer,
    rule: Rule,
    *,
    seen: Tensor | None = None,
    ahead: bool = False,
) -> Tensor:
    """One new token a sequence, stored and attended to. `q` `[B, HQ, D]` -> `[B, HQ, D]`.

    Args:
        keys, values: `[B, H, D]` of the new token; the layer has room for it.
        seen: `[1]` int64 on the device, the new token's position; default: `layer.seen`.
        ahead: read the layer even before the launches before this one in the stream have ended. Right only where none
            of those that may still run writes this layer, as when other layers' steps lie between.
    """
    if seen is None:
        seen = torch.full((1,), layer.seen, device=q.device)
    rows = rows_of(layer)
    if layer.ticket is None:
        layer.ticket = kernels().new_ticket(rows)
    new = _dense(keys), _dense(values)
    counters = layer.capacity, layer.ticket, seen
    return kernels().ragged_step(_dense(q), *new, rows, *counters, ahead=ahead, **_keywords(rule))


def extend(q: Tensor, layer: RaggedLayer, rule: Rule, *, query_positions: Tensor) -> Tensor:
    """T new tokens, already appended, causal among themselves. `q` `[B, HQ, T, D]` -> `[B, HQ, T, D]`.

    Raises:
        ImportError: without the kernels.
        ValueError: on a layer that is not on a CUDA device.
    """
    where = query_positions.to(q.device, torch.int64)
    return kernels().ragged_extend(_dense(q), rows_of(layer), query_positions=where, **_keywords(rule))


def _keywords(rule: Rule) -> dict[str, Any]:
    """The rule as the kernels' distribution says it, which knows nothing of ours."""
    sinks = rule.sink_logits
    if sinks is not None:
        sinks = _dense(sinks.float() if sinks.dtype == torch.float64 else sinks)
    numbers = {"scale": rule.scale, "sliding_window": rule.sliding_window, "softcap": rule.softcap}
    return {**numbers, "sink_logits": sinks}


def _dense(x: Tensor) -> Tensor:
    """A tensor as the kernels read it: dense along D."""
    return x if x.stride(-1) == 1 else x.contiguous()
