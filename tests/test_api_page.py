"""The book's API reference: every public name stands on it, once, and it needs neither Triton nor the extension."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import headkv

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "book" / "api.md").read_text(encoding="utf-8")
INVENTORY = ROOT / "book" / "_build" / "html" / "objects.inv"
DIRECTIVE = re.compile(
    r"^\.\. auto(class|data|function|module):: (\S+)(?:\n   :exclude-members: (.+))?", re.MULTILINE
)


def extension() -> dict[str, Any]:
    """The functions of the book's Sphinx extension."""
    return runpy.run_path(str(ROOT / "book" / "_ext" / "docstrings.py"))


def resolve(name: str) -> Any:
    """What a dotted name stands for."""
    try:
        return importlib.import_module(name)
    except ImportError:
        home, _, own = name.rpartition(".")
        return getattr(resolve(home), own)


def on_the_page() -> list[str]:
    """Dotted names that the directives of the page document."""
    names = []
    for kind, name, excluded in DIRECTIVE.findall(PAGE):
        if kind != "module":
            names.append(name)
            continue
        left_out = set(filter(None, excluded.split(", ")))
        assert left_out <= set(resolve(name).__all__), name
        own = (f"{name}.{member}" for member in resolve(name).__all__ if member not in left_out)
        # Of a module, autodoc takes what has a docstring of its own.
        names += [
            member for member in own if inspect.isroutine(resolve(member)) or inspect.isclass(resolve(member))
        ]
    return names


def public() -> dict[str, Any]:
    """What the package and its parts name in `__all__`."""
    parts = [f"headkv.{found.name}" for found in pkgutil.iter_modules(headkv.__path__) if found.ispkg]
    return {
        f"{part}.{name}": resolve(f"{part}.{name}")
        for part in ("headkv", *parts)
        for name in getattr(resolve(part), "__all__", ())
        if name != "__version__" and not inspect.ismodule(resolve(f"{part}.{name}"))
    }


def test_every_public_name_is_on_the_page_once() -> None:
    shown = Counter(id(resolve(name)) for name in on_the_page())
    assert len(public()) > 60
    assert [name for name, thing in public().items() if shown[id(thing)] != 1] == []


def test_what_the_package_exports_is_shown_under_its_short_name() -> None:
    short = {f"headkv.{name}" for name in headkv.__all__ if callable(getattr(headkv, name))}
    assert short <= set(on_the_page())


BLOCKED = """
import importlib, sys
sys.modules |= dict.fromkeys(("triton", "headkv_kernels", "headkv._rust", "kvpress"))
for name in sys.argv[1:]:
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            home = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        assert getattr(home, parts[length]) is not None
        break
    else:
        raise SystemExit(f"{name} was not found")
"""


def test_the_page_needs_neither_triton_nor_the_extension() -> None:
    run = subprocess.run(
        [sys.executable, "-c", BLOCKED, *on_the_page()], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(not INVENTORY.exists(), reason="the book is not built: make book SERVE=0")
def test_sphinx_wrote_every_one_of_them() -> None:
    from sphinx.util.inventory import InventoryFile

    with INVENTORY.open("rb") as file:
        found = InventoryFile.load(file, "", lambda base, name: name)
    written = {name for kind, names in found.items() if kind.startswith("py:") for name in names}
    assert set(on_the_page()) <= written


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (
            ["Attributes (all on one device):", "    keys: of"],
            ["All on one device.", "", "Attributes:", "    keys: of"],
        ),
        (["Args:", "    x (int): of"], ["Args:", "    x (int): of"]),
        (["A layer.", "", "Returns (b):"], ["A layer.", "", "B.", "", "Returns:"]),
    ],
    ids=["remark", "none", "last line"],
)
def test_remarks_on_a_section_are_sentences(written: list[str], read: list[str]) -> None:
    take_out_remarks = extension()["take_out_remarks"]
    take_out_remarks(None, "class", "headkv.RaggedLayer", None, None, written)
    assert written == read


def test_widgets_show_their_own_arguments() -> None:
    show = extension()["show_own_arguments"]
    shown, _ = show(
        None, "class", "", headkv.widgets.CacheBill, None, "(*args: t.Any, **kwargs: t.Any)", None
    )
    assert shown.startswith("(*, layers: int = 30, kv_heads: int = 3,") and "None = None)" in shown
    assert show(None, "class", "", headkv.AdaKV, None, "(budget)", None) == ("(budget)", None)
