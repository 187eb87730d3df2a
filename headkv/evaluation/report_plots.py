"""Pictures of what a sweep found, for light and for dark pages: quality against bytes, and where needles are found."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headkv._figure import draw_grid, new_figure
from headkv.evaluation.report import DEPTHS, SPLITS, cells
from headkv.evaluation.rows import SweepRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPERS = {False: ("#222222", "#ffffff"), True: ("#e6e6e6", "#16181c")}  # ink and paper


def plot_quality(rows: Sequence[SweepRow], by: str = "task", *, dark: bool = False) -> Figure:
    """Mean score against megabytes with its interval: a panel a model and way to ask, a line a method.

    Raises:
        ImportError: there is no matplotlib.
        ValueError: as in `sections`.
    """
    panels = list(dict.fromkeys((row.model, row.question) for row in rows))
    ink, paper = PAPERS[dark]
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


def plot_needles(rows: Sequence[SweepRow], *, dark: bool = False, columns: int = 4) -> Figure:
    """The needle map: mean score by depth (downward) and length (across), a panel a method, budget and way to ask.

    Args:
        rows: those without a depth are left out.
        dark: for a dark page.
        columns: panels a line.

    Raises:
        ImportError: there is no matplotlib.
        ValueError: no row has a depth.
    """
    there = [row for row in rows if row.depth is not None]
    if not there:
        raise ValueError(f"rows must have at least one with a depth, got {len(rows)} without")
    panels = list(dict.fromkeys((row.model, row.question, row.method, row.budget) for row in there))
    lengths, (ink, paper) = sorted({row.length for row in there}), PAPERS[dark]
    lines = -(-len(panels) // columns)
    figure = new_figure(figsize=(2.5 * min(columns, len(panels)) + 1, 2.3 * lines), facecolor=paper)
    axes = figure.subplots(lines, min(columns, len(panels)), squeeze=False)
    image: Any = None
    for axis, panel in zip(axes.flat, panels, strict=False):
        here = [row for row in there if (row.model, row.question, row.method, row.budget) == panel]
        grid = [
            [_mean([x.score for x in here if (SPLITS["depth"](x), x.length) == (d, n)]) for n in lengths]
            for d in range(DEPTHS)
        ]
        image = draw_grid(axis, grid, low=0, high=1)
        axis.set_title(f"{panel[2]} {panel[3]:g}\n{panel[0]}, question {panel[1]}", fontsize=8, color=ink)
        axis.set_facecolor(paper)
        axis.set_xticks(range(len(lengths)), map(str, lengths))
        axis.set_yticks(range(DEPTHS), [f"{(d + 0.5) / DEPTHS:.0%}" for d in range(DEPTHS)])
        axis.tick_params(colors=ink, labelsize=7)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel("tokens", fontsize=9, color=ink)
    figure.supylabel("depth of the answer", fontsize=9, color=ink)
    bar = figure.colorbar(image, ax=axes, shrink=0.7)
    bar.ax.tick_params(colors=ink, labelsize=7)
    return figure


def _mean(values: Sequence[float]) -> float:
    """Nothing is drawn where there is no document."""
    return sum(values) / len(values) if values else float("nan")


def save_pictures(path: str | os.PathLike[str], draw: Callable[[bool], Figure]) -> list[Path]:
    """Write what `draw(dark)` draws for a light page, and beside it, with "-dark" in the name, for a dark one."""
    path = Path(path)
    paths = [path, path.with_name(f"{path.stem}-dark{path.suffix}")]
    for file, dark in zip(paths, (False, True), strict=True):
        draw(dark).savefig(file, dpi=150)
    return paths
