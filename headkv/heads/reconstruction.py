"""Reconstruction scores: which heads are looked at when a model reads a text again that it was asked to repeat.

KVzip (arXiv 2505.23416), section 3. No question is needed: whoever can write the whole text again from the cache has
all that any question may ask for. The score of an entry is the most attention that any token of the second reading
pays to it; the score of a head is that of its strongest entry.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headkv import _checks
from headkv._config import attention_layers, class_or_name, kv_heads
from headkv.data import needle_texts
from headkv.data.haystacks import chat_frame
from headkv.heads.observe import Attention, observe
from headkv.heads.profile import HeadProfile
from headkv.heads.progress import track
from headkv.logits import greatest_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ALL = "\n\nRepeat the whole text above, word for word."
_PART = "\n\nRepeat the text above, word for word, from the place on where it says:"
_OVERLAP = 8  # tokens before a later chunk that say where it begins


def profile_reconstruction(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    lengths: Sequence[int] = (1000, 2000),
    texts: int = 4,
    chunk: int = 2000,
    seed: int = 0,
    progress: bool = False,
) -> HeadProfile:
    """Measure the reconstruction score of every KV head; layers with a sliding window score 0.

    The published scores are those of one text, in the model's precision, where many of them are 1; these are means
    over several texts, in float32.

    Args:
        model: a transformers decoder.
        tokenizer: its tokenizer.
        lengths: of the texts, in tokens, in turn.
        texts: how many.
        chunk: tokens that are read again at a time.
        seed: of the texts.
        progress: show a progress bar.

    Raises:
        ValueError: an option is out of range.
    """
    _checks.whole("chunk", chunk, 1)
    made = needle_texts(tokenizer, texts=texts, lengths=lengths, seed=seed)
    prefix = len(tokenizer(chat_frame(tokenizer)[0], add_special_tokens=False)["input_ids"])
    total = torch.zeros(())
    for text in track(made, "Reconstruction", progress):
        requests = repeat_requests(tokenizer, text.context_ids, prefix, chunk)
        total = total + reconstruction_scores(model, text.context_ids, requests, prefix)
    options = {"lengths": list(lengths), "texts": texts, "chunk": chunk, "seed": seed}
    name = class_or_name(model)
    return HeadProfile(name, "reconstruction", "kv", total / texts, options)


def repeat_requests(
    tokenizer: PreTrainedTokenizerBase, context_ids: Tensor, prefix: int, chunk: int
) -> Iterator[tuple[slice, Tensor]]:
    """For each chunk of a text behind its prefix: where it is, and what is read [1, t] int64, the chunk last."""

    def ids(words: str) -> Tensor:
        return torch.tensor([tokenizer(words, add_special_tokens=False)["input_ids"]], dtype=torch.int64)

    footer, n = chat_frame(tokenizer)[1], context_ids.shape[1]
    for first in range(prefix, n, chunk):
        where = slice(first, min(first + chunk, n))
        begin = (
            context_ids[:, :0] if first == prefix else context_ids[:, max(prefix, first - _OVERLAP) : first]
        )
        request = ids(_ALL) if first == prefix else ids(_PART)
        yield where, torch.cat([request, begin, ids(footer), context_ids[:, where]], dim=1)


@torch.inference_mode()
def reconstruction_scores(
    model: PreTrainedModel, context_ids: Tensor, requests: Iterator[tuple[slice, Tensor]], prefix: int
) -> Tensor:
    """Scores of one text, [layers, H] float32 in [0, 1]: the model reads it once, and then every request behind it."""
    config = model.config.get_text_config()
    attend = attention_layers(config)
    scores = torch.zeros(len(attend), kv_heads(config), device=model.device)
    cache = model.base_model(context_ids.to(model.device), use_cache=True).past_key_values
    for where, ids in requests:

        def watch(attention: Attention, where: slice = where) -> None:
            if attention.sliding_window is None:
                found, layer = (
                    chunk_scores(attention, where, prefix).amax(-1),
                    attend.index(attention.layer_idx),
                )
                scores[layer] = torch.maximum(scores[layer], found)

        with observe(model, watch):
            model.base_model(ids.to(model.device), past_key_values=_fork(cache), use_cache=True)
    return scores.cpu()


def chunk_scores(attention: Attention, where: slice, prefix: int) -> Tensor:
    """Return the most attention that any query pays to each entry of a chunk, [H, m] float32.

    As published, a query's attention is shared out among the prefix, the chunk and what was read so far of the
    request alone, so that a chunk costs the same wherever in the text it is.

    Args:
        attention: of a request, [1, HQ, T, D], behind the whole text.
        where: the chunk.
        prefix: entries at the beginning that every head keeps.
    """
    total, new = attention.keys.shape[2], attention.queries.shape[2]
    columns = torch.cat(
        [torch.arange(prefix), torch.arange(where.start, where.stop), torch.arange(total - new, total)]
    ).to(attention.keys.device)
    weights = greatest_weights(attention.queries[0], attention.keys[0, :, columns], columns, attention.rule)
    return weights[:, prefix:-new]


def _fork(cache: Any) -> Any:
    """A cache of its own with the same entries: what is appended to it leaves `cache` as it is."""
    fork = copy.copy(cache)
    # What changes in place, a hybrid's states, is copied itself.
    fork.layers = [
        (copy.deepcopy if hasattr(layer, "recurrent_states") else copy.copy)(layer) for layer in cache.layers
    ]
    return fork
