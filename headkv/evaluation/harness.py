"""lm-evaluation-harness's RULER tasks as texts and questions: its documents, its prompts and its scores.

RULER: arXiv 2404.06654. Needs the extra `eval`. Tasks in `OFFLINE` need no network.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headkv import _checks
from headkv.data.chat import chat_frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
_ESSAYS = "essays from the Hugging Face hub and nltk's punkt_tab"
DOWNLOADS = {
    **dict.fromkeys(
        ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"), _ESSAYS
    ),
    "ruler_qa_squad": "SQuAD by HTTP",
    "ruler_qa_hotpot": "HotpotQA by HTTP",
}
TASKS = (*OFFLINE, *DOWNLOADS)
# Below these, lm-eval's loops never end, or their lists are empty.
LEAST = {"ruler_vt": 1000, "ruler_cwe": 1000}
MARKS = {"niah": "\nWhat ", "ruler_qa": "\nAnswer the question based on", "ruler": "\nQuestion: "}
INSTALL = "pip install 'headkv[eval]'"


@dataclass(frozen=True, eq=False)
class Sample:
    """One document of a task.

    Attributes:
        task: its name.
        length: tokens that the document was made for, its reply included.
        seed: of the documents; 0 makes those of lm-eval's own command.
        doc_id: number of the document.
        context: the text before the question, the head of the chat included.
        question: the question, to the beginning of the reply.
        expected: what the reply must contain.
        max_new_tokens: of the reply, as the task says.
        score: the task's own measure of a reply, from 0 to 1.
    """

    task: str
    length: int
    seed: int
    doc_id: int
    context: str
    question: str
    expected: tuple[str, ...]
    max_new_tokens: int
    score: Callable[[str], float]

    @property
    def depth(self) -> float | None:
        """Where the answer stands in the text, from 0 to 1; None where that is no one place."""
        if len(self.expected) != 1 or self.context.count(self.expected[0]) != 1:
            return None
        return self.context.index(self.expected[0]) / len(self.context)


def split(task: str, prompt: str) -> tuple[str, str]:
    """A prompt's text, and the question behind it: the cut is before the last line that begins as the task's question.

    Raises:
        ValueError: a task whose question is not known.
    """
    mark = next((mark for begin, mark in MARKS.items() if task.startswith(begin) and task in TASKS), None)
    if mark is None or mark not in prompt:
        raise ValueError(f"tasks must be of {', '.join(TASKS)} for a question to be cut off, got {task!r}")
    at = prompt.rindex(mark) + 1
    return prompt[:at], prompt[at:]


def check(task: str, length: int) -> None:
    """A task of RULER, and a length that it can be made for.

    Raises:
        TypeError, ValueError: it is not.
    """
    _checks.one_of("tasks", task, TASKS)
    _checks.whole("lengths", length, LEAST.get(task, 256))


def samples(
    tokenizer: PreTrainedTokenizerBase, task: str, length: int, *, seed: int = 0, limit: int = 8
) -> list[Sample]:
    """The first documents of a task.

    Each task, length and seed starts from its own random state, so that documents do not depend on what was made before
    them; the caller's is left as it was. A tokenizer with a chat template has its documents in a chat.

    Args:
        tokenizer: of the model; lm-eval loads it again from where it came from, and would run code that lies there.
        task: of `TASKS`.
        length: tokens of a document with its reply.
        seed: of the documents.
        limit: how many; lm-eval makes 500.

    Raises:
        ImportError: lm-eval, or what its RULER tasks need, is missing.
        RuntimeError: what the task downloads can not be had.
        ValueError: no such task, or too short a length.
    """
    check(task, length)
    _checks.whole("seed", seed)
    _checks.whole("limit", limit, 1, 500)
    made = _load(task, {"tokenizer": tokenizer.name_or_path, "max_seq_lengths": [length]}, seed)
    header, footer = chat_frame(tokenizer)
    found = []
    for doc_id, doc in enumerate(made.test_docs()):
        if doc_id == limit:
            break
        # What lm-eval's own prompt is made of; with a chat, the reply begins as the document says.
        context, question = split(task, made.doc_to_text(doc))
        space = "" if tokenizer.chat_template else made.config.target_delimiter
        found.append(
            Sample(
                task,
                length,
                seed,
                doc_id,
                header + context,
                question + (footer if tokenizer.chat_template else space) + made.doc_to_prefix(doc),
                tuple(doc["outputs"]),
                made.config.generation_kwargs["max_gen_toks"],
                _Score(made, doc),
            )
        )
    return found


@dataclass(frozen=True, eq=False)
class _Score:
    task: Any
    doc: dict[str, Any]

    def __call__(self, reply: str) -> float:
        return float(self.task.process_results(self.doc, [reply])[str(self.doc["max_length"])])


def _load(task: str, metadata: dict[str, Any], seed: int) -> Any:
    try:
        import numpy as np

        with _without_sentences(task in OFFLINE):
            import lm_eval.tasks.ruler.prepare_niah  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            f"RULER's tasks need lm-eval and what it needs for them: {INSTALL} ({error})"
        ) from error
    folder = Path(lm_eval.tasks.ruler.prepare_niah.__file__).parent
    before = random.getstate(), np.random.get_state()
    try:
        # As lm-eval's own command seeds them, for seed 0.
        random.seed(seed)
        np.random.seed(1234 + seed)
        with _quiet():
            manager = TaskManager(include_path=folder, include_defaults=False, metadata=metadata)
            return manager.load([task])["tasks"][task]
    except Exception as error:  # whatever a download raises: there are as many kinds as libraries
        if task not in DOWNLOADS:
            raise
        raise RuntimeError(
            f"{task} needs {DOWNLOADS[task]}, which could not be had: {str(error).splitlines()[0]}. "
            f"These tasks need no network: {', '.join(OFFLINE)}"
        ) from error
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


@contextlib.contextmanager
def _without_sentences(wanted: bool) -> Iterator[None]:
    """Importing lm-eval's needles fetches nltk's sentence splitter, but on the first process of a machine alone.

    Tasks without essays never split a sentence, and must not wait for a network that is not there.
    """
    former = os.environ.get("LOCAL_RANK")
    if wanted:
        os.environ["LOCAL_RANK"] = "1"
    try:
        yield
    finally:
        if wanted:
            del os.environ["LOCAL_RANK"]
            if former is not None:
                os.environ["LOCAL_RANK"] = former


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval prints while it makes documents, hundreds of lines for some tasks."""
    former = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(former)
