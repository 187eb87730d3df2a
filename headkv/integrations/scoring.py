"""How likely a model finds texts behind a compressed prompt: what benchmarks of likelihood ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from headkv.attention.api import Backend
from headkv.integrations.cache import RaggedCache
from headkv.integrations.support import supported_model
from headkv.models.attention import kept_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headkv.methods.base import Method, PromptMethod

Texts = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]


@torch.no_grad()
def score(
    model: PreTrainedModel,
    method: Method | PromptMethod,
    context: Texts,
    continuation: Texts,
    *,
    per_token: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """The log-likelihood of each continuation behind its context, whose cache `method` compresses.

    A forward call over the whole text would not show compression: while a prompt is read, every token sees all before
    it. So the context is read and compressed without its last token; that one and the continuation are read over what
    is kept. Each token of the continuation is scored from the compressed cache alone, the first one too.

    Args:
        model: a decoder of transformers, wrapped or not; it is left as it was.
        method: what each head keeps of a context, e.g. `headkv.AdaKV(budget=0.2)`.
        context: token ids without padding, int64 `[B, n]`, or B texts of their own lengths, each of two tokens or more.
        continuation: token ids of as many texts, each of one token or more.
        per_token: do not sum over tokens.
        backend: of attention over the compressed cache; see `headkv.ragged_decode`.

    Returns:
        `[B]` float32: the sum over tokens of the natural logarithm of their probability; with `per_token` `[B, m]`, m
        the tokens of the longest continuation, 0 behind the end of shorter ones.

    Raises:
        TypeError, ValueError: texts that are not as described, or as `headkv.compress` does.

    >>> headkv.score(model, headkv.AdaKV(budget=0.2), [context] * 2, [yes, no]).argmax()  # doctest: +SKIP
    """
    contexts, continuations = _texts("context", context, 2), _texts("continuation", continuation, 1)
    if len(contexts) != len(continuations):
        raise ValueError(
            f"continuation must be of {len(contexts)} texts like context, got {len(continuations)}"
        )
    lengths = torch.tensor([len(text) for text in contexts])
    asked = [torch.cat([c[-1:], a[:-1]]) for c, a in zip(contexts, continuations, strict=True)]
    # Prompts end together, where their continuations begin.
    prompts = pad_sequence([c[:-1] for c in contexts], batch_first=True, padding_side="left")
    prompt_mask = torch.arange(prompts.shape[1]) >= prompts.shape[1] - (lengths - 1)[:, None]
    tokens, mask = _padded(asked)
    inner = supported_model(model)
    with kept_attention(inner):
        cache = RaggedCache.for_model(inner, method, backend=backend, rollback=0)
        _read(model, cache, prompts, prompt_mask, keep=1)
        cache.finalize_prefill()
        logits = _read(model, cache, tokens, torch.cat([prompt_mask, mask], 1))
    answers = _padded(continuations)[0].to(logits.device)
    chances = logits.float().log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    chances = chances.masked_fill(~mask.to(chances.device), 0)
    return chances if per_token else chances.sum(1)


def _read(model: Any, cache: RaggedCache, tokens: Tensor, mask: Tensor, keep: int = 0) -> Tensor:
    """The model's logits of new tokens `[B, T]`, or only of the last `keep`; `mask` `[B, n + T]` says what is text."""
    n, device = mask.shape[1] - tokens.shape[1], supported_model(model).device
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, n:]
    given = {"input_ids": tokens, "attention_mask": mask.long(), "position_ids": positions}
    only = {"logits_to_keep": keep} if keep else {}  # of several it would say that they are drafts
    on_device: dict[str, Any] = {name: x.to(device) for name, x in given.items()}
    logits: Tensor = model(**on_device, past_key_values=cache, use_cache=True, **only).logits
    return logits


def _texts(name: str, given: Texts, least: int) -> list[Tensor]:
    """Each text, `[n]` int64 on the CPU."""
    if isinstance(given, str | bytes) or not isinstance(given, Tensor | Sequence) or not len(given):
        raise TypeError(f"{name} must be token ids [B, n] or a list of such, got {given!r}")
    texts = []
    for i, one in enumerate(given):
        text = one.cpu() if isinstance(one, Tensor) else torch.tensor(one)
        if text.ndim != 1 or text.is_floating_point() or text.dtype == torch.bool:
            raise TypeError(f"{name}[{i}] must be token ids [n], got {text.dtype} {list(text.shape)}")
        if len(text) < least:
            raise ValueError(f"{name}[{i}] must have at least {least} token(s), got {len(text)}")
        texts.append(text.long())
    return texts


def _padded(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts `[B, m]` padded on the right, and which of them is text."""
    lengths = torch.tensor([len(text) for text in texts])
    tokens = pad_sequence(texts, batch_first=True)
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]
