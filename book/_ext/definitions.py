"""A word that links into the glossary carries its definition: as the link's title, for pointer and screen reader.

The page's style sheet shows it to who comes by keyboard. On a touch screen the link leads to the glossary.
"""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx

GLOSSARY = "glossary"


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx; links are resolved when a page is about to be written."""
    app.connect("doctree-resolved", add_definitions)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def definitions(app: Sphinx) -> dict[str, str]:
    """Each term's anchor, and its definition in one line; nothing where a book has no glossary."""
    if GLOSSARY not in app.env.found_docs:
        return {}
    found = {}
    for item in app.env.get_doctree(GLOSSARY).findall(nodes.definition_list_item):
        meaning = " ".join(part.astext() for part in item.findall(nodes.definition))
        for term in item.findall(nodes.term):
            found |= dict.fromkeys(term["ids"], " ".join(meaning.split()))
    return found


def add_definitions(app: Sphinx, page: nodes.document, name: str) -> None:
    """Put a title on every link to a term."""
    links = [
        link
        for link in page.findall(nodes.reference)
        if any("std-term" in inside["classes"] for inside in link.findall(nodes.inline))
    ]
    known = definitions(app) if links else {}
    for link in links:
        anchor = (link.get("refuri") or "").partition("#")[2] or link.get("refid", "")
        if anchor in known:
            link["reftitle"] = known[anchor]
