"""Under the title of each page that has code: how to have it as a notebook that runs."""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx


def tell(app: Sphinx, doctree: nodes.document) -> None:
    """One line after the title, in pages with code cells; nobody needs it in the notebook itself."""
    titles = list(doctree.findall(nodes.title))
    if not titles or not any("cell_input" in node["classes"] for node in doctree.findall(nodes.container)):
        return
    words = ["Run this page: ", nodes.literal(text="make lab"), ", then open "]
    words += [nodes.literal(text=f"{app.env.docname}.md"), "."]
    line = nodes.paragraph(classes=["run-this-page"])
    line += [nodes.Text(word) if isinstance(word, str) else word for word in words]
    titles[0].parent.insert(titles[0].parent.index(titles[0]) + 1, line)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", tell)
    return {"parallel_read_safe": True}
