"""Mixed precision: queries, keys and values of one dtype, whatever the projections and autocast made of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headkv.cache.checks import DTYPES


class Together(NamedTuple):
    """Queries `[B, HQ, T, D]`, keys and values `[B, H, T, D]` of one dtype."""

    q: Tensor
    keys: Tensor
    values: Tensor


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast computes in on this kind of device; None where it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def in_one_dtype(tensors: Together, stored: torch.dtype | None) -> tuple[Together, torch.dtype]:
    """What attention is to be computed with, and the dtype that the model expects of it.

    Under autocast that is autocast's, as it is for torch's own attention; rotary embeddings leave queries and keys in
    float32 there. What joins rows that are stored already takes their dtype: a prompt may be read under autocast, and
    its answer written without.

    Args:
        tensors: of the new tokens.
        stored: what the rows hold; None before the first token.
    """
    q = tensors.q
    autocast = autocast_dtype(q.device.type)
    result = autocast if autocast is not None and q.dtype in DTYPES else q.dtype
    wanted = result if stored is None else stored
    if wanted not in DTYPES:
        return tensors, result
    return Together(*(x.to(wanted) if x.dtype in DTYPES else x for x in tensors)), result
