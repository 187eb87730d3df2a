"""Pictures of results, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from headkv._figure import draw_grid, new_figure
from headkv.evaluation.compare import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_lengths(results: Sequence[Result], tokens: int, columns: int = 4) -> Figure:
    """The entries that every KV head stores, one panel a method: layers downward, heads across.

    Args:
        results: of `compare`; the full cache may be among them.
        tokens: of the prompt, the end of the colour scale.
        columns: panels a line.

    Returns:
        A figure that is readable on white; save it with `savefig`.
    """
    rows = -(-len(results) // columns)
    figure = new_figure(figsize=(2.6 * columns, 3.5 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    image = None
    for axis, result in zip(axes.flat, results, strict=False):
        image = draw_grid(axis, result.lengths, low=0, high=tokens)
        verdict = f"{sum(result.unseen)} of {len(result.unseen)} right, unseen"
        axis.set_title(f"{result.name}\n{result.stored_share:.1%} stored, {verdict}", fontsize=9)
    for axis in axes.flat[len(results) :]:
        axis.set_visible(False)
    figure.supxlabel("KV head", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    assert image is not None
    bar = figure.colorbar(image, ax=axes, shrink=0.6, label="entries stored")
    bar.ax.tick_params(labelsize=7)
    return figure
