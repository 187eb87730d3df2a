"""Methods side by side on several texts: what each stores, how fast it decodes, and whether it still answers.

A text is read once, and that one reading is compressed by every method. Each question is asked in both ways that a user
meets: as the end of the prompt that is compressed (seen), and after the text was compressed without it (unseen).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headkv.evaluation.reading import Reading
from headkv.evaluation.roster import by_name
from headkv.heads import HeadProfile
from headkv.integrations.hook import NAME
from headkv.methods import FullCache, KVzip
from headkv.methods.selection import check_budget
from headkv.models.attention import chosen_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headkv.data.needles import Needle, NeedleText
    from headkv.evaluation.remembered import Remembered
    from headkv.methods.base import Method, PromptMethod

FULL = "full cache"
STEPS = 24  # decode steps that are timed, of each method

Sized = Callable[[int], "Method | PromptMethod"]


@dataclass(frozen=True)
class Entry:
    """One method of a comparison.

    Attributes:
        heads: "uniform" (all heads of a layer keep as much) or "head-specific".
        make: the method, for a text of so many tokens.
        looks: whether it chooses by the end of the prompt, so that a question that it has seen can change its choice.
    """

    heads: str
    make: Sized
    looks: bool = True


@dataclass(frozen=True)
class Result:
    """One method on all texts.

    Attributes:
        name: of the method.
        heads: "uniform" or "head-specific".
        stored_share: stored entries over tokens, right after the prefill, without head room; mean over the texts.
        nbytes: of the first text's cache, head room and bookkeeping included.
        decode_ms: median of a decode step over the first text, methods in turns.
        seen: for each question, whether it is answered right when it was part of the compressed prompt.
        unseen: the same where the text was compressed before the question was known.
        lengths: stored entries of the first text `[layers][KV heads]`.
    """

    name: str
    heads: str
    stored_share: float
    nbytes: int
    decode_ms: float
    seen: tuple[bool, ...]
    unseen: tuple[bool, ...]
    lengths: tuple[tuple[int, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, with what was right and its interval."""
        shares = {
            way: {"right": sum(found), "of": len(found), "interval": interval(sum(found), len(found))}
            for way, found in (("seen", self.seen), ("unseen", self.unseen))
        }
        return {**asdict(self), **shares}


