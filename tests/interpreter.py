"""Triton's interpreter, with less to do between operations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    """Let the interpreter patch Triton's language once a launch, not at every call of a function in it, which takes two
    fifths of the time: what is patched stays so until the launch ends."""
    patch, done = interpreter._patch_lang, set()

    def once(function: Any) -> Any:
        modules = [
            module for module in (tl, tl.core) if any(x is module for x in function.__globals__.values())
        ]
        names = tuple(module.__name__ for module in modules)
        if names in done:
            return SimpleNamespace(restore=lambda: None)
        done.add(names)
        scope = patch(function)

        def restore() -> None:
            done.clear()
            scope.restore()

        return SimpleNamespace(restore=restore)

    interpreter._patch_lang = once
