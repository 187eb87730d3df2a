"""The CPU backend: adapts a layer's tensors to the compiled extension, which does the work."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from headkv.cache.ragged import RaggedLayer
from headkv.cache.residual import NAMES as RESIDUAL
from headkv.cache.rust import array, arrays, available, extension
from headkv.logits import Rule

__all__ = ["available", "decode", "extend", "require"]

require = extension


def decode(q: Tensor, layer: RaggedLayer, rule: Rule) -> Tensor:
    """One new token a sequence, already appended. `q` `[B, HQ, D]` -> `[B, HQ, D]`."""
    last = torch.full((q.shape[0], 1), layer.seen - 1, device=q.device)
    return extend(q[:, :, None], layer, rule, query_positions=last)[:, :, 0]


def extend(
    q: Tensor, layer: RaggedLayer, rule: Rule, *, query_positions: Tensor, isa: str | None = None
) -> Tensor:
    """T new tokens, already appended, causal among themselves. `q` `[B, HQ, T, D]` -> `[B, HQ, T, D]`.

    Args:
        isa: one of `headkv._rust.instruction_sets()`; default: the first, which is the best.

    Raises:
        ImportError: without the compiled extension.
        ValueError, TypeError: on a layer whose rows do not lie within its pools; nothing is read then.
    """
    queries = q.to(torch.float32).contiguous()
    sinks = None if rule.sink_logits is None else rule.sink_logits.detach().to(torch.float32).contiguous()
    out = torch.empty_like(queries)
    extension().attend(
        array("q", queries),
        array("query_positions", query_positions.to(torch.int64).contiguous()),
        layer_arrays(layer),
        str(layer.dtype).removeprefix("torch."),
        array("out", out),
        scale=rule.scale,
        sliding_window=rule.sliding_window,
        softcap=rule.softcap,
        sink_logits=None if sinks is None else array("sink_logits", sinks),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return out.to(q.dtype)


def layer_arrays(layer: RaggedLayer) -> SimpleNamespace:
    """The layer's memory, not copied."""
    missing = dict.fromkeys(("key_sum", "value_sum", "count", "scales", *RESIDUAL))
    return arrays(layer.tensors(), **missing)
