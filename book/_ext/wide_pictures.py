"""Widgets, and code of the package wider than the text, are as wide as the theme allows, where there is room."""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx

VIEW = "application/vnd.jupyter.widget-view+json"
FITS = 80  # columns of code beside each other in the column of text


def widen(app: Sphinx, doctree: nodes.document) -> None:
    """The theme's class for it: the page's contents fold while such a cell is in view.

    A page of one section has no contents, and the theme's script would look for them.
    """
    if len(list(doctree.findall(nodes.section))) < 2:
        return
    for cell in doctree.findall(nodes.container):
        if "cell" in cell["classes"] and any(VIEW in raw.astext() for raw in cell.findall(nodes.raw)):
            cell["classes"].append("full-width")
    for code in doctree.findall(nodes.literal_block):
        if "source" in code and max(map(len, code.astext().splitlines()), default=0) > FITS:
            code["classes"].append("full-width")  # from a file: cells are narrow


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", widen)
    return {"parallel_read_safe": True}
