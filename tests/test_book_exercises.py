"""The book's chapters: their shape, and every cell executed in order, the solutions with their assertions.

Building the book executes the same cells and fails with any of them: where it was built from these very files,
they are not executed again.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from chapters import BOOK, PAGES, code_cells
from nbformat import NotebookNode

ROOT = BOOK.parent
BUILT = "book/_build/html/.built"
CHAPTERS = [name for name in PAGES if "## Solutions" in (BOOK / f"{name}.md").read_text(encoding="utf-8")]


def is_solution(cell: NotebookNode) -> bool:
    return "solution" in cell.metadata.get("tags", ())


@cache
def book_is_built() -> bool:
    """Whether make, which knows what the built book depends on, has nothing to do for it."""
    try:
        asked = subprocess.run(["make", "--question", BUILT], cwd=ROOT, capture_output=True)
    except FileNotFoundError:
        return False
    return asked.returncode == 0


def commands(data: object) -> list[str]:
    """The commands that a file of measurements says it was made by."""
    if isinstance(data, str):
        return []
    if isinstance(data, list):
        return [found for part in data for found in commands(part)]
    if not isinstance(data, dict):
        return []
    said = [data[key] for key in ("command", "made_by") if key in data]
    own = [command for one in said for command in ([one] if isinstance(one, str) else one)]
    return own + [found for part in data.values() for found in commands(part)]


@pytest.mark.parametrize("name", ["chapters", "first_screen", "full_heads", "quality", "sweep"])
def test_data_names_the_command_that_made_it(name: str) -> None:
    found = commands(json.loads((BOOK / "data" / f"{name}.json").read_text(encoding="utf-8")))
    assert found
    for command in found:
        program = command.removeprefix("python ").split()[0]
        assert program == "headkv" or (ROOT / program).exists(), command


def test_there_are_chapters() -> None:
    assert "cost" in CHAPTERS and "ragged_cache" in CHAPTERS


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_ends_with_summary_exercises_and_folded_solutions(name: str) -> None:
    text = (BOOK / f"{name}.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings[-3:] == ["Summary", "Exercises", "Solutions"]
    _, summary, exercises, _ = re.split(r"^## (?:Summary|Exercises|Solutions)$", text, flags=re.MULTILINE)
    assert len(re.findall(r"^\d\. ", summary, re.MULTILINE)) == 5, "five lines of summary"
    solutions = [cell for cell in code_cells(name) if is_solution(cell)]
    asked = re.findall(r"^\d\. ", exercises, re.MULTILINE)
    assert len(solutions) == len(asked), "a solution for each exercise"
    for cell in solutions:
        assert "hide-cell" in cell.metadata.tags, "solutions are folded away"
        asserts = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Assert)]
        assert asserts, f"this solution checks nothing:\n{cell.source}"


@pytest.mark.parametrize("name", CHAPTERS)
def test_cells_are_short(name: str) -> None:
    for cell in code_cells(name):
        lines = cell.source.splitlines()
        assert len(lines) <= 16, f"{len(lines)} lines:\n{cell.source}"
        assert max(map(len, lines)) <= 77, f"too wide for the page:\n{max(lines, key=len)}"


@pytest.mark.parametrize("name", CHAPTERS)
def test_cells_run_in_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain Python suffices: no cell needs the notebook's magic, and a wrong solution raises."""
    if book_is_built():
        pytest.skip("the build of the book has executed these cells")
    cells = code_cells(name)
    monkeypatch.chdir(BOOK)  # where Jupyter Book runs them
    if any("TRITON_INTERPRET" in cell.source for cell in cells):  # Triton reads it once in a process
        if find_spec("triton") is None:
            pytest.skip("needs Triton: pip install triton")
        script = tmp_path / f"{name}.py"
        script.write_text("\n\n".join(cell.source for cell in cells), encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
        run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        return
    variables: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        exec(compile(cell.source, f"{name}.md, code cell {number}", "exec", dont_inherit=True), variables)
