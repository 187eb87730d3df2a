"""Documents that the full cache answers right, and how likely other caches make that answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import headkv
from headkv.evaluation.documents import read_documents
from headkv.evaluation.reading import Reading
from headkv.evaluation.unseen import side_by_side
from headkv.integrations.hook import NAME
from headkv.models.attention import chosen_attention

MOST = 28  # tokens of an answer


@dataclass(frozen=True, eq=False)
class Document:
    """A document that the full cache answers right.

    Attributes:
        task: its name.
        unseen, seen: a reading of the text, and one of text and question.
        text, question, answer: `[1, n]`, `[1, m]`, `[1, a]` int64; the answer is the full cache's.
    """

    task: str
    unseen: Reading
    seen: Reading
    text: Tensor
    question: Tensor
    answer: Tensor

    def way(self, name: str) -> tuple[Reading, Tensor]:
        """The reading of what is compressed where the question is "seen" or "unseen", and what is fed after it."""
        return (self.seen, self.seen.last) if name == "seen" else (self.unseen, self.question)

    def compressed(self, name: str) -> Tensor:
        """The tokens that are compressed."""
        return torch.cat([self.text, self.question[:, :-1]], 1) if name == "seen" else self.text


def read(model: Any, tokenizer: Any, sample: Any) -> Document | None:
    """Read a document, and have the full cache answer; None where it does not answer right."""

    def ids(text: str) -> Tensor:
        return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], device=model.device)

    text, question = ids(sample.context), ids(sample.question)
    unseen = Reading(model, torch.cat([text, question[:, :1]], 1))
    seen = unseen.followed_by(question[:, 1:])
    answer = seen.answer(headkv.FullCache(), min(MOST, sample.max_new_tokens))[None].to(text.device)
    ends = (answer[0] == tokenizer.eos_token_id).nonzero()
    answer = answer[:, : int(ends[0])] if len(ends) else answer
    if answer.shape[1] == 0 or sample.score(str(tokenizer.decode(answer[0]))) < 1:
        return None
    return Document(sample.task, unseen, seen, text, question, answer)


def documents(
    model: Any, tokenizer: Any, path: Path, tasks: Sequence[str], length: int, count: int
) -> Iterator[Document]:
    """The first `count` documents of each task, in turn, of those that the full cache answers right."""
    give = read_documents(path, tokenizer)
    for some in zip(*(give(task, length, 0, count) for task in tasks), strict=True):
        for sample in some:
            if (document := read(model, tokenizer, sample)) is not None:
                yield document


@torch.inference_mode()
def judged(
    reading: Reading, tokens: Tensor, answer: Tensor, methods: Mapping[str, Any]
) -> list[tuple[bool, float]]:
    """For each method whether every token of `answer` `[1, a]` is its first choice, and the nats a token.

    Args:
        reading: of what is compressed.
        tokens: `[1, m]`, what follows it, before the answer.
        answer: what should come.
        methods: by name.
    """
    cache = side_by_side(reading, list(methods.values())).cache
    fed = torch.cat([tokens, answer[:, :-1]], 1).expand(len(methods), -1)
    with chosen_attention(reading.model, NAME):
        logits = reading.model(fed, past_key_values=cache, logits_to_keep=answer.shape[1]).logits
    logs = logits.float().log_softmax(-1)
    right = (logs.argmax(-1) == answer).all(1).tolist()
    nats = logs.gather(-1, answer.expand(len(methods), -1)[..., None])[..., 0].mean(1).tolist()
    return list(zip(right, nats, strict=True))
