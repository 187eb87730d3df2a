"""Rows of a sweep: one method on one question, with all that is needed to repeat it; kept as parquet.

Parquet files can not grow, so that a running sweep notes its rows in a journal beside the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from headkv._files import replacing
from headkv.heads.journal import whole_lines

PARTIAL = ".partial"  # added to a file's name: the journal beside it
MEASURES = ("log_probability", "divergence")
INSTALL = "pip install 'headkv[eval]'"


@dataclass(frozen=True)
class SweepRow:
    """One method on one question.

    Attributes:
        model: its name, as the sweep was told.
        device, versions: what it ran on; versions as "name version" with commas.
        method: its name in `headkv.evaluation.roster`; "FullCache" is the one that the others are compared with.
        parameters: of the method, as it prints.
        budget: as it was asked for; a share, or entries a KV head.
        question: "seen", "unseen" or "second", see `headkv.evaluation.asking`.
        task, length, seed, doc_id: which document, see `headkv.evaluation.harness.Sample`.
        depth: where the answer stands in the text, from 0 to 1; None where that is no one place.
        tokens: of the prompt that was compressed.
        stored_share: stored entries over those tokens, without head room.
        nbytes: of the compressed cache, as the allocator has them, with head room and bookkeeping.
        full_nbytes: the same of the full cache.
        max_new_tokens: of the reply.
        reply: what the model wrote.
        expected: what the reply must contain.
        score: the task's own.
        log_probability: of the expected answers, joined by commas, the sum over their tokens.
        answer_tokens: how many these are.
        divergence: of the next-token distribution from the full cache's, the mean over these tokens.
    """

    model: str
    device: str
    versions: str
    method: str
    parameters: str
    budget: float
    question: str
    task: str
    length: int
    seed: int
    doc_id: int
    depth: float | None
    tokens: int
    stored_share: float
    nbytes: int
    full_nbytes: int
    max_new_tokens: int
    reply: str
    expected: tuple[str, ...]
    score: float
    log_probability: float
    answer_tokens: int
    divergence: float

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes a row the same as another one."""
        return (
            *(self.model, self.method, self.budget, self.question),
            *(self.task, self.length, self.seed, self.doc_id),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "expected": list(self.expected)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SweepRow:
        """What `to_json` wrote.

        Raises:
            ValueError: other names than a row has.
        """
        names = cls.__dataclass_fields__.keys()
        if values.keys() != names:
            odd = ", ".join(sorted(names ^ values.keys()))
            raise ValueError(f"rows must have the columns of a sweep, got others: {odd}")
        return cls(**{**values, "expected": tuple(values["expected"])})


def write_rows(path: str | os.PathLike[str], rows: Sequence[SweepRow]) -> None:
    """Write rows as one parquet file, whole or not at all.

    Raises:
        ImportError: there is no pyarrow.
    """
    arrow, parquet = _arrow()
    table = arrow.Table.from_pylist([row.to_json() for row in rows])
    # Measures differ from row to row; all else repeats.
    few = [f"{x.name}.list.element" if x.name == "expected" else x.name for x in table.schema]
    options = {
        "use_dictionary": [name for name in few if name not in MEASURES],
        "use_byte_stream_split": list(MEASURES),
        "compression_level": 12,
    }
    with replacing(path) as partial:
        parquet.write_table(table, partial, compression="zstd", **options)


def read_rows(*paths: str | os.PathLike[str], **only: Any) -> list[SweepRow]:
    """The rows of several files; a row that stands in more than one of them counts once.

    >>> read_rows("rows.parquet", question="unseen", budget=0.1)  # doctest: +SKIP

    Args:
        *paths: parquet files, or journals of sweeps that are not at their end.
        **only: attributes of `SweepRow` and what they must be; others are not even read.

    Raises:
        ImportError: there is no pyarrow.
        OSError, ValueError: a file is not there, or holds no rows of a sweep; rows have no such attribute.
    """
    arrow, parquet = _arrow()
    known = [x.name for x in fields(SweepRow)]
    if unknown := sorted(set(only) - set(known)):
        raise ValueError(f"only must name attributes of SweepRow ({', '.join(known)}), got {unknown}")
    filters = [(name, "=", value) for name, value in only.items()] or None
    found: dict[tuple[Any, ...], SweepRow] = {}
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"FILE must be what headkv eval wrote, got {path}, which is not there")
        try:
            journal = Path(path).suffix == PARTIAL
            if journal:
                plain = [row for row in noted(path) if all(row[name] == only[name] for name in only)]
            else:
                plain = parquet.read_table(path, filters=filters).to_pylist()
            rows = [SweepRow.from_json(values) for values in plain]
        except (arrow.ArrowInvalid, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"FILE must be what headkv eval wrote, got {path}: {error}") from error
        for row in rows:
            found.setdefault(row.key, row)
    return list(found.values())


def noted(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows in the journal of a sweep, as plain values; a line that is still being written is left out."""
    return [row for line in whole_lines(Path(path))[1:] for row in json.loads(line)["rows"]]


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"rows are kept as parquet, by pyarrow: {INSTALL}") from error
    return pyarrow, pyarrow.parquet
