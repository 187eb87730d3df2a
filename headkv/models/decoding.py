"""Greedy decoding, a token at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def greedy(
    model: PreTrainedModel, tokens: Tensor, cache: Any, count: int, *, ends: Collection[int] = ()
) -> Iterator[int]:
    """The most likely token after `tokens`, and so on, each right after the forward pass that chose it.

    Args:
        model: a transformers decoder.
        tokens: `[1, m]` int64, not yet in the cache.
        cache: what came before; it grows.
        count: how many tokens at most.
        ends: tokens after which no more come.
    """
    for _ in range(count):
        logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        tokens = logits[:, -1:].argmax(-1)
        yield (token := int(tokens))
        if token in ends:
            return


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end what the model writes, by its generation config."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return frozenset(ends if isinstance(ends, list) else () if ends is None else (ends,))
