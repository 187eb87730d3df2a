"""One question about one text, put to many methods: before the cache is compressed, after it, or in a second turn.

The text is read once, whatever the methods, budgets and ways to ask; all methods of a way decode side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headkv import _checks
from headkv.data.chat import chat_frame, next_turn
from headkv.evaluation.reading import Reading
from headkv.evaluation.unseen import Question, answers, side_by_side
from headkv.integrations.hook import NAME
from headkv.methods import FullCache
from headkv.models.attention import chosen_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headkv.methods.base import Method, PromptMethod

WAYS = ("seen", "unseen", "second")
FIRST = "\n\nWhat is the text above about? Answer in one sentence."  # what is asked before a second turn
FIRST_REPLY = 24  # tokens at most

Make = Callable[[int], "Method | PromptMethod"]


@dataclass(frozen=True)
class Reply:
    """What one method made of one question.

    Attributes:
        name: of the method, as it was given.
        method: its parameters.
        tokens: of the prompt that was compressed.
        stored_share: stored entries over those tokens, without head room.
        nbytes: of the compressed cache, as the allocator has them.
        text: what the model wrote.
        log_probability: of the expected answer (without one: of what the first method wrote), the sum over its tokens.
        answer_tokens: how many these are.
        divergence: Kullback-Leibler divergence of this method's next-token distribution from the first method's, the
            mean over these tokens.
    """

    name: str
    method: str
    tokens: int
    stored_share: float
    nbytes: int
    text: str
    log_probability: float
    answer_tokens: int
    divergence: float


@torch.inference_mode()
def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    question: str,
    methods: Mapping[str, Make],
    ways: Sequence[str] = WAYS,
    *,
    expected: str | None = None,
    max_new_tokens: int = 64,
) -> Iterator[tuple[str, list[Reply]]]:
    """Ask one question about one text.

    Args:
        model, tokenizer: of one decoder.
        context: what is read first, the head of the chat included.
        question: what follows, to the beginning of the reply. The two are tokenised apart, whatever the way.
        methods: by name, given the tokens of the prompt; the others are compared with the first.
        ways: "seen": question and all are compressed together. "unseen": the text is compressed, then the question
            comes. "second": text and another question (`FIRST`) are compressed together, the full cache's reply to
            that follows, then the question as the next message of the chat.
        expected: the answer, with the space before it.
        max_new_tokens: of each reply.

    Yields:
        For each way its name and a reply of each method.

    Raises:
        ValueError: a way that is not known, a text or a question of less than three tokens, or more than the model
            reads.
    """
    for way in ways:
        _checks.one_of("question", way, WAYS)

    def ids(text: str) -> Tensor:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor([found], dtype=torch.int64, device=model.device)

    asked, text = ids(question), ids(context)
    if min(asked.shape[1], text.shape[1]) < 3:
        raise ValueError(
            f"context and question must have at least three tokens, got {context!r}, {question!r}"
        )
    check_fits(model, text.shape[1] + asked.shape[1] + max_new_tokens)
    answer = None if expected is None else ids(expected)
    # A reading holds the last token back, which here is the first of a question: all of the text is compressed.
    reading = Reading(model, torch.cat([text, asked[:, :1]], 1))
    for way in ways:
        prompt, tokens = reading, asked
        if way == "seen":
            prompt = reading.followed_by(asked[:, 1:])
            tokens = prompt.last
        elif way == "second":
            first = ids(FIRST + chat_frame(tokenizer)[1])
            prompt = reading.ending(first[:, :1]).followed_by(first[:, 1:])
            said = prompt.answer(FullCache(), FIRST_REPLY).tolist()
            end = said.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in said else len(said)
            reply = torch.tensor([said[:end]], dtype=torch.int64, device=model.device)
            tokens = torch.cat([prompt.last, reply, ids(next_turn(tokenizer)), asked], 1)
        yield way, replies(model, tokenizer, prompt, tokens, methods, answer, max_new_tokens)


@torch.inference_mode()
def replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Reading,
    tokens: Tensor,
    methods: Mapping[str, Make],
    answer: Tensor | None,
    max_new_tokens: int,
) -> list[Reply]:
    """Compress a prompt by every method, then go on with `tokens` `[1, m]`; `answer` `[1, a]` should come next."""
    n = prompt.cache.seen
    made = [make(n) for make in methods.values()]
    compressed = side_by_side(prompt, made)
    together, shares, sizes = compressed.cache, compressed.shares, compressed.sizes
    saved = together.snapshot()
    with chosen_attention(model, NAME):
        texts = answers(model, tokenizer, Question(tokens, (), max_new_tokens), together, len(made))
        if answer is None:  # the first method's own, or anything where it wrote none
            written = tokenizer(texts[0], add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
            answer = torch.tensor([written], device=model.device)
        together.restore(saved)
        asked = torch.cat([tokens, answer[:, :-1]], 1).expand(len(made), -1)
        logits = model(asked, past_key_values=together, logits_to_keep=answer.shape[1]).logits
    logs = logits.float().log_softmax(-1)
    sums = logs.gather(-1, answer.expand(len(made), -1)[..., None])[..., 0].sum(1).tolist()
    apart = (logs[:1].exp() * (logs[:1] - logs)).sum(-1).mean(1).clamp(min=0).tolist()
    return [
        Reply(name, repr(method), n, share, size, text, log, answer.shape[1], gap)
        for name, method, share, size, text, log, gap in zip(
            methods, made, shares, sizes, texts, sums, apart, strict=True
        )
    ]


def check_fits(model: PreTrainedModel, tokens: int) -> None:
    """As many tokens as the model reads.

    Raises:
        ValueError: they are more.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or tokens
    if tokens > limit:
        raise ValueError(
            f"text, question and reply must have at most {limit} tokens, as many as the model reads, got {tokens}"
        )
