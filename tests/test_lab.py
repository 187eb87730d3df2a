"""`make lab`: pages open as notebooks that look like the page, and a real JupyterLab runs one."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import pytest

pytest.importorskip("jupyterlab", reason="pip install jupyterlab")

import lab  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
PAGES = sorted(page.name for page in BOOK.glob("*.md"))
TOKEN = "for-this-test-only"

PAGE = """---
file_format: mystnb
kernelspec:
  name: python3
  display_name: Python 3
---
# Two pictures

{cite:p}`feng2024adakv` split a budget.

:::{admonition} Predict
:class: tip
How many slots for head B? <!-- ask: 4 slots -->
:::

```{code-cell} python
---
tags: [hide-input]
---
from headkv.widgets import BudgetExplorer, CacheBill

explorer = BudgetExplorer([[.6, .2, .1, .05, .03, .02], [.25, .2, .2, .15, .1, .1]],
                          budget=3, window=0, pooling="none", title="Slots")
explorer
```

```{code-cell} python
bill = CacheBill(context=1000, title="A bill")
bill
```

```{code-cell} python
print("python has", explorer.budget, explorer.allocator, explorer.budgets, bill.dtype)
```

```{code-cell} python
---
tags: [hide-cell, solution]
---
assert bill.context
```
"""


@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_folded_and_is_saved_as_it_was(name: str, tmp_path: Path) -> None:
    for file in (name, "references.bib"):
        shutil.copy(BOOK / file, tmp_path)
    pages = lab.Pages(root_dir=str(tmp_path))
    model = pages.get(name)
    assert model["type"] == "notebook"
    for cell in model["content"]["cells"]:
        hidden = cell["metadata"].get("jupyter", {})
        tags = cell["metadata"].get("tags", [])
        assert bool(hidden.get("source_hidden")) == bool({"hide-input", "hide-cell"} & set(tags))
        assert bool(hidden.get("outputs_hidden")) == bool({"hide-output", "hide-cell"} & set(tags))
        if cell["cell_type"] == "markdown":
            assert "{cite" not in cell["source"], "every citation names a reference of the book"
    pages.save({name: model[name] for name in ("type", "format", "content")}, name)
    text = (BOOK / name).read_text(encoding="utf-8")
    written = jupytext.writes(jupytext.reads(text, fmt="md"), fmt="md:myst")
    assert (tmp_path / name).read_text(encoding="utf-8") == written


def test_a_citation_is_a_link(tmp_path: Path) -> None:
    shutil.copy(BOOK / "references.bib", tmp_path)
    text = "As {cite:t}`wu2024retrieval` say {cite:p}`feng2024adakv, li2024snapkv` and {cite:p}`nobody`."
    (tmp_path / "page.md").write_text(PAGE.split("# Two")[0] + text + "\n\n```{code-cell} python\n1\n```\n")
    cell = lab.Pages(root_dir=str(tmp_path)).get("page.md")["content"]["cells"][0]
    assert cell["source"] == (
        'As [Wu et al. (2024)](https://arxiv.org/abs/2404.15574 "cite:t wu2024retrieval") say '
        '[(Feng et al., 2024; Li et al., 2024)](https://arxiv.org/abs/2407.11550 "cite:p feng2024adakv, li2024snapkv") '
        "and {cite:p}`nobody`."
    )


@pytest.fixture
def lab_page(chromium: Any, tmp_path: Path) -> Iterator[Any]:
    """A page of `make lab`'s own JupyterLab, with the small notebook open; ends the server."""
    book = tmp_path / "book"
    book.mkdir()
    (book / "page.md").write_text(PAGE)
    shutil.copy(BOOK / "references.bib", book)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "RUNTIME", "DATA")}
    paths = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | places | {"JUPYTER_TOKEN": TOKEN, "PYTHONPATH": paths}
    command = [sys.executable, str(ROOT / "tools" / "lab.py"), str(book), "--port", str(port), "--no-browser"]
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    page = chromium.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(40_000)
    try:
        wait_for(port, server, tmp_path / "log")
        page.goto(f"http://127.0.0.1:{port}/lab/tree/page.md?token={TOKEN}")
        yield page
    finally:
        page.close()
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server listens; fails with its own words if it ends instead."""
    while True:
        assert server.poll() is None, log.read_text(encoding="utf-8")
        with socket.socket() as probe:
            probe.settimeout(0.5)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return


def test_a_page_runs_and_its_pictures_reach_python(lab_page: Any) -> None:
    notebook = lab_page.locator(".jp-Notebook")
    notebook.locator(".jp-CodeCell").nth(3).wait_for()
    notebook.get_by_role("link", name="(Feng et al., 2024)").wait_for()
    notebook.get_by_text("How many slots for head B?", exact=True).wait_for()
    text = notebook.inner_text()
    assert "(Feng et al., 2024)" in text and ":::" not in text, "boxes and citations are rendered"
    assert "How many slots for head B?" in text and "ask:" not in text
    assert "from headkv.widgets" in text, "the first line of folded code stands for it"
    assert "assert bill.context" not in notebook.locator(".jp-InputArea-editor:visible").all_inner_texts()

    lab_page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    lab_page.get_by_role("menuitem", name="Run", exact=True).click()
    lab_page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    explorer, bill = notebook.locator(".hk-explorer"), notebook.locator(".hk-cache-bill")
    bill.wait_for()
    said = notebook.get_by_text("python has")
    said.last.wait_for()
    names = "(root) => [...root.querySelectorAll('input[type=radio]')].map((input) => input.name)"
    assert not set(explorer.evaluate(names)) & set(bill.evaluate(names)), "each picture has its own groups"
    assert bill.get_by_role("radio", name="float32").is_checked()

    explorer.get_by_role("radio", name="Uniform").check()
    bill.get_by_role("radio", name="int8").check()
    explorer.get_by_label("Budget", exact=True).press("ArrowRight")
    assert explorer.get_by_role("radio", name="Uniform").is_checked(), "the second picture left it alone"
    assert bill.get_by_role("radio", name="int8").is_checked()
    assert "66.7% · 4 a head" in explorer.locator("output").first.inner_text(), "four of six entries"

    cell = notebook.locator(".jp-CodeCell", has_text="python has")
    wanted = f"python has {4 / 6} uniform [[4, 4]] int8"
    # Pictures send one change after another, each once the kernel took the last: ask until all came.
    for _ in range(20):
        cell.locator(".cm-content").click()
        lab_page.keyboard.press("Shift+Enter")
        lab_page.wait_for_timeout(2000)
        if wanted in cell.locator(".jp-OutputArea-output").inner_text():
            return
    pytest.fail(f"Python never had what the pictures show: {cell.inner_text()!r}")
