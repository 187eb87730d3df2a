"""What a sweep found: quality against bytes, with intervals, as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headkv import _checks
from headkv._table import table
from headkv.evaluation.rows import SweepRow

DEPTHS = 4  # parts of a text
SPLITS: dict[str, Callable[[SweepRow], Any]] = {
    "task": lambda row: row.task,
    "length": lambda row: row.length,
    "depth": lambda row: None if row.depth is None else min(int(row.depth * DEPTHS), DEPTHS - 1),
    "seed": lambda row: row.seed,
}
WORDS = ("method", "budget")


@dataclass(frozen=True)
class Cell:
    """One method at one budget, over all documents.

    Attributes:
        method, budget: as in the rows.
        nbytes: mean of the caches.
        full_nbytes: mean of the full caches.
        stored_share: mean.
        score: mean over the parts of their means, so that a part with more documents does not count more.
        interval: of it, 95%, by the bootstrap: documents are drawn anew within each part.
        log_probability: of the expected answer, a token; mean.
        divergence: from the full cache, a token; mean.
        parts: the mean score of each part.
        documents: how many.
    """

    method: str
    budget: float
    nbytes: float
    full_nbytes: float
    stored_share: float
    score: float
    interval: tuple[float, float]
    log_probability: float
    divergence: float
    parts: dict[str, float]
    documents: int


def bootstrap(
    parts: Sequence[Sequence[float]], *, draws: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """The interval of the mean of the parts' means, by drawing within each part anew; the same one each time.

    >>> bootstrap([[1, 1, 1], [0, 0]])
    (0.5, 0.5)
    """
    random = torch.Generator().manual_seed(0)
    means = torch.zeros(draws, dtype=torch.float64)
    for values in parts:
        drawn = torch.randint(len(values), (draws, len(values)), generator=random)
        means += torch.tensor(values, dtype=torch.float64)[drawn].mean(1) / len(parts)
    ends = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def cells(rows: Iterable[SweepRow], by: str = "task") -> list[Cell]:
    """The cells of rows of one model and one way to ask, the greatest caches first.

    Args:
        rows: where `by` is "depth", those without one are left out.
        by: what the parts are: "task", "length", "depth" or "seed".

    Raises:
        ValueError: no such parts.
    """
    part_of = SPLITS[_checks.one_of("by", by, tuple(SPLITS))]
    groups: dict[tuple[str, float], dict[Any, list[SweepRow]]] = {}
    for row in rows:
        if (part := part_of(row)) is not None:
            groups.setdefault((row.method, row.budget), {}).setdefault(part, []).append(row)
    made = [_cell(*key, parts, by) for key, parts in groups.items()]
    return sorted(made, key=lambda cell: -cell.nbytes)


def _cell(method: str, budget: float, parts: dict[Any, list[SweepRow]], by: str) -> Cell:
    def mean(value: Callable[[SweepRow], float]) -> float:
        return sum(sum(map(value, some)) / len(some) for some in parts.values()) / len(parts)

    ordered = {part: parts[part] for part in sorted(parts)} if by != "task" else parts
    return Cell(
        method,
        budget,
        mean(lambda row: row.nbytes),
        mean(lambda row: row.full_nbytes),
        mean(lambda row: row.stored_share),
        mean(lambda row: row.score),
        bootstrap([[row.score for row in some] for some in parts.values()]),
        mean(lambda row: row.log_probability / row.answer_tokens),
        mean(lambda row: row.divergence),
        {_name(by, part): sum(row.score for row in some) / len(some) for part, some in ordered.items()},
        sum(map(len, parts.values())),
    )


def _name(by: str, part: Any) -> str:
    if by == "depth":
        return f"{part / DEPTHS:.0%} to {(part + 1) / DEPTHS:.0%}"
    return {"length": f"{part} tokens", "seed": f"seed {part}"}.get(by, str(part))


def sections(rows: Sequence[SweepRow], by: str = "task") -> list[tuple[str, list[dict[str, str]]]]:
    """A heading and a table for each model and way to ask; every heading says how the question was asked.

    Raises:
        ValueError: there are no rows, or none with such parts.
    """
    found = []
    for model, question in dict.fromkeys((row.model, row.question) for row in rows):
        here = [row for row in rows if (row.model, row.question) == (model, question)]
        made = cells(here, by)
        if not made:
            continue
        lengths = ", ".join(map(str, sorted({row.length for row in here})))
        title = f"{model}, question {question}, {lengths} tokens, {made[0].documents} documents a row"
        found.append((title, [_line(cell) for cell in made]))
    if not found:
        raise ValueError(f"rows must have at least one with a {by}, got {len(rows)} without")
    return found


def _line(cell: Cell) -> dict[str, str]:
    low, high = cell.interval
    return {
        "method": cell.method,
        "budget": f"{cell.budget:g}",
        "MB": f"{cell.nbytes / 1e6:.2f}",
        "of full": f"{cell.nbytes / cell.full_nbytes:.1%}",
        "entries": f"{cell.stored_share:.1%}",
        **{part: f"{score:.2f}" for part, score in cell.parts.items()},
        "mean": f"{cell.score:.2f}",
        "95%": f"{low:.2f} to {high:.2f}",
        "log p": f"{cell.log_probability:.2f}",
        "KL": f"{cell.divergence:.3f}",
    }


def as_text(rows: Sequence[SweepRow], by: str = "task") -> str:
    """All sections, for reading in a terminal."""
    return "\n\n".join(f"{title}\n{table(lines, words=WORDS)}" for title, lines in sections(rows, by))
