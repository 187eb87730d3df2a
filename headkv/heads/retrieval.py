"""Retrieval scores: which heads fetch a fact that is hidden in a long text, while the model answers from it.

HeadKV, section 3.1. "retrieval" asks for a sentence to be copied, and counts how often a head's strongest
attention is on the very token that is written next. "retrieval-reasoning" asks for a fact that has to be chosen
between two, and sums the attention that a head has on the right one.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headkv._config import class_or_name
from headkv.data import Fact, haystack
from headkv.heads.observe import Attention, observe
from headkv.heads.profile import HeadProfile
from headkv.heads.progress import track
from headkv.models.decoding import end_tokens, greedy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LAST = slice(-1, None)

_COPIES = (
    ("the best thing to do in Odile", "to sit in the old botanical garden and eat a warm almond cake"),
    ("the secret plan of Bruno", "to cross the frozen lake at dawn with seven dogs and a brass telescope"),
    ("the last wish of Tamsin", "to hear the violin of her grandmother under the chestnut trees of Malta"),
    (
        "the hidden treasure of Leopold",
        "a blue porcelain elephant wrapped in the flag of a forgotten republic",
    ),
)
_PEOPLE = (
    ("Odile", "sailor", "Quito"),
    ("Bruno", "baker", "Malta"),
    ("Tamsin", "painter", "Oslo"),
    ("Leopold", "doctor", "Kyoto"),
)


@dataclass(frozen=True)
class Sample:
    """One question about a hidden fact.

    Attributes:
        prompt: [1, n] int64.
        span: first and last + 1 token of the part of the fact that counts.
        answer: the text that must be written.
    """

    prompt: Tensor
    span: tuple[int, int]
    answer: str


def profile_retrieval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reasoning: bool = False,
    lengths: Sequence[int] = (500, 1000, 2000),
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    progress: bool = False,
) -> HeadProfile:
    """The retrieval score of every query head, measured on facts hidden at several lengths and depths.

    Decoding is greedy, with the full cache. Only what the model answered well counts: ROUGE-1 recall over 0.5
    (retrieval), F1 of the words over 0.5 (retrieval-reasoning). A score is the mean over those samples.

    Args:
        model: a transformers decoder.
        tokenizer: its tokenizer.
        reasoning: measure "retrieval-reasoning" instead of "retrieval".
        lengths: of the context, in tokens.
        depths: where the fact is hidden, from 0 to 1; one sample for each length and depth.
        progress: show a progress bar.

    Raises:
        RuntimeError: the model answered no question well, so that its heads can not be scored.
    """
    make = reasoning_sample if reasoning else copy_sample
    grid = [(length, depth) for length in lengths for depth in depths]
    total, counted = torch.zeros(()), 0
    for index, (length, depth) in enumerate(track(grid, "Retrieval", progress)):
        sample = make(tokenizer, length, depth, index)
        scores, text = (_reason if reasoning else _copy)(model, tokenizer, sample)
        if (word_f1 if reasoning else word_recall)(sample.answer, text) > 0.5:
            total, counted = total + scores, counted + 1
    if not counted:
        raise RuntimeError(
            f"the model answered none of {len(grid)} questions, so its heads can not be scored"
        )
    kind = "retrieval-reasoning" if reasoning else "retrieval"
    parameters: dict[str, Any] = {"lengths": list(lengths), "depths": list(depths)}
    parameters |= {"samples": len(grid), "samples_counted": counted}
    name = class_or_name(model)
    return HeadProfile(name, kind, "query", total / counted, parameters)


def copy_sample(tokenizer: PreTrainedTokenizerBase, length: int, depth: float, seed: int) -> Sample:
    """One hidden sentence of which a dozen words have to be copied; the span is these words."""
    subject, answer = _COPIES[seed % len(_COPIES)]
    name = subject[0].upper() + subject[1:]
    fact = Fact(f"{name} is {answer}.", f"What is {subject}?", f"{name} is", answer)
    text = haystack(tokenizer, length, [fact], [depth], seed=seed)
    return Sample(text.prompt(), text.answer_spans[0], answer)


def reasoning_sample(tokenizer: PreTrainedTokenizerBase, length: int, depth: float, seed: int) -> Sample:
    """Two people's trades and secret cities, hidden, and asked for by the trade; the span is the city's sentence.

    The beginning of the answer names the person, a step that is beyond a small model. The city is left to it.
    """
    pairs = list(itertools.permutations(_PEOPLE, 2))
    pair = pairs[seed * 5 % len(pairs)]
    trades = [Fact(f"{name} is the {trade}.", "", "", trade) for name, trade, _ in pair]
    asked = pair[seed % 2][1]
    cities = [
        Fact(
            f"The secret city of {name} is {city}.",
            f"What is the secret city of the {asked}?",
            f"The {asked} is {name}, and the secret city of {name} is",
            city,
        )
        for name, _, city in pair
    ]
    text = haystack(tokenizer, length, trades + cities, [depth] * 4, seed=seed)
    right = 2 + seed % 2
    return Sample(text.prompt(right), text.spans[right], cities[seed % 2].answer)


def word_recall(wanted: str, text: str) -> float:
    """The share of the words of `wanted` that stand in `text` (ROUGE-1 recall).

    >>> word_recall("a warm almond cake", "The cake is warm.")
    0.5
    """
    words = _words(wanted)
    return (words & _words(text)).total() / words.total()


def word_f1(wanted: str, text: str) -> float:
    """The F1 of the words, as question answering is judged.

    >>> word_f1("Quito", "Quito, of course")
    0.5
    """
    words, found = _words(wanted), _words(text)
    common = (words & found).total()
    return 2 * common / (words.total() + found.total())


def _words(text: str) -> Counter[str]:
    return Counter("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def _copy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> tuple[Tensor, str]:
    """The copy scores [layers, HQ] and what the model wrote."""
    strongest: dict[int, Tensor] = {}

    def watch(attention: Attention) -> None:
        heads = range(attention.keys.shape[1])
        strongest[attention.layer_idx] = torch.cat(
            [attention.logits(head, LAST)[:, 0].argmax(-1) for head in heads]
        ).cpu()

    start, end = sample.span
    scores, written = torch.zeros(()), []
    with observe(model, watch):
        for token in _decode(model, sample.prompt, end - start):
            written.append(token)
            at = torch.stack([strongest[layer] for layer in sorted(strongest)])  # [layers, HQ]
            inside = (at >= start) & (at < end)
            same = sample.prompt[0][at.clamp_max(sample.prompt.shape[1] - 1)] == token
            scores = scores + (inside & same) / (end - start)
    return scores, str(tokenizer.decode(written, skip_special_tokens=True))


def _reason(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> tuple[Tensor, str]:
    """The sums of attention on the right fact [layers, HQ] and what the model wrote."""
    start, end = sample.span
    weights: dict[int, Tensor] = {}

    def watch(attention: Attention) -> None:
        shares = []
        for head in range(attention.keys.shape[1]):
            top = attention.weights(head, LAST)[:, 0].topk(end - start)  # [G, e - s]
            inside = (top.indices >= start) & (top.indices < end)
            shares.append((top.values * inside).sum(-1) / (end - start))
        weights[attention.layer_idx] = torch.cat(shares).cpu()

    scores, written = torch.zeros(()), []
    steps = len(tokenizer(" " + sample.answer, add_special_tokens=False)["input_ids"])
    with observe(model, watch):
        for token in _decode(model, sample.prompt, steps):
            if "\n" in tokenizer.decode([token]):
                break
            written.append(token)
            scores = scores + torch.stack([weights[layer] for layer in sorted(weights)])
    return scores, str(tokenizer.decode(written, skip_special_tokens=True))


@torch.inference_mode()
def _decode(model: PreTrainedModel, prompt: Tensor, steps: int) -> Iterator[int]:
    """Greedily decoded tokens before the model's end, each right after the forward pass that chose it."""
    prompt, ends = prompt.to(model.device), end_tokens(model)
    # The last token goes alone, so that every watched pass has the one query that chooses the next token.
    cache = model(prompt[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
    written = greedy(model, prompt[:, -1:], cache, steps)
    yield from itertools.takewhile(lambda token: token not in ends, written)
