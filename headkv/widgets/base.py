"""What all widgets share: the bundled front end and the text that stands in for the picture."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import anywidget
import traitlets as t


def read(name: str) -> str:
    """Text of one file of the front end."""
    return files("headkv.widgets").joinpath("static").joinpath(name).read_text(encoding="utf-8")


def bundle(*names: str) -> str:
    """One self-contained ES module: the files one after the other, the last of which exports `render`."""
    return "\n".join(read(name) for name in names)


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
