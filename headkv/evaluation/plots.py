"""Pictures of results, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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
    from matplotlib.figure import Figure

    rows = -(-len(results) // columns)
    figure = Figure(figsize=(2.6 * columns, 3.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    image = None
    for axis, result in zip(axes.flat, results, strict=False):
        image = axis.imshow(result.lengths, vmin=0, vmax=tokens, cmap="cividis_r", aspect="auto")
        verdict = f"{result.right} of {result.asked} right"
        axis.set_title(f"{result.name}\n{result.stored_share:.1%} stored, {verdict}", fontsize=9)
        axis.set_xticks(range(len(result.lengths[0])))
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(results) :]:
        axis.set_visible(False)
    figure.supxlabel("KV head", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    assert image is not None
    bar = figure.colorbar(image, ax=axes, shrink=0.6, label="entries stored")
    bar.ax.tick_params(labelsize=7)
    return figure
