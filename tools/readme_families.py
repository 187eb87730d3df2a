"""The README's table of the models that are served, a column a release, from what `make families` found.

    python tools/readme_families.py

writes it, and the share that the README names where it compares, anew.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README, DATA = ROOT / "README.md", ROOT / "book" / "data" / "families.json"
BEGIN, END = "<!-- make families -->\n", "<!-- end -->"

Versions = dict[str, dict[str, str]]


def versions() -> Versions:
    """By release, oldest first, and family: "served", "served: " with what is not, or why it is refused."""
    found: Versions = json.loads(DATA.read_text("utf-8"))["versions"]
    return found


def table(found: Versions) -> str:
    """As Markdown."""
    rows = {
        "families tried": [len(families) for families in found.values()],
        "served": [count(families, "served") for families in found.values()],
        "of them one prompt only": [count(families, "served:") for families in found.values()],
        "refused by name": [len(families) - count(families, "served") for families in found.values()],
    }
    lines = [
        ["transformers", *found],
        ["---"] * (1 + len(found)),
        *([name, *map(str, x)] for name, x in rows.items()),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def share(found: Versions) -> str:
    """Of the newest release, in words."""
    newest = list(found.values())[-1]
    return f"{count(newest, 'served')} of {len(newest)} decoder families tried"


def count(families: dict[str, str], said: str) -> int:
    """Families of which that is said."""
    return sum(answer.startswith(said) for answer in families.values())


def written(readme: str, found: Versions) -> str:
    """The README with both."""
    before, rest = readme.split(BEGIN)
    text = before + BEGIN + table(found) + END + rest.split(END, 1)[1]
    return re.sub(r"\d+ of \d+ decoder families tried", share(found), text)


if __name__ == "__main__":
    README.write_text(written(README.read_text("utf-8"), versions()), "utf-8")
