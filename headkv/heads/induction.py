"""Echo and induction scores: which heads find the earlier occurrence of a token that repeats.

RazorAttention (arXiv 2407.15891), for models with rotary embeddings. The text is a block of random tokens, repeated.
A head echoes if it attends to the earlier occurrences of the current token, and inducts if it attends to the tokens
that came after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headkv import _checks
from headkv._config import class_or_name
from headkv.heads.observe import Attention, observe
from headkv.heads.profile import HeadProfile
from headkv.heads.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BLOCK = 1 << 22  # logits at a time: 16 MiB


def profile_repeats(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    num_tokens: int = 512,
    repeats: int = 4,
    seeds: Sequence[int] = (0, 1, 2),
    progress: bool = False,
) -> tuple[HeadProfile, HeadProfile]:
    """The echo and the induction score of every query head, measured.

    Args:
        model: a transformers decoder.
        tokenizer: its tokenizer, so that no special token is drawn and the text starts as the model's texts
            do. Without one, any token may be drawn, and the text starts with the block.
        num_tokens: length of the random block, drawn without replacement.
        repeats: how often the block stands in the text, at least 2.
        seeds: one text each; the scores are means.
        progress: show a progress bar.

    Returns:
        The echo profile and the induction profile. Scores are shares of the attention, in [0, 1].

    Raises:
        ValueError: a number is out of range; the message says which.
        TypeError: an option is no number.
    """
    vocabulary = ordinary_tokens(model, tokenizer)
    num_tokens = _checks.whole("num_tokens", num_tokens, 2, len(vocabulary))
    repeats = _checks.whole("repeats", repeats, 2)
    seeds = [_checks.whole("seeds", seed) for seed in seeds]
    bos = getattr(tokenizer, "bos_token_id", None)
    start = torch.tensor([] if bos is None else [bos], dtype=torch.int64)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", num_tokens * repeats + 1)
    limit -= len(start)
    if repeats > limit // num_tokens:
        raise ValueError(
            f"repeats must be an int in [2, {limit // num_tokens}] (the model reads {limit} tokens, the block "
            f"has {num_tokens}), got {repeats}"
        )
    if not seeds:
        raise ValueError("seeds must hold at least one int, got none")
    totals: dict[int, Tensor] = {}

    def watch(attention: Attention) -> None:
        shares = repeat_shares(attention, num_tokens, len(start))
        totals[attention.layer_idx] = totals.get(attention.layer_idx, torch.zeros_like(shares)) + shares

    with observe(model, watch), torch.inference_mode():
        for seed in track(seeds, "Echo and induction", progress):
            order = torch.randperm(len(vocabulary), generator=torch.Generator().manual_seed(seed))
            text = torch.cat([start, vocabulary[order[:num_tokens]].repeat(repeats)])
            # The inner model: the scores need no logits over the vocabulary.
            model.base_model(input_ids=text[None].to(model.device), use_cache=False)
    scores = torch.stack([totals[layer] for layer in sorted(totals)]).cpu() / len(seeds)  # [layers, 2, HQ]
    parameters: dict[str, Any] = {"num_tokens": num_tokens, "repeats": repeats, "seeds": seeds}
    name = class_or_name(model)
    echo, induction = (
        HeadProfile(name, kind, "query", scores[:, index], parameters)
        for index, kind in enumerate(("echo", "induction"))
    )
    return echo, induction


def repeat_shares(attention: Attention, period: int, start: int = 0) -> Tensor:
    """The attention's share on earlier occurrences and on the tokens after them: [2, HQ], float32.

    The mean over all queries i that have an earlier occurrence, of the sum of p[i, j] over the earlier
    occurrences j (echo), and of p[i, j + 1] (induction). Only a block of rows of one KV head is ever held,
    never an n x n matrix.

    Args:
        attention: of one layer, a whole text at once, one sequence.
        period: after how many tokens the text repeats.
        start: how many tokens come before the first block.
    """
    total = attention.keys.shape[2]
    group = attention.queries.shape[1] // attention.keys.shape[1]
    step = max(1, _BLOCK // (group * total))
    shares = []
    for head in range(attention.keys.shape[1]):
        sums = torch.zeros(2, group, device=attention.keys.device)
        for first in range(start + period, total, step):
            rows = slice(first, min(first + step, total))
            weights = attention.weights(head, rows)  # [G, R, n]
            at = torch.arange(first, rows.stop, device=weights.device)
            for back in range(period, rows.stop, period):
                for index in range(2):
                    column = (at - back + index).clamp_min(0)  # rows of the blocks before have none: * False
                    found = weights.gather(-1, column.expand(group, -1)[..., None])[..., 0]  # [G, R]
                    sums[index] += (found * (at - back >= start)).sum(-1)
        shares.append(sums / (total - start - period))
    return torch.cat(shares, dim=1)


def ordinary_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """The ids of the tokens that are no special or added tokens, ascending, int64."""
    size = int(model.config.get_text_config().vocab_size)
    if tokenizer is None:
        return torch.arange(size)
    ordinary = torch.ones(size, dtype=torch.bool)
    ordinary[len(tokenizer) :] = False  # rows of the embedding that only pad it
    ordinary[[token for token in tokenizer.added_tokens_decoder if token < size]] = False
    return ordinary.nonzero()[:, 0]
