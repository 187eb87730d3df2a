"""Padding behind text, as batches have that are padded on the right: transformers lets it ask, and reads its answer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from headkv.attention import api
from headkv.attention.api import Backend
from headkv.cache import RaggedLayer
from headkv.logits import Rule


def answered(
    out: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor | None,
    rule: Rule,
    windows: Mapping[str, Tensor] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """What a prefill answers, `out` `[B, HQ, n, D]`, with padding that has text before it answered from that text.

    `generate` takes its first token from a batch's last column, whatever stands there.

    Args:
        out: of `dense.prefill`, where padding gets 0.
        q, keys, values, valid, rule: as given to it.
        windows: its `sinks`, `recent` and `compensate`, or None.
        backend: of attention where no gradient is wanted.
    """
    if valid is None or not (columns := (asks := _behind_text(valid)).any(0).nonzero()[:, 0]).numel():
        return out
    asks, some = asks[:, None, columns, None], q[:, :, columns]
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, keys, values))
    plain = (
        windows is None and rule.softcap is None and rule.sliding_window is None and rule.sink_logits is None
    )
    if wanted and plain:
        where = torch.arange(q.shape[2], device=q.device)
        seen = valid[:, None, None] & (where <= columns[:, None])
        seen = seen | ~asks  # what is not taken must be a number all the same
        got = F.scaled_dot_product_attention(some, keys, values, seen, scale=rule.scale, enable_gqa=True)
    else:
        stored = stored_whole(keys.detach(), values.detach(), valid, windows)
        where = columns.expand(q.shape[0], -1)
        got = api.extend(some, stored, rule, backend, query_positions=where)
    return out.index_copy(2, columns, torch.where(asks, got, out[:, :, columns]))


def stored_whole(
    keys: Tensor,
    values: Tensor,
    valid: Tensor | None,
    windows: Mapping[str, Tensor] | None = None,
    rollback: int = 0,
) -> RaggedLayer:
    """A layer of all text in `keys`, `values` `[B, H, n, D]`; a sequence may have none. Windowed rows hide the rest."""
    empty = [(k[:0], v[:0]) for k, v in zip(keys[0], values[0], strict=True)]
    layer = RaggedLayer.from_rows([empty] * keys.shape[0])
    if windows is not None:
        layer.rollback = rollback
        layer.set_windows(**{name: x.to(keys.device) for name, x in windows.items()})
    layer.append(keys, values, valid)
    return layer


def _behind_text(valid: Tensor) -> Tensor:
    """`[B, n]` bool: padding with text before it."""
    return ~valid & (valid.cumsum(1) > 0)
