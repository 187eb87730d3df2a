"""Where there is no Triton, as it comes for Linux only, the chapter on kernels is built without executing it."""

from __future__ import annotations

from importlib.util import find_spec

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util import logging

CHAPTER = "kernel.md"


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx, before MyST-NB reads what to execute."""
    app.connect("config-inited", leave_out)
    return {"parallel_read_safe": True}


def leave_out(app: Sphinx, config: Config) -> None:
    """Add the chapter to those that are not executed."""
    if find_spec("triton") is None:
        config.nb_execution_excludepatterns = [*config.nb_execution_excludepatterns, CHAPTER]
        logging.getLogger(__name__).info("%s is not executed: no Triton here", CHAPTER)
