"""Mixed precision: queries, keys and values of one dtype, whatever the projections and autocast made of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from headkv.cache.checks import DTYPES


class Together(NamedTuple):
    """Queries `[B, HQ, T, D]`, keys and values `[B, H, T, D]` of one dtype."""

    q: Tensor
    keys: Tensor
    values: Tensor


@contextmanager
def in_one_dtype(
    q: Tensor, keys: Tensor, values: Tensor, stored: torch.dtype | None
) -> Iterator[tuple[Together, torch.dtype]]:
    """What attention is to be computed with, and the dtype that the model expects of it.

    Under autocast that is autocast's, as it is for torch's own attention; rotary embeddings leave queries and keys in
    float32 there. What joins rows that are stored already takes their dtype: a prompt may be read under autocast, and
    its answer written without. Inside, autocast is off, so that nothing is rounded again.

    Args:
        q, keys, values: of the new tokens.
        stored: what the rows hold; None before the first token.
    """
    device = q.device.type
    autocast = torch.is_autocast_enabled(device)
    result = torch.get_autocast_dtype(device) if autocast and q.dtype in DTYPES else q.dtype
    wanted = result if stored is None else stored
    tensors = (x.to(wanted) if x.dtype in DTYPES and wanted in DTYPES else x for x in (q, keys, values))
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        yield Together(*tensors), result
