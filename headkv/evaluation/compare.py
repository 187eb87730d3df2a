"""Methods side by side on one document: what each stores, how fast it decodes, and whether it still answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headkv.evaluation.resident import resident_bytes
from headkv.heads import HeadProfile
from headkv.integrations.cache import RaggedCache
from headkv.methods import (
    AdaKV,
    DuoAttention,
    HeadKV,
    PyramidKV,
    RandomHeads,
    RazorAttention,
    SnapKV,
    StreamingLLM,
)
from headkv.models.attention import kept_attention
from headkv.models.decoding import greedy
from headkv.scorers import SnapKVScorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headkv.data import Fact, Haystack
    from headkv.methods.base import Method

FULL_SDPA = "full cache (transformers)"


@dataclass(frozen=True)
class Result:
    """One method on one document.

    Attributes:
        name: of the method.
        stored_share: stored entries over tokens, right after the prefill, without head room.
        nbytes: by our count, head room and bookkeeping included; the full cache's are its tensors'.
        resident_bytes: what the process's resident size grew by while the cache was made (None where unknown).
        prefill_seconds: of the context, compression included.
        decode_ms: median of a decode step.
        answers: what the model wrote, for each question, when the question was part of the compressed prompt.
        right: how many of these answers are right.
        right_unseen: the same where the context was compressed before the question was known.
        asked: how many questions.
        lengths: stored entries `[layers][KV heads]`.
    """

    name: str
    stored_share: float
    nbytes: int
    resident_bytes: int | None
    prefill_seconds: float
    decode_ms: float
    answers: tuple[str, ...]
    right: int
    right_unseen: int
    asked: int
    lengths: tuple[tuple[int, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the derived tokens per second."""
        return {**asdict(self), "decode_tokens_per_second": 1000 / self.decode_ms}


def smollm2_methods(share: float, length: int) -> dict[str, Method]:
    """Every method of headkv, sized so that SmolLM2 stores about `share` of a prompt of `length` tokens."""
    profile = HeadProfile.builtin
    echo, induction, gate = (profile(f"smollm2-{kind}") for kind in ("echo", "induction", "gate"))
    # SmolLM2 reads one token a digit: a narrow kernel would keep only the first ones of a number.
    scorer = SnapKVScorer(kernel_size=21)
    methods: dict[str, Method] = {
        "AdaKV": AdaKV(share, scorer),
        "HeadKV": HeadKV(share, profile("smollm2-retrieval"), scorer=scorer),
        "DuoAttention": DuoAttention.for_share(share, length, gate),
        "RazorAttention": RazorAttention.for_share(share, length, echo, induction, num_kv_heads=3),
        "SnapKV": SnapKV(share, scorer),
        "PyramidKV": PyramidKV(share, scorer=scorer),
        "StreamingLLM": StreamingLLM(share),
        "RandomHeads": RandomHeads.for_share(share, length),
    }
    return methods


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    haystack: Haystack,
    methods: dict[str, Method],
    *,
    max_new_tokens: int = 12,
    on_step: Callable[[str], None] = lambda name: None,
) -> Iterator[Result]:
    """Run every method, and transformers' own full cache first, on one context and all its questions.

    Each question is asked in both ways that a user meets: as the end of the prompt that is compressed
    (question-aware), and after the context was compressed without it (question-agnostic), every question from the same
    snapshot. Greedy decoding.

    Args:
        model, tokenizer: of one decoder.
        haystack: context, questions and answers.
        methods: by name.
        max_new_tokens: of each answer.
        on_step: called with a method's name before it runs.

    Yields:
        One `Result` a method, as soon as it is there.
    """
    with kept_attention(model):
        on_step("warm-up")
        for method in (None, *list(methods.values())[:1]):  # what is loaded once is nobody's memory
            _answer(model, haystack.context_ids[:, :256], _cache(model, method), 2, None)
        on_step(FULL_SDPA)
        yield _run(model, tokenizer, haystack, FULL_SDPA, None, max_new_tokens)
        for name, method in methods.items():
            on_step(name)
            yield _run(model, tokenizer, haystack, name, method, max_new_tokens)


@torch.inference_mode()
def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    haystack: Haystack,
    name: str,
    method: Method | None,
    max_new_tokens: int,
) -> Result:
    context = haystack.context_ids
    n = context.shape[1]
    cache = _cache(model, method)
    before = resident_bytes()
    begin = time.perf_counter()
    model(context, past_key_values=cache, logits_to_keep=1)
    prefill_seconds = time.perf_counter() - begin
    after = resident_bytes()
    if method is None:
        lengths = torch.full((len(cache.layers), cache.layers[0].keys.shape[1]), n)
        nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    else:
        lengths, nbytes = cache.lengths()[:, 0], cache.nbytes
    saved = None if method is None else cache.snapshot()
    unseen, answers, steps = [], [], []
    for index, question in enumerate(haystack.question_ids):
        if method is not None:
            cache.restore(saved)
        tokens, seconds = _answer(model, question, cache, max_new_tokens, tokenizer.eos_token_id)
        unseen.append(str(tokenizer.decode(tokens, skip_special_tokens=True)))
        steps += seconds
        if method is None:  # a full cache forgets the question, and answers the same in both ways
            cache.crop(n - cache.get_seq_length())
            answers.append(unseen[-1])
            continue
        aware = _answer(
            model, haystack.prompt(index), _cache(model, method), max_new_tokens, tokenizer.eos_token_id
        )
        answers.append(str(tokenizer.decode(aware[0], skip_special_tokens=True)))
    return Result(
        name=name,
        stored_share=float(lengths.float().mean()) / n,
        nbytes=nbytes,
        resident_bytes=None if before is None or after is None else after - before,
        prefill_seconds=prefill_seconds,
        decode_ms=1000 * median(steps),
        answers=tuple(answer.strip() for answer in answers),
        right=_count_right(haystack.facts, answers),
        right_unseen=_count_right(haystack.facts, unseen),
        asked=len(haystack.facts),
        lengths=tuple(map(tuple, lengths.tolist())),
    )


def _cache(model: PreTrainedModel, method: Method | None) -> Any:
    from transformers import DynamicCache

    if method is None:
        return DynamicCache(config=model.config)
    # Nothing is taken back here, so that windowed rows need store no more than they attend to.
    return RaggedCache.for_model(model, method, rollback=0)


def _count_right(facts: Sequence[Fact], answers: Sequence[str]) -> int:
    return sum(fact.is_answered_by(answer) for fact, answer in zip(facts, answers, strict=True))


def _answer(
    model: PreTrainedModel, question: Tensor, cache: Any, max_new_tokens: int, eos: int | None
) -> tuple[list[int], list[float]]:
    """Greedy decoding after `question` `[1, m]`: the tokens up to `eos`, and each step's seconds."""
    # The last token is a step of its own: a prefill attends densely, and would answer from the full cache.
    model(question[:, :-1], past_key_values=cache, logits_to_keep=1)
    written = greedy(model, question[:, -1:], cache, max_new_tokens)
    tokens, seconds = [], []
    for _ in range(max_new_tokens):
        begin = time.perf_counter()
        tokens.append(next(written))
        seconds.append(time.perf_counter() - begin)
    return tokens[: tokens.index(eos)] if eos in tokens else tokens, seconds
