"""The built book, in Chromium: nothing asked of the network, no console error, formulas and widgets drawn.

A small book of two pages, with the real one's configuration, is always tested; the real one when it is built.
"""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import axe
import pytest
import readers

BOOK = Path(__file__).resolve().parents[1] / "book"
BUILT = BOOK / "_build" / "html"
PAGES = sorted(page.name for page in BUILT.glob("*.html")) if (BUILT / ".built").exists() else []
SCREENS = {"desktop": 1280, "phone": 360}

CUT = """() => [...document.querySelectorAll(".cell pre")]
  .filter((pre) => pre.checkVisibility() && pre.scrollWidth > pre.clientWidth).map((pre) => pre.textContent)"""

WIDE = """() => [...document.querySelectorAll(".bd-article :is(table.shown, table.table, table.bars)")]
  .filter((table) => table.checkVisibility() && table.scrollWidth > table.parentElement.clientWidth + 2)
  .map((table) => `${table.scrollWidth} of ${table.parentElement.clientWidth}: ${table.textContent.slice(0, 40)}`)"""

PROBE = '''---
file_format: mystnb
kernelspec: {name: python3, display_name: Python 3}
---
# Probe

The share is $\\frac{2}{5}$, and the sum

$$ \\sum_{i=1}^n \\alpha_i v_i $$

```{code-cell} python
import anywidget, traitlets

class Probe(anywidget.AnyWidget):
    _esm = """
    export default () => ({
      initialize({ model }) { model.set("twice", 2 * model.get("n")); },
      render({ model, el }) {
        const slider = document.createElement("input");
        Object.assign(slider, { type: "range", max: 9, value: model.get("n"), ariaLabel: "n" });
        const output = document.createElement("output");
        const bytes = new Uint8Array(model.get("raw").buffer).join();
        const draw = () => {
          output.textContent = `n ${model.get("n")} twice ${model.get("twice")} bytes ${bytes}`;
        };
        slider.addEventListener("input", () => {
          model.set("n", slider.valueAsNumber);
          model.save_changes();
        });
        model.on("change:n", (_, n) => { model.set({ twice: 2 * n }); draw(); });
        draw();
        el.append(slider, output);
      },
    });
    """
    _css = "output { color: rgb(1, 2, 3); background: white; }"
    n = traitlets.Int(3).tag(sync=True)
    twice = traitlets.Int(0).tag(sync=True)
    raw = traitlets.Bytes(bytes([1, 2, 255])).tag(sync=True)

probe = Probe()
probe
```

```{code-cell} python
probe
```

## Questions

:::{admonition} Predict
:class: tip
How many? <!-- ask: 4 of 90 -->
:::

```{code-cell} python
print("four")
```

1. Which share?
   <!-- ask: Share = 0.51 -->
'''
INDEX = """# A small book

Built with the real one's configuration. See [the probe](probe.md), and what a {term}`slot` or {term}`slots <slot>` are.
"""
GLOSSARY = """# Glossary

```{glossary}
slot
  A place in a *pool*,
  free or taken.
```
"""
TALL = """---
file_format: mystnb
kernelspec: {name: python3, display_name: Python 3}
---
# A tall picture

```{code-cell} python
import anywidget

class Tall(anywidget.AnyWidget):
    _esm = "export default { render({ el }) { el.style.cssText = 'height: 1200px'; el.textContent = 'tall'; } }"

Tall()
```

What follows does not jump.

```{code-cell} python
Tall()
```
"""
SHIFT = """() => new Promise((done) => {
  let sum = 0;
  const add = (list) => list.getEntries().forEach((entry) => sum += entry.value);
  new PerformanceObserver(add).observe({ type: "layout-shift", buffered: true });
  setTimeout(() => done(sum), 100);
})"""


@pytest.fixture(scope="module")
def small_book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A book of two pages, built anew with the real book's configuration, extension and static files."""
    folder = tmp_path_factory.mktemp("book")
    for name in ("_static", "_ext"):
        shutil.copytree(BOOK / name, folder / name)
    shutil.copy(BOOK / "_config.yml", folder)
    shutil.copy(BOOK / "references.bib", folder)
    (folder / "_toc.yml").write_text(
        "format: jb-book\nroot: index\nchapters:\n  - file: probe\n  - file: tall\n  - file: glossary\n"
    )
    (folder / "index.md").write_text(INDEX)
    (folder / "glossary.md").write_text(GLOSSARY)
    (folder / "probe.md").write_text(PROBE)
    (folder / "tall.md").write_text(TALL)
    build = "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", build, "build", str(folder), "--warningiserror"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "_build" / "html"


