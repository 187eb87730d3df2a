"""What all widgets share: the bundled front end and the text that stands in for the picture."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

import anywidget
import traitlets as t


def read(name: str) -> str:
    """Text of one file of the front end."""
    return files("headkv.widgets").joinpath("static").joinpath(name).read_text(encoding="utf-8")


_IMPORT = re.compile(r'^import \{[^}]*\} from "\./(\w+\.js)";\n', re.MULTILINE)
_NAMED_EXPORT = re.compile(r"^export (?!default)", re.MULTILINE)


def bundle(name: str) -> str:
    """One self-contained ES module: `name` and all that it imports, each file once, behind those that it imports.

    The files share one scope then, so that no two may give a name of their own to different things.
    """
    texts: dict[str, str] = {}

    def add(name: str) -> None:
        if name not in texts:
            text = read(name)
            for imported in _IMPORT.findall(text):
                add(imported)
            texts[name] = _NAMED_EXPORT.sub("", _IMPORT.sub("", text))

    add(name)
    return "\n".join(texts.values())


class Buffer(t.Bytes):
    """Bytes that travel as a binary buffer: what comes back from a page is a memoryview."""

    def validate(self, obj: Any, value: Any) -> bytes:
        """Bytes of `value`."""
        return bytes(value)


class Picture(anywidget.AnyWidget):
    """An anywidget with a text alternative, shown wherever the picture can not be."""

    _css = read("style.css")

    def describe(self) -> str:
        """One sentence that says what the picture shows."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.describe()

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundles = super()._repr_mimebundle_(**kwargs)
        if bundles is None:
            return None
        data, metadata = bundles
        return {**data, "text/plain": self.describe()}, metadata
