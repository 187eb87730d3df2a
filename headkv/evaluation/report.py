"""What a sweep found: quality against bytes, with intervals; as text, as one HTML page."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headkv import _checks
from headkv._table import table
from headkv.evaluation.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEPTHS = 4  # parts of a text
SPLITS: dict[str, Callable[[Row], Any]] = {
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


def cells(rows: Iterable[Row], by: str = "task") -> list[Cell]:
    """The cells of rows of one model and one way to ask, the greatest caches first.

    Args:
        rows: where `by` is "depth", those without one are left out.
        by: what the parts are: "task", "length", "depth" or "seed".

    Raises:
        ValueError: no such parts.
    """
    part_of = SPLITS[_checks.one_of("by", by, tuple(SPLITS))]
    groups: dict[tuple[str, float], dict[Any, list[Row]]] = {}
    for row in rows:
        if (part := part_of(row)) is not None:
            groups.setdefault((row.method, row.budget), {}).setdefault(part, []).append(row)
    made = [_cell(*key, parts, by) for key, parts in groups.items()]
    return sorted(made, key=lambda cell: -cell.nbytes)


def _cell(method: str, budget: float, parts: dict[Any, list[Row]], by: str) -> Cell:
    def mean(value: Callable[[Row], float]) -> float:
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


def sections(rows: Sequence[Row], by: str = "task") -> list[tuple[str, list[dict[str, str]]]]:
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


def as_text(rows: Sequence[Row], by: str = "task") -> str:
    """All sections, for reading in a terminal."""
    return "\n\n".join(f"{title}\n{table(lines, words=WORDS)}" for title, lines in sections(rows, by))


def plot(rows: Sequence[Row], by: str = "task", *, dark: bool = False) -> Figure:
    """Mean score against megabytes with its interval: a panel a model and way to ask, a line a method.

    Raises:
        ImportError: there is no matplotlib.
        ValueError: as in `sections`.
    """
    from headkv._figure import new_figure

    panels = list(dict.fromkeys((row.model, row.question) for row in rows))
    ink, paper = ("#e6e6e6", "#16181c") if dark else ("#222222", "#ffffff")
    figure = new_figure(figsize=(2 + 3.4 * len(panels), 3.6), facecolor=paper)
    methods = [name for name in dict.fromkeys(row.method for row in rows) if name != "FullCache"]
    for axis, (model, question) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        here = cells([row for row in rows if (row.model, row.question) == (model, question)], by)
        for number, name in enumerate(methods):
            line = [cell for cell in here if cell.method == name]
            sizes, scores = [cell.nbytes / 1e6 for cell in line], [cell.score for cell in line]
            spread = [
                [max(0.0, cell.score - cell.interval[0]) for cell in line],
                [max(0.0, cell.interval[1] - cell.score) for cell in line],
            ]
            marker, colour = "osD^vP*X<>"[number % 10], f"C{number % 10}"
            axis.errorbar(sizes, scores, spread, marker=marker, color=colour, capsize=2, lw=1.4, label=name)
        for cell in (cell for cell in here if cell.method == "FullCache"):
            axis.axhline(cell.score, color=ink, ls=":", lw=1, label=f"full cache, {cell.nbytes / 1e6:.1f} MB")
        axis.set(xlabel="MB of the cache", ylim=(-0.03, 1.05), facecolor=paper)
        axis.set_xlim(left=0)
        axis.set_title(f"{model}, question {question}", color=ink, fontsize=10)
        axis.tick_params(colors=ink, labelsize=8)
        for part in (axis.xaxis.label, axis.yaxis.label, *axis.spines.values()):
            part.set_color(ink)
    first = figure.axes[0]
    first.set_ylabel("score, mean of the parts", color=ink)
    handles = first.get_legend_handles_labels()
    legend = figure.legend(
        *handles, loc="outside right upper", fontsize="small", facecolor=paper, edgecolor=ink
    )
    for text in legend.get_texts():
        text.set_color(ink)
    return figure


def save_pictures(rows: Sequence[Row], path: str | os.PathLike[str], by: str = "task") -> list[Path]:
    """Write the figure for a light page, and beside it, with "-dark" in the name, for a dark one."""
    path = Path(path)
    paths = [path, path.with_name(f"{path.stem}-dark{path.suffix}")]
    for file, dark in zip(paths, (False, True), strict=True):
        plot(rows, by, dark=dark).savefig(file, dpi=150)
    return paths


STYLE = """:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15rem 0.7rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
div { overflow-x: auto; }
img { max-width: 100%; }"""


def as_html(rows: Sequence[Row], by: str = "task") -> str:
    """All sections and the figure as one page: nothing from the network, light or dark as the reader has it."""
    sources = []
    for dark in (True, False):
        file = io.BytesIO()
        plot(rows, by, dark=dark).savefig(file, format="png", dpi=130)
        sources.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    body = [
        f'<picture><source srcset="{sources[0]}" media="(prefers-color-scheme: dark)">'
        f'<img src="{sources[1]}" alt="Score against megabytes; the tables below have the numbers"></picture>'
    ]
    for title, lines in sections(rows, by):
        head = "".join(f"<th>{html.escape(name)}</th>" for name in lines[0])
        rest = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line.values()) + "</tr>"
            for line in lines
        )
        body.append(f"<h2>{html.escape(title)}</h2><div><table><tr>{head}</tr>{rest}</table></div>")
    versions = "; ".join(dict.fromkeys(f"{row.versions} on {row.device}" for row in rows))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>headkv report</title>'
        f"<style>{STYLE}</style><h1>Quality against bytes</h1>{''.join(body)}<p>{html.escape(versions)}</p></html>\n"
    )