@pytest.fixture(scope="module")
def small_address(small_book: Path, serve_folder: Callable[..., Any]) -> Iterator[str]:
    with serve_folder(small_book) as address:
        yield address


@pytest.fixture(scope="module")
def book_address(serve_folder: Callable[..., Any]) -> Iterator[str]:
    with serve_folder(BUILT) as address:
        yield address


@pytest.mark.parametrize("there", [True, False])
def test_the_kernel_chapter_is_executed_only_with_triton(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out = runpy.run_path(str(BOOK / "_ext" / "without_triton.py"))["leave_out"]
    monkeypatch.setitem(leave_out.__globals__, "find_spec", lambda name: name if there else None)
    config = SimpleNamespace(nb_execution_excludepatterns=["other.md"])
    leave_out(None, config)
    assert config.nb_execution_excludepatterns == (["other.md"] if there else ["other.md", "kernel.md"])
    assert (BOOK / "kernel.md").exists()


def test_widget_is_alive_without_a_kernel(small_address: str, page_checker: Callable[..., Any]) -> None:
    with page_checker(small_address, "probe.html") as page:
        shown = page.locator(".widget-host output")
        assert shown.all_text_contents() == ["n 3 twice 6 bytes 1,2,255"] * 2
        page.locator(".widget-host input").first.press("ArrowRight")
        assert shown.all_text_contents() == ["n 4 twice 8 bytes 1,2,255"] * 2, "two views share one model"
        assert shown.first.evaluate("node => getComputedStyle(node).color") == "rgb(1, 2, 3)"


@pytest.mark.parametrize("width", [360, 1000, 1190, 1210, 1280, 1600])
def test_a_picture_leaves_the_column_where_there_is_room(
    width: int, small_address: str, page_checker: Callable[..., Any]
) -> None:
    with page_checker(small_address, "probe.html", width=width) as page:
        text = page.locator(".bd-article p").first.bounding_box()
        picture = page.locator(".widget-host").first.bounding_box()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert picture["x"] >= text["x"] - 1 and picture["x"] + picture["width"] <= width
        wider = picture["width"] / text["width"]
        assert wider > 1.25 if width >= 1200 else wider < 1.01


@pytest.mark.parametrize("width", [1280, 390])
def test_a_picture_has_its_place_before_it_is_drawn(
    width: int, small_address: str, page_checker: Callable[..., Any]
) -> None:
    with page_checker(small_address, "tall.html", width=width) as page:
        assert page.locator(".widget-host").all_text_contents() == ["tall"] * 2
        assert page.locator(".cell_output").first.evaluate("(node) => node.offsetHeight") < 1250, (
            "nothing is left over"
        )
        assert page.evaluate(SHIFT) < 0.05


def test_formulas_are_drawn_from_local_files(small_address: str, page_checker: Callable[..., Any]) -> None:
    with page_checker(small_address, "probe.html") as page:
        page.wait_for_selector("mjx-container")
        assert page.locator("mjx-container").count() == 2
        assert page.evaluate("document.fonts.ready.then(fonts => [...fonts].some(f => /MJX/.test(f.family)))")


def test_a_term_carries_its_definition(small_address: str, page_checker: Callable[..., Any]) -> None:
    with page_checker(small_address) as page:
        links = page.locator("a.reference:has(.std-term)")
        titles = links.evaluate_all("links => links.map((link) => link.title)")
        assert titles == ["A place in a pool, free or taken."] * 2
        links.first.focus()
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Tab")
        shown = links.first.evaluate("link => getComputedStyle(link, '::after').content")
        assert shown == '"A place in a pool, free or taken."'
        links.first.click()
        page.wait_for_url("**/glossary.html#term-slot")


def test_a_page_says_how_to_run_it_and_takes_answers(
    small_address: str, page_checker: Callable[..., Any]
) -> None:
    with page_checker(small_address, "probe.html") as page:
        assert page.locator("h1 + p").inner_text() == "Run this page: make lab, then open probe.md."
        guess, exercise = page.locator("form.ask").all()
        result = page.locator(".cell_output", has_text="four")
        assert result.count() == 1 and not result.is_visible()
        guess.get_by_role("textbox").fill("5")
        guess.get_by_role("textbox").press("Enter")
        assert guess.locator("output").inner_text() == "✗ It is 4 of 90." and result.is_visible()
        exercise.get_by_label("Share").fill("0.51")
        exercise.get_by_role("button", name="Check").click()
        assert exercise.locator("output").inner_text() == "✓ Right."
    with page_checker(small_address) as page:
        assert page.locator(".run-this-page").count() == 0, "no code, nothing to run"


def test_search_works_offline(small_address: str, page_checker: Callable[..., Any]) -> None:
    with page_checker(small_address, "search.html?q=probe") as page:
        page.wait_for_selector("ul.search li a")
        assert "probe.html" in page.locator("ul.search li a").first.get_attribute("href")


def test_theme_follows_the_system_until_it_is_chosen(
    small_address: str, page_checker: Callable[..., Any]
) -> None:
    seen = {}
    with page_checker(small_address, theme="dark") as page:
        for _ in range(3):
            mode = page.evaluate("document.documentElement.dataset.mode")
            seen[mode] = page.evaluate("getComputedStyle(document.body).backgroundColor")
            page.locator("button.theme-switch-button:visible").first.click()
    assert seen["auto"] == seen["dark"] != seen["light"]


FAULTS = {
    "foreign request": ("await fetch('http://example.invalid/x').catch(() => 0)", "left the local server"),
    "missing file": ("await fetch('nowhere.js')", "404"),
    "console error": ("console.error('broken')", "console: broken"),
    "exception": ("setTimeout(() => { throw Error('thrown') })", "uncaught: thrown"),
}
OUT_OF_REACH = {
    "no name": ("document.body.append(document.createElement('button'))", "button-name"),
    "too faint": ("document.querySelector('article p').style.color = '#777'", "color-contrast"),
    "too pale": ("document.querySelector('article p').style.opacity = 0.4", '"Run this page'),
}


@pytest.mark.parametrize(("script", "complaint"), FAULTS.values(), ids=FAULTS.keys())
def test_the_checker_complains(
    small_address: str, page_checker: Callable[..., Any], script: str, complaint: str
) -> None:
    with pytest.raises(AssertionError, match=complaint), page_checker(small_address) as page:
        page.evaluate(f"async () => {{ {script}; await new Promise((done) => setTimeout(done, 300)); }}")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nobody_is_kept_out(small_address: str, page_checker: Callable[..., Any], theme: str) -> None:
    with page_checker(small_address, "probe.html", theme=theme) as page:
        assert axe.findings(page) == axe.faint(page, ".bd-article") == []
        for script, complaint in OUT_OF_REACH.values():
            page.evaluate(f"() => {{ {script}; }}")
            assert complaint in "\n".join(axe.findings(page) + axe.faint(page, ".bd-article"))


class Links(HTMLParser):
    """Where a page points to, and what it can be pointed at."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.names = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id":
                self.names.add(value or "")
            elif name in ("href", "src") and not urlsplit(value or "").scheme:
                self.targets.append(value or "")


@pytest.mark.skipif(not PAGES, reason="the book is not built: make book SERVE=0")
def test_no_link_is_broken() -> None:
    pages = {name: Links(BUILT / name) for name in PAGES}
    broken = []
    for name, page in pages.items():
        for target in page.targets:
            address = urlsplit(target)
            path = unquote(address.path) or name
            known = path in pages and unquote(address.fragment) in pages[path].names
            if not known and not (path not in pages and (BUILT / path).is_file()):
                broken.append(f"{name}: {target}")
    assert broken == [] and sum(len(page.targets) for page in pages.values()) > 500


@pytest.mark.skipif(not PAGES, reason="the book is not built: make book SERVE=0")
@pytest.mark.parametrize("width", SCREENS.values(), ids=SCREENS.keys())
@pytest.mark.parametrize("name", PAGES)
def test_page(name: str, width: int, book_address: str, page_checker: Callable[..., Any]) -> None:
    phone = width == SCREENS["phone"]
    with page_checker(book_address, name, width=width, touch=phone) as page:
        assert page.locator('.widget-host:not([data-state="ready"])').count() == 0, "a widget was not drawn"
        assert page.locator("mjx-merror").count() == 0, "a formula could not be read"
        assert page.evaluate(SHIFT) < 0.05, "the text jumps"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the screen"
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme)
            page.locator(f"html[data-theme={theme}]").wait_for()
            assert axe.faint(page, ".bd-article") == [], theme
        if phone:
            assert page.evaluate(WIDE) == [], "a table that does not fit a phone"
            assert readers.try_controls(page, finger=True) == []
        else:
            assert page.evaluate(CUT) == [], "code or output that does not fit the column"
            assert axe.findings(page, colours=False) == []
            assert readers.try_controls(page) == []
