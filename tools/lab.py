"""Open JupyterLab on the book: every page as a notebook that looks like the page. `make lab` calls it.

Lab knows neither tags of cells nor the list of references. So each page is given, as it is opened, the marks by which
Lab folds cells, and its citations as links; as it is saved they are taken back, and the file stays as it was written.
"""

from __future__ import annotations

import argparse
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from jupyterlab.labapp import LabApp
from jupytext import TextFileContentsManager
from pybtex.database import parse_file

HERE = Path(__file__).resolve().parent
HIDDEN = {
    "hide-input": ("source_hidden",),
    "hide-output": ("outputs_hidden",),
    "hide-cell": ("source_hidden", "outputs_hidden"),
}
CITED = re.compile(r"\{(cite:[pt])\}`([^`]+)`")
LINKED = re.compile(r'\[[^\]]*\]\([^)" ]* "(cite:[pt]) ([^"]*)"\)')


class Pages(TextFileContentsManager):
    """Text notebooks, read and written by jupytext: tagged cells open folded, citations as links."""

    def get(self, path: str, content: bool = True, **options: Any) -> dict[str, Any]:
        model: dict[str, Any] = super().get(path, content=content, **options)
        if content and model["type"] == "notebook":
            for cell in model["content"]["cells"]:
                if hidden := _hidden(cell):
                    cell["metadata"].setdefault("jupyter", {}).update(dict.fromkeys(hidden, True))
                if cell["cell_type"] == "markdown":
                    cell["source"] = CITED.sub(self._link, cell["source"])
        return model

    def save(self, model: dict[str, Any], path: str = "") -> Any:
        if model["type"] == "notebook" and "content" in model:
            for cell in model["content"]["cells"]:
                if hidden := _hidden(cell):
                    marks = cell["metadata"].pop("jupyter", {})
                    if rest := {name: value for name, value in marks.items() if name not in hidden}:
                        cell["metadata"]["jupyter"] = rest
                if cell["cell_type"] == "markdown":
                    cell["source"] = LINKED.sub(r"{\1}`\2`", cell["source"])
        return super().save(model, path)

    @cached_property
    def _references(self) -> Any:
        file = Path(self.root_dir) / "references.bib"
        return parse_file(file).entries if file.exists() else {}

    def _link(self, citation: re.Match[str]) -> str:
        """`(Feng et al., 2024)` as a link to the first paper; its title says what stood there."""
        role, keys = citation.groups()
        papers = [self._references.get(key.strip()) for key in keys.split(",")]
        if None in papers:
            return citation[0]
        said = "; ".join(_said(paper, role) for paper in papers)
        number = papers[0].fields.get("eprint")
        address = (
            f"https://arxiv.org/abs/{number}" if number else papers[0].fields.get("url", "references.md")
        )
        return f'[{f"({said})" if role == "cite:p" else said}]({address} "{role} {keys}")'


def _hidden(cell: Any) -> set[str]:
    """What the tags of a cell hide of it, in Lab's words."""
    return {name for tag in cell["metadata"].get("tags", ()) for name in HIDDEN.get(tag, ())}


def _said(paper: Any, role: str) -> str:
    names = [" ".join(person.last_names) for person in paper.persons["author"]]
    who = " and ".join(names) if len(names) < 3 else f"{names[0]} et al."
    return f"{who}, {paper.fields['year']}" if role == "cite:p" else f"{who} ({paper.fields['year']})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8888)
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    options = parser.parse_args()
    # Settings that a reader's own override: labconfig/default_setting_overrides.json.
    search = [str(HERE), *filter(None, [os.environ.get("JUPYTER_CONFIG_PATH")])]
    os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join(search)
    flags = [f"--ServerApp.root_dir={options.folder.resolve()}", f"--port={options.port}"]
    flags += ["--ip=127.0.0.1", "--LabApp.default_url=/lab/tree/index.md"]
    flags += ["--ServerApp.contents_manager_class=lab.Pages"]  # this file, as the server imports it
    flags += ["--no-browser"] if options.no_browser else []
    flags += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    LabApp.launch_instance(flags)


if __name__ == "__main__":
    main()
