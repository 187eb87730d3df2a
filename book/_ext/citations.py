"""References without the role of a list: docutils gives it to a block whose children are no list items."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx

LIST = '<div role="list" class="citation-list">'


def plain(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """The block as an ordinary one; each entry keeps its own role, that of a reference."""
    if "body" in context:
        context["body"] = context["body"].replace(LIST, LIST.replace(' role="list"', ""))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", plain)
    return {"parallel_read_safe": True}
