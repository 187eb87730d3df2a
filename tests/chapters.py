"""The book's pages as Jupyter Book reads them, for the tests of what stands in them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from myst_nb.core.read import read_myst_markdown_notebook
from myst_parser.config.main import MdParserConfig
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook

BOOK = Path(__file__).resolve().parents[1] / "book"
PAGES = re.findall(
    r"^(?:root| +- file): (\S+)", (BOOK / "_toc.yml").read_text(encoding="utf-8"), re.MULTILINE
)


@cache
def notebook(name: str) -> NotebookNode:
    """A page as Jupyter Book reads it; one without code is one cell of text. All who ask share it."""
    text = (BOOK / f"{name}.md").read_text(encoding="utf-8")
    if not text.startswith("---\nfile_format: mystnb"):
        return new_notebook(cells=[new_markdown_cell(text)])
    return read_myst_markdown_notebook(text, MdParserConfig())


def code_cells(name: str) -> list[NotebookNode]:
    return [cell for cell in notebook(name).cells if cell.cell_type == "code"]


def prose_cells(name: str) -> list[str]:
    return [cell.source for cell in notebook(name).cells if cell.cell_type == "markdown"]
