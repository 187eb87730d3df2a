"""Two kinds of heads: retrieval heads keep all, the others the sinks and a window that slides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headkv import _checks
from headkv.methods.base import Keep, Windows
from headkv.prefill import Prefill

if TYPE_CHECKING:
    from headkv.heads.profile import HeadProfile


def windowed(
    prefill: Prefill, retrieval: Tensor, sinks: int, recent: int, *, compensate: bool = False
) -> Keep:
    """All entries of retrieval heads; the first `sinks` and last `recent` of the others, as windowed rows.

    A prompt that is not longer than sinks and window is kept whole, and the rows are windowed all the same:
    they fill up while decoding, then slide.

    Args:
        prefill: one layer of one prompt.
        retrieval: `[H]` bool.
        sinks: at least 0.
        recent: at least 1.
        compensate: the others stand one mean entry in for what they drop.
    """
    n, device = prefill.length, prefill.keys.device
    only_retrieval = bool(retrieval.all())
    retrieval = retrieval.to(device)
    place = torch.arange(n, device=device)
    mask = retrieval[:, None] | (place < sinks) | (place >= n - recent)
    if only_retrieval:
        return Keep(mask)
    return Keep(mask, *_numbers(retrieval, sinks, recent, compensate))


def windows_of(retrieval: Tensor, sinks: int, recent: int, *, compensate: bool = False) -> Windows:
    """Retrieval heads see all, the others the first `sinks` and last `recent` entries; arguments as in `windowed`.

    >>> windows_of(torch.tensor([True, False]), sinks=4, recent=8).recent.tolist()
    [0, 8]
    """
    return Windows(*_numbers(retrieval, sinks, recent, compensate))


def _numbers(
    retrieval: Tensor, sinks: int, recent: int, compensate: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sinks, recent and compensate of each head, `[H]`: 0 and False for retrieval heads."""
    streaming = ~retrieval
    return streaming.long() * sinks, streaming.long() * recent, streaming if compensate else None


def head_scores(
    name: str, profile: HeadProfile, num_layers: int, num_kv_heads: int, reduce: str = "max"
) -> Tensor:
    """Scores `[L, H]` of a profile for a model of `num_layers` layers of `num_kv_heads` KV heads.

    Raises:
        ValueError: a profile of a model with other layers or heads.
    """
    if profile.num_layers != num_layers:
        raise ValueError(
            f"{name} must be a profile of {num_layers} layers like the model, "
            f"got {profile.num_layers} ({profile.model})"
        )
    return profile.kv_scores(num_kv_heads, reduce)


def top_heads(scores: Tensor, count: int) -> Tensor:
    """The `count` highest of `[L, H]` scores, `[L, H]` bool; of equals the earlier layer, then head.

    >>> top_heads(torch.tensor([[.9, .5], [.5, .1]]), 2).tolist()
    [[True, True], [False, False]]
    """
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device="cpu")
    chosen[order[:count].cpu()] = True
    return chosen.view(scores.shape)


def windowed_share(retrieval: float, window: int, length: int) -> float:
    """Share stored where a share `retrieval` of the heads keeps all and the others `window` entries each.

    >>> windowed_share(0.5, window=320, length=3200)
    0.55
    """
    _checks.whole("length", length, 1)
    return retrieval + (1 - retrieval) * min(length, window) / length


def split_share(share: float, length: int, sinks: int, recent: int) -> tuple[float, int, int]:
    """Retrieval heads, sinks and window that together store `share` of a prompt.

    Sinks and window stay as given while they take at most half of the share; on a shorter prompt they
    shrink to half of it, a quarter of that sinks at most, so that the rest is left for retrieval heads.

    Returns:
        The share of retrieval heads, sinks, recent.

    >>> split_share(0.2, 6400, sinks=64, recent=256)[1:], split_share(0.2, 800, sinks=64, recent=256)[1:]
    ((64, 256), (20, 60))
    """
    _checks.between("share", share, 0, 1)
    _checks.whole("length", length, 1)
    window = min(sinks + recent, max(1, round(share * length / 2)))
    sinks = sinks if window == sinks + recent else min(sinks, window // 4)
    full = (share * length - window) / (length - window) if length > window else 1.0
    return min(1.0, max(0.0, full)), sinks, window - sinks
