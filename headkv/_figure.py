"""A number a head as a matplotlib figure: layers downward, heads across."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

COLOURS = "cividis_r"  # made for eyes that see red and green alike; darker is more


def grid_figure(values: Tensor, title: str, *, unit: str, heads: str, low: float | None = None) -> Figure:
    """A figure of `values` `[layers, heads]`, readable on white; notebooks show it, `savefig` writes it.

    Args:
        values: whole or floating numbers, on any device.
        title: above the grid.
        unit: what a number is, written at the colours.
        heads: what a column is, e.g. "KV head".
        low: the number at the light end; default: the least value.

    Raises:
        ImportError: there is no matplotlib; the message says how to install it.
    """
    figure = new_figure(
        figsize=(2.4 + 0.22 * min(values.shape[1], 40), 1.2 + 0.13 * min(values.shape[0], 80))
    )
    axes = figure.subplots()
    image = draw_grid(axes, values, low=low)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(heads, fontsize=9)
    axes.set_ylabel("layer", fontsize=9)
    figure.colorbar(image, ax=axes, label=unit).ax.tick_params(labelsize=7)
    return figure


def draw_grid(axes: Axes, values: Any, *, low: float | None = None, high: float | None = None) -> AxesImage:
    """The grid alone, on axes that are there."""
    numbers = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    image = axes.imshow(numbers, vmin=low, vmax=high, cmap=COLOURS, aspect="auto")
    if len(numbers[0]) <= 16:
        axes.set_xticks(range(len(numbers[0])))
    axes.tick_params(labelsize=7)
    return image


def new_figure(**options: Any) -> Figure:
    """An empty matplotlib figure that notebooks show by themselves, without pyplot and its global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'headkv[plots]'") from error

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=110)
            return file.getvalue()

    return Shown(layout="constrained", **options)
