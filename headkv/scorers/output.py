"""How much of a value reaches the layer's output: its norm behind the output projection."""

from __future__ import annotations

import torch
from torch import Tensor

from headkv.prefill import Prefill

BLOCK = 1 << 24  # projected numbers held at a time: 64 MiB


def output_norms(prefill: Prefill, who: str) -> Tensor:
    """The L1 norm of each value behind its query head's rows of the output projection, mean over the group.

    Of CriticalKV, arXiv 2502.03805: what an entry can change in the layer's output is its weight times this norm.

    Args:
        prefill: one layer of a prompt.
        who: asks, for the error.

    Returns:
        `[H, n]` float32.

    Raises:
        ValueError: the model's attention has no output projection that headkv knows.
    """
    weight = prefill.parts.require("output", who)
    heads, n, dim = prefill.values.shape
    group = weight.shape[1] // (heads * dim)
    hidden = weight.shape[0]
    by_head = weight.to(prefill.values.device).float().view(hidden, heads, group, dim)
    norms = torch.empty(heads, n, device=prefill.values.device)
    step = max(1, BLOCK // (group * hidden))  # entries at a time
    for h in range(heads):
        rows = by_head[:, h].permute(1, 2, 0)  # [G, D, hidden]
        for first in range(0, n, step):
            values = prefill.values[h, first : first + step].float()
            norms[h, first : first + step] = (values @ rows).abs().sum(-1).mean(0)
    return norms
