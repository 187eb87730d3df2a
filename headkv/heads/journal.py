"""A journal beside a result: what a long measurement has done so far, so that a killed run goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def whole_lines(path: Path) -> list[str]:
    """Of a journal the lines that are written to their end: what is measured, then a piece each."""
    return [line for line in path.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")]


class Journal:
    """A file of JSON lines: what is measured, then each finished piece of it. Without a path: nothing is kept.

    Args:
        path: of the file; it is read if there is one, or else made with the first piece.
        task: what is measured, with all options; plain JSON values.

    Raises:
        ValueError: the file is another measurement's, or no journal.
    """

    def __init__(self, path: str | os.PathLike[str] | None, task: dict[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self.pieces: list[dict[str, Any]] = []
        if self._path is None:
            return
        self._first = first = json.dumps(task) + "\n"
        if not self._path.exists():
            return
        whole = whole_lines(self._path)
        if whole[:1] != [first]:  # a line without its end is of a run that was killed while it wrote
            raise ValueError(
                f"{self._path} is what another run has left; remove it, or write to another file"
            )
        try:
            self.pieces = [json.loads(line) for line in whole[1:]]
        except ValueError as error:
            raise ValueError(f"{self._path} is no journal: {error}") from error
        self._path.write_text("".join(whole), encoding="utf-8")

    def add(self, piece: dict[str, Any]) -> None:
        """Note a finished piece."""
        self.pieces.append(piece)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write((self._first if file.tell() == 0 else "") + json.dumps(piece) + "\n")