def interval(right: int, asked: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share: what it may be when `right` of `asked` were right.

    >>> [round(end, 2) for end in interval(8, 10)]
    [0.49, 0.94]
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, extra = right / asked, z * z / asked
    half = z * (share * (1 - share) / asked + extra / asked / 4) ** 0.5
    middle = share + extra / 2
    return max(0.0, (middle - half) / (1 + extra)), min(1.0, (middle + half) / (1 + extra))


def smollm2_methods(share: float, again: Remembered, *, tuned: bool = False) -> dict[str, Entry]:
    """The methods of the demo, sized so that SmolLM2 stores about `share` of any prompt.

    Args:
        share: of the entries.
        again: what `reader` gives: handed to several calls, it reads a text once for all of them.
        tuned: of the tuned model.
    """

    def profile(kind: str) -> HeadProfile:
        return HeadProfile.builtin(f"smollm2-{'tuned-' if tuned else ''}{kind}")

    check_budget(share)

    def sized(name: str) -> Sized:
        make = by_name(name, profile, again, num_kv_heads=3)
        return lambda n: make(share, n)

    ablation = profile("ablation")
    uniform, specific = "uniform", "head-specific"
    return {
        "StreamingLLM": Entry(uniform, sized("StreamingLLM"), looks=False),
        "SnapKV": Entry(uniform, sized("SnapKV")),
        "KVzip's scores, uniform": Entry(uniform, sized("KVzip-uniform"), looks=False),
        "RandomHeads": Entry(specific, sized("RandomHeads"), looks=False),
        "AdaKV": Entry(specific, sized("AdaKV")),
        "RazorAttention": Entry(specific, sized("RazorAttention"), looks=False),
        "DuoAttention": Entry(specific, sized("DuoAttention"), looks=False),
        "HeadKV": Entry(specific, sized("HeadKV")),
        "KVzip": Entry(specific, sized("KVzip"), looks=False),
        "KVzip, ablation": Entry(specific, lambda n: KVzip(share, again, 0.6, profile=ablation), looks=False),
    }


def compare(
    model: PreTrainedModel,
    texts: Sequence[NeedleText],
    entries: Mapping[str, Entry],
    *,
    on_step: Callable[[str], None] = lambda what: None,
) -> Iterator[Result]:
    """Ask every method, and the full cache first, all questions about all texts.

    An answer is right if every token of it is the most likely one; question and answer pass the model at once.

    Args:
        model: a decoder.
        texts: with their questions.
        entries: by name.
        on_step: told of each part before it begins; there are `steps(texts, entries)`.

    Yields:
        One `Result` a method, as soon as it is there.
    """
    texts, unseen, seen = [text.to(model.device) for text in texts], [], []
    for number, text in enumerate(texts, 1):
        on_step(f"reading text {number} of {len(texts)}")
        # A reading holds the last token back: of the text all is read, and a first token that stands for a question's.
        first = text.needles[0].question_ids[:, :1]
        reading = Reading(model, torch.cat([text.context_ids, first], 1))
        unseen.append(reading)
        seen.append([reading.followed_by(needle.question_ids[:, 1:]) for needle in text.needles])
    every = {FULL: Entry("full", lambda n: FullCache(), looks=False), **entries}
    on_step("timing decode steps")
    n = unseen[0].cache.seen
    times = step_times(unseen[0], {name: entry.make(n) for name, entry in every.items()})
    for name, entry in every.items():
        on_step(name)
        yield _result(name, entry, texts, unseen, seen, times[name])


def steps(texts: Sequence[NeedleText], entries: Mapping[str, Entry]) -> int:
    """How often `compare` calls its `on_step`."""
    return len(texts) + len(entries) + 2


@torch.inference_mode()
def _result(
    name: str,
    entry: Entry,
    texts: Sequence[NeedleText],
    unseen: Sequence[Reading],
    seen: Sequence[Sequence[Reading]],
    decode_ms: float,
) -> Result:
    shares, right_unseen, right_seen = [], [], []
    nbytes, lengths = 0, torch.empty(0)
    for text, reading, longer in zip(texts, unseen, seen, strict=True):
        method, n = entry.make(text.context_ids.shape[1]), text.context_ids.shape[1]
        cache = reading.compressed(method)
        shares.append(float(cache.lengths().double().mean()) / n)
        if reading is unseen[0]:
            nbytes, lengths = cache.nbytes, cache.lengths()[:, 0]
        saved = cache.snapshot()
        for needle, prompt in zip(text.needles, longer, strict=True):
            cache.restore(saved)
            right_unseen.append(_is_right(reading, cache, needle.question_ids, needle))
            if not entry.looks:  # its choice is the same
                right_seen.append(right_unseen[-1])
                continue
            chosen = prompt.compressed(entry.make(n + needle.question_ids.shape[1] - 1))
            right_seen.append(_is_right(prompt, chosen, prompt.last, needle))
    found = tuple(right_seen), tuple(right_unseen)
    rows = tuple(map(tuple, lengths.tolist()))
    return Result(name, entry.heads, sum(shares) / len(shares), nbytes, decode_ms, *found, rows)


def _is_right(reading: Reading, cache: Any, tokens: Tensor, needle: Needle) -> bool:
    """Whether the answer follows `tokens` `[1, m]`, token by token the most likely one."""
    answer = needle.answer_ids
    with chosen_attention(reading.model, NAME):
        asked = torch.cat([tokens, answer[:, :-1]], 1)
        logits = reading.model(asked, past_key_values=cache, logits_to_keep=answer.shape[1]).logits
    return bool((logits.argmax(-1) == answer).all())


@torch.inference_mode()
def step_times(
    reading: Reading, methods: Mapping[str, Method | PromptMethod], steps: int = STEPS
) -> dict[str, float]:
    """Milliseconds of a decode step over one text, methods in turns: what else the machine does slows all alike.

    Args:
        reading: of the text.
        methods: by name.
        steps: how many are timed of each; a cache grows by one entry a head with each.

    Returns:
        The median of each method.
    """
    caches = {name: reading.compressed(method) for name, method in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in methods}
    with chosen_attention(reading.model, NAME):
        for _ in range(steps):
            for name, cache in caches.items():
                begin = time.perf_counter()
                reading.model(reading.last, past_key_values=cache)
                times[name].append(1000 * (time.perf_counter() - begin))
    return {name: median(some) for name, some in times.items()}
