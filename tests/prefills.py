"""Random prefills and profiles for the tests of scorers, allocators and methods."""

from __future__ import annotations

import torch
from torch import Tensor

from headkv.heads import HeadProfile
from headkv.methods import Prefill


def prefill(
    n: int,
    *,
    heads: int = 3,
    group: int = 2,
    dim: int = 16,
    queries: int | None = None,
    layer_idx: int = 0,
    num_layers: int = 4,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Prefill:
    """One layer of a random prompt of n tokens; `queries` is how many of the last are there, None for all.

    With `sinks` each query head has a learned one, from -3 on by threes.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, length: int) -> Tensor:
        return (2 * torch.randn(count, length, dim, generator=generator)).to(dtype)

    q = draw(heads * group, n)
    seen = n if queries is None else min(queries, n)
    k, v = draw(heads, n), draw(heads, n)
    learned = 3.0 * torch.arange(-1, heads * group - 1) if sinks else None
    rule = (dim**-0.5, sliding_window, softcap)
    return Prefill(q[:, n - seen :], k, v, layer_idx, num_layers, *rule, sink_logits=learned)


def profile(
    kind: str = "retrieval", *, layers: int = 4, heads: int = 6, per: str = "query", seed: int = 0
) -> HeadProfile:
    """A profile with random scores: 4 layers of 3 KV heads with 2 query heads each."""
    generator = torch.Generator().manual_seed(seed)
    return HeadProfile("test/random", kind, per, torch.rand(layers, heads, generator=generator))
