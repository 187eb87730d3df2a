"""Documents of a sweep: where they come from, and a file of them for machines that can not make them.

lm-evaluation-harness's come from `headkv.evaluation.harness`, headkv's own needles from here. A file is JSON lines,
gzipped where its name ends in .gz: what it is, then a document a line.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headkv import _checks
from headkv._files import replacing
from headkv.data.answers import share_found
from headkv.data.chat import chat_frame
from headkv.data.needles import NEEDLE_KINDS, needle_texts
from headkv.evaluation import harness
from headkv.evaluation.harness import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Source = Callable[[str, int, int, int], Sequence[Sample]]

NEEDLES = tuple(f"needle_{kind}" for kind in NEEDLE_KINDS)
TASKS = (*harness.TASKS, *NEEDLES)
BESIDE = 3  # other facts of the same kind in a text, so that the question is not known from the text
FORMAT = "headkv documents 1"
_NAMES = tuple(field.name for field in fields(Sample) if field.name != "score")


@dataclass(frozen=True)
class Found:
    """The share of the expected strings that stand in a reply, in any case: RULER's measure, arXiv 2404.06654."""

    expected: tuple[str, ...]

    def __call__(self, reply: str) -> float:
        return share_found(self.expected, reply)


def check(task: str, length: int) -> None:
    """A task, and a length that it can be made for.

    Raises:
        TypeError, ValueError: it is not.
    """
    _checks.one_of("tasks", task, TASKS)
    if task in harness.TASKS:
        harness.check(task, length)
    else:
        _checks.whole("lengths", length, 256)


def maker(tokenizer: PreTrainedTokenizerBase) -> Source:
    """Makes the first documents of a task, given its name, the length, the seed and how many."""

    def make(task: str, length: int, seed: int, limit: int) -> Sequence[Sample]:
        if task in NEEDLES:
            return needles(tokenizer, task, length, seed=seed, limit=limit)
        return harness.samples(tokenizer, task, length, seed=seed, limit=limit)

    return make


def needles(
    tokenizer: PreTrainedTokenizerBase, task: str, length: int, *, seed: int = 0, limit: int = 8
) -> list[Sample]:
    """The first documents of one of `NEEDLES`: a fact in prose beside others of its kind, of the validation part.

    Raises:
        TypeError, ValueError: no such task, or a number that is not as it must be.
    """
    _checks.one_of("tasks", task, NEEDLES)
    check(task, length)
    _checks.whole("seed", seed)
    _checks.whole("limit", limit, 1, 500)
    kind = task.removeprefix("needle_")
    each = BESIDE + 1 if kind != "hops" else 1  # a second person is in any text with two hops
    texts = needle_texts(
        tokenizer, texts=limit, lengths=[length], kinds=[kind], each=each, seed=seed, split="validation"
    )
    made = []
    for doc_id, text in enumerate(texts):
        needle = text.needles[doc_id % len(text.needles)]
        parts = (text.context_ids, needle.question_ids, needle.answer_ids)
        context, question, answer = (str(tokenizer.decode(ids[0])) for ids in parts)
        expected, most = (answer.strip(),), needle.answer_ids.shape[1] + 8
        made.append(Sample(task, length, seed, doc_id, context, question, expected, most, Found(expected)))
    return made


def write_documents(path: str | os.PathLike[str], samples: Iterable[Sample], chat: tuple[str, str]) -> int:
    """Write documents to one file, whole or not at all.

    Args:
        path: of the file.
        samples: the documents.
        chat: what `chat_frame` of their tokenizer says: documents fit models of the same frame.

    Returns:
        How many they were.
    """
    written = 0
    with replacing(path) as partial:
        opened = gzip.open if str(path).endswith(".gz") else open
        with opened(partial, "wt", encoding="utf-8") as file:
            file.write(json.dumps({"format": FORMAT, "chat": list(chat)}) + "\n")
            for sample in samples:
                file.write(json.dumps({name: getattr(sample, name) for name in _NAMES}) + "\n")
                written += 1
    return written


def read_documents(path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase) -> Source:
    """What `write_documents` wrote, scored by `Found`.

    Raises:
        OSError: there is no such file.
        ValueError: it is another file, is cut off, or was made for another chat template. The returned function raises
            it where fewer documents of a task, length and seed are in the file than are asked for.
    """
    path, found = Path(path), dict[tuple[str, int, int], list[Sample]]()
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            head = json.loads(next(file, ""))
            lines = [json.loads(line) for line in file]
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"documents must be what headkv documents wrote, got {path}: {error}") from error
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise ValueError(f"documents must be a file of {FORMAT!r}, got {path}")
    if head["chat"] != list(chat_frame(tokenizer)):
        raise ValueError(
            f"documents must be made for the model's chat template, got {path}, made for another"
        )
    for line in lines:
        if not isinstance(line, dict) or set(line) != set(_NAMES):
            raise ValueError(f"documents must have {', '.join(_NAMES)}, got {path} with other lines")
        expected = tuple(line["expected"])
        sample = Sample(**{**line, "expected": expected}, score=Found(expected))
        found.setdefault((sample.task, sample.length, sample.seed), []).append(sample)

    def give(task: str, length: int, seed: int, limit: int) -> Sequence[Sample]:
        there: list[Any] = found.get((task, length, seed), [])
        if len(there) < limit:
            raise ValueError(
                f"documents must hold {limit} of {task}, length {length}, seed {seed}; {path} has {len(there)}"
            )
        return there[:limit]

    return give
