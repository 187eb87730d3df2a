"""A docstring may remark on a section in its heading, `Attributes (on one device):`, which napoleon does not read."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

HEADING = re.compile(r"(Args|Attributes|Returns|Raises) \((.+)\):")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx; napoleon's own priority is 500, and lower ones come first."""
    app.connect("autodoc-process-docstring", take_out, priority=400)
    return {"parallel_read_safe": True}


def take_out(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """The remark becomes a sentence before the section."""
    for index, line in reversed([*enumerate(lines)]):
        if heading := HEADING.fullmatch(line):
            remark = heading[2]
            lines[index : index + 1] = [f"{remark[0].upper()}{remark[1:]}.", "", f"{heading[1]}:"]
