"""Questions that nobody knew of when the text was compressed: many methods over one text, answering side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headkv.cache.batches import nbytes_alone
from headkv.data.answers import share_found
from headkv.evaluation.reading import Reading
from headkv.integrations.cache import RaggedCache
from headkv.integrations.graph import DecodeGraph
from headkv.integrations.hook import NAME
from headkv.integrations.states import joined, state_bytes
from headkv.methods import FullCache
from headkv.models.attention import chosen_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headkv.data.needles import Needle
    from headkv.methods.base import Method, PromptMethod

WORTH_RECORDING = 8  # steps: recording takes about as long as four of them


@dataclass(frozen=True, eq=False)
class Question:
    """A question about a text, and what its answer must say.

    Attributes:
        ids: `[1, m]` int64: the question, the chat's turn, the beginning of the answer.
        answers: all that the answer must say, in any order.
        max_new_tokens: of the answer.
    """

    ids: Tensor
    answers: tuple[str, ...]
    max_new_tokens: int = 16

    @classmethod
    def of(cls, needle: Needle, tokenizer: PreTrainedTokenizerBase, spare: int = 4) -> Question:
        """A needle's question, with room for the answer's tokens and `spare` more."""
        answer = str(tokenizer.decode(needle.answer_ids[0])).strip()
        return cls(needle.question_ids, (answer,), needle.answer_ids.shape[1] + spare)

    def found_in(self, text: str) -> float:
        """The share of the answers that stand in `text`, in any case: RULER's measure, arXiv 2404.06654."""
        return share_found(self.answers, text)


@dataclass(frozen=True)
class Verdict:
    """What one method made of one question.

    Attributes:
        method: its name.
        stored_share: stored entries over those of a full cache, after the compression, without head room.
        nbytes: of the compressed cache.
        found: share of the answers found.
        text: what the model wrote.
    """

    method: str
    stored_share: float
    nbytes: int
    found: float
    text: str


@torch.inference_mode()
def judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context_ids: Tensor,
    questions: Sequence[Question],
    methods: Mapping[str, Method | PromptMethod],
) -> list[list[Verdict]]:
    """Read a text once, compress it by every method, and ask all questions.

    The caches of all methods decode together, as the sequences of one batch: a ragged cache does not mind that they
    are of different lengths.

    Args:
        model, tokenizer: of one decoder.
        context_ids: `[1, n]` int64.
        questions: about this text; each meets the compressed text alone.
        methods: by name; "full" is added.

    Returns:
        For each question a verdict on each method, the full cache first.
    """
    context_ids = context_ids.to(model.device)
    # A reading holds the last token back, which here is the first of a question: all of the text is compressed.
    reading = Reading(model, torch.cat([context_ids, questions[0].ids[:, :1].to(model.device)], 1))
    names = ["full", *methods]
    together = side_by_side(reading, [FullCache(), *methods.values()])
    saved, verdicts = together.cache.snapshot(), []
    with chosen_attention(model, NAME):
        for question in questions:
            together.cache.restore(saved)
            texts = answers(model, tokenizer, question, together.cache, len(names))
            found = [question.found_in(text) for text in texts]
            verdicts.append(list(map(Verdict, names, together.shares, together.sizes, found, texts)))
    return verdicts


@dataclass(frozen=True, eq=False)
class SideBySide:
    """A prompt, compressed by several methods.

    Attributes:
        cache: what each method keeps is one sequence of its batch.
        shares: for each method the stored entries over those of the prompt, without head room.
        sizes: for each method the bytes that it stores, as the allocator has them.
    """

    cache: RaggedCache
    shares: list[float]
    sizes: list[int]


@torch.inference_mode()
def side_by_side(reading: Reading, methods: Sequence[Method | PromptMethod]) -> SideBySide:
    """Compress one prompt by several methods.

    A ragged cache does not mind that its sequences are of different lengths, so that the methods are a batch.
    """
    plans = [reading.plan(method) for method in methods]
    cache = reading.compressed(methods[0], plans[0])
    states = sum(map(state_bytes, cache.states.values()))
    for i, layer in enumerate(cache.attending):
        layer.restore(reading.stored(i, [plan[i] for plan in plans]))
    cache.hold({i: joined([state] * len(methods)) for i, state in cache.states.items()})
    entries = cache.lengths().double().mean((0, 2)) / reading.cache.seen
    parts = (part for layer in cache.attending for part in layer.filled().parts)
    sizes = zip(*map(nbytes_alone, parts), strict=True)
    return SideBySide(cache, entries.tolist(), [states + sum(some) for some in sizes])


def _stepper(model: PreTrainedModel, cache: RaggedCache, most: int) -> Callable[[Tensor], Tensor]:
    """From tokens `[B, 1]` to the logits `[B, 1, V]` behind them; steps are recorded where a model's can be."""

    def plain(tokens: Tensor) -> Tensor:
        logits: Tensor = model(tokens, past_key_values=cache).logits
        return logits

    if most < WORTH_RECORDING or model.device.type != "cuda":
        return plain
    try:
        graph = DecodeGraph(model, cache)
    except ValueError:  # several devices, states, no Triton
        return plain
    graph.reserve(most)
    recordable = True

    def step(tokens: Tensor) -> Tensor:
        nonlocal recordable
        if recordable:
            try:
                return graph.step(tokens)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # a model that waits for the device; no token was counted
                recordable = False
        return plain(tokens)

    return step


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: Question,
    cache: RaggedCache,
    rows: int,
) -> list[str]:
    """Greedy decoding of all sequences, until each has written its end token or enough."""
    end, tokens = tokenizer.eos_token_id, question.ids.to(model.device).expand(rows, -1)
    logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
    step = _stepper(model, cache, question.max_new_tokens)
    written: list[Tensor] = []
    ended = torch.zeros(rows, dtype=torch.bool, device=model.device)
    while True:
        tokens = logits[:, -1:].argmax(-1)
        written.append(tokens)
        ended |= tokens[:, 0] == end
        if len(written) == question.max_new_tokens or bool(ended.all()):
            break
        logits = step(tokens)
    texts = []
    for ids in torch.cat(written, 1).tolist():
        until = ids.index(end) if end in ids else len(ids)
        texts.append(str(tokenizer.decode(ids[:until], skip_special_tokens=True)))
    return texts
