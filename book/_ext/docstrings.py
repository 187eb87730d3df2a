"""What autodoc and napoleon do not read of the package: remarks in a section's heading, and arguments of widgets."""

from __future__ import annotations

import re

from sphinx.application import Sphinx
from sphinx.util.inspect import signature, stringify_signature

HEADING = re.compile(r"(Args|Attributes|Returns|Raises) \((.+)\):")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx; napoleon's own priority is 500, and lower ones come first."""
    app.connect("autodoc-process-docstring", take_out_remarks, priority=400)
    app.connect("autodoc-process-signature", show_own_arguments)
    return {"parallel_read_safe": True}


def take_out_remarks(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """`Attributes (all on one device):` becomes a sentence and the section `Attributes:`."""
    for index, line in reversed([*enumerate(lines)]):
        if heading := HEADING.fullmatch(line):
            remark = heading[2]
            lines[index : index + 1] = [f"{remark[0].upper()}{remark[1:]}.", "", f"{heading[1]}:"]


def show_own_arguments(
    app: Sphinx,
    what: str,
    name: str,
    thing: type,
    options: object,
    arguments: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """Those of `__init__` where a `__new__` that takes anything hides them, as traitlets' does."""
    if what == "class" and (arguments or "").startswith("(*args") and "__init__" in vars(thing):
        own = signature(thing.__init__, bound_method=True)
        arguments = stringify_signature(own, show_return_annotation=False, unqualified_typehints=True)
    return arguments, returns
