"""Methods x budgets x lengths x tasks x seeds x ways to ask: one reading a document, a journal that survives a kill."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headkv import _checks
from headkv._version import find_version
from headkv.evaluation.asking import WAYS, ask
from headkv.evaluation.documents import Source
from headkv.evaluation.harness import Sample
from headkv.evaluation.roster import BY_SHARE, Sized, roster, share_of, sized
from headkv.evaluation.rows import PARTIAL, SweepRow, write_rows
from headkv.heads.journal import Journal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FULL = "FullCache"
Answers = Callable[[Iterator[Sample]], Iterable[list[SweepRow]]]


@dataclass(frozen=True)
class Sweep:
    """What is asked.

    Attributes:
        model: its name, for the rows.
        methods: names of `headkv.evaluation.roster`; the full cache is always there.
        budgets: shares (floats) or entries a KV head (ints).
        tasks: of `headkv.evaluation.documents.TASKS`.
        lengths: of the documents, in tokens.
        seeds: of the documents.
        questions: ways to ask, of `headkv.evaluation.asking.WAYS`.
        limit: documents of each task, length and seed.
        first: the number of the first of them, so that several runs share a sweep.
        max_new_tokens: of each reply, at most; None: as the task says.

    Raises:
        TypeError, ValueError: nothing is asked, or something twice, or a budget or a way that there is not.
    """

    model: str
    methods: tuple[str, ...]
    budgets: tuple[int | float, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    seeds: tuple[int, ...] = (0,)
    questions: tuple[str, ...] = ("seen", "unseen")
    limit: int = 8
    first: int = 0
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("methods", "budgets", "tasks", "lengths", "seeds", "questions"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise ValueError(f"{name} must be one or more, each once, got {given}")
        for budget in self.budgets:
            share_of(budget, 1)
        for way in self.questions:
            _checks.one_of("question", way, WAYS)
        _checks.whole("limit", self.limit, 1)
        _checks.whole("first", self.first)
        if self.max_new_tokens is not None:
            _checks.whole("max_new_tokens", self.max_new_tokens, 1)

    @property
    def groups(self) -> list[tuple[str, int, int]]:
        """Task, length and seed of the documents that are made together."""
        return [(task, n, seed) for task in self.tasks for n in self.lengths for seed in self.seeds]

    @property
    def doc_ids(self) -> range:
        """Which of them are asked about."""
        return range(self.first, self.first + self.limit)


def run_sweep(
    sweep: Sweep,
    answers: Answers,
    documents: Source,
    out: str | os.PathLike[str],
    *,
    progress: bool = False,
    on_document: Callable[[int], None] = lambda done: None,
) -> list[SweepRow]:
    """Ask all of it, and write the rows to `out` as parquet.

    Until then they are in a journal beside it (".partial" added to the name), a line a document. A run that was killed
    goes on from there; what it was at is asked again.

    Args:
        sweep: what is asked.
        answers: from documents to the rows of each, in any order: `partial(map, Asker(sweep, model, tokenizer))` in
            this process, `headkv.evaluation.distributed.workers` in others.
        documents: makes those of a task, length and seed, as many as the fourth argument says.
        out: a new file, or that of a run that was killed.
        progress: show a progress bar, with the time left, on the standard error stream.
        on_document: told after each document how many are done.

    Returns:
        The rows, in the order of the sweep.

    Raises:
        ImportError: there is no pyarrow.
        ValueError: `out` exists, or the journal is of another sweep.
    """
    from tqdm import tqdm

    out = Path(out)
    beside = out.with_name(out.name + PARTIAL)
    if out.exists() and not beside.exists():
        raise ValueError(f"out must be a new file, got {out}, which exists")
    journal = Journal(beside, _plain(sweep))
    rows = [SweepRow.from_json(row) for piece in journal.pieces for row in piece["rows"]]
    done = {row.key[4:] for row in rows}
    with tqdm(total=len(sweep.groups) * sweep.limit, initial=len(done), disable=not progress) as bar:
        for made in answers(_left(sweep, documents, done)):
            bar.set_description(f"{made[0].task}, {made[0].length}")
            journal.add({"rows": [row.to_json() for row in made]})
            rows += made
            bar.update()
            on_document(len(journal.pieces))
    order = {group: number for number, group in enumerate(sweep.groups)}
    rows.sort(key=lambda row: (order[row.task, row.length, row.seed], row.doc_id))
    write_rows(out, rows)
    beside.unlink()
    return rows


def _left(sweep: Sweep, documents: Source, done: set[tuple[Any, ...]]) -> Iterator[Sample]:
    """The documents that are not done; groups of which all are done are not even made."""
    for task, length, seed in sweep.groups:
        if {(task, length, seed, doc) for doc in sweep.doc_ids} <= done:
            continue
        for sample in documents(task, length, seed, sweep.doc_ids.stop)[sweep.first :]:
            if (task, length, seed, sample.doc_id) not in done:
                yield sample


class Asker:
    """What answers documents: a model, and the methods of a sweep.

    Args:
        sweep: what is asked.
        model, tokenizer: of one decoder.

    Raises:
        ValueError: a method that is not there, or that this model has no head profile for.
    """

    def __init__(self, sweep: Sweep, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        make = roster(
            [name for name in sweep.methods if name.casefold() != FULL.casefold()], model, tokenizer
        )
        self._methods: list[tuple[str, int | float, Sized]] = [(FULL, 1.0, BY_SHARE[FULL])]
        self._methods += [(name, budget, make[name]) for name in make for budget in sweep.budgets]
        self._sweep, self._model, self._tokenizer, self._about = sweep, model, tokenizer, where(model)

    def __call__(self, sample: Sample) -> list[SweepRow]:
        """The rows of one document: the ways to ask, of each all methods."""
        most = min(sample.max_new_tokens, self._sweep.max_new_tokens or sample.max_new_tokens)
        found = ask(
            *(self._model, self._tokenizer, sample.context, sample.question),
            {f"{name} {budget!r}": sized(make, budget) for name, budget, make in self._methods},
            self._sweep.questions,
            expected=" " + ", ".join(sample.expected),
            max_new_tokens=most,
        )
        return [
            SweepRow(
                model=self._sweep.model,
                **self._about,
                method=name,
                parameters=reply.method,
                budget=float(budget),
                question=way,
                task=sample.task,
                length=sample.length,
                seed=sample.seed,
                doc_id=sample.doc_id,
                depth=sample.depth,
                tokens=reply.tokens,
                stored_share=reply.stored_share,
                nbytes=reply.nbytes,
                full_nbytes=replies[0].nbytes,
                max_new_tokens=most,
                reply=reply.text,
                expected=sample.expected,
                score=sample.score(reply.text),
                log_probability=reply.log_probability,
                answer_tokens=reply.answer_tokens,
                divergence=reply.divergence,
            )
            for way, replies in found
            for (name, budget, _), reply in zip(self._methods, replies, strict=True)
        ]


def where(model: PreTrainedModel) -> dict[str, str]:
    """What a model runs on: the device, and the versions that matter."""
    chip = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)
    found = {"headkv": find_version(Path(__file__).resolve().parents[1])}
    for name in ("lm_eval", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "-"
    return {"device": chip, "versions": ", ".join(f"{name} {what}" for name, what in found.items())}


def _plain(sweep: Sweep) -> dict[str, Any]:
    """As a journal has it: JSON knows no tuples."""
    return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(sweep).items()}
