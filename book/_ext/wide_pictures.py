"""Cells that show a widget are as wide as the theme allows: beyond the column of text, where the screen has room."""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx

VIEW = "application/vnd.jupyter.widget-view+json"


def widen(app: Sphinx, doctree: nodes.document) -> None:
    """The theme's class for it: the page's contents fold while such a cell is in view.

    A page of one section has no contents, and the theme's script would look for them.
    """
    if len(list(doctree.findall(nodes.section))) < 2:
        return
    for cell in doctree.findall(nodes.container):
        if "cell" in cell["classes"] and any(VIEW in raw.astext() for raw in cell.findall(nodes.raw)):
            cell["classes"].append("full-width")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", widen)
    return {"parallel_read_safe": True}
