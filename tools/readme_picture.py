"""The README's picture: what each of SmolLM2's heads keeps of one text, from the book's first screen.

    python tools/readme_picture.py

writes `book/images/which_head.svg` from `book/data/first_screen.json`: both sides at a tenth of the cache, a bar a
head, and under each what the model then answers.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

BOOK = Path(__file__).resolve().parents[1] / "book"
PICTURE = BOOK / "images" / "which_head.svg"
SHARE, STEP, HEIGHT, GAP = 0.1, 4.4, 120, 44
STYLE = (
    "text{font:14px system-ui,sans-serif;fill:#1f2328}.quiet{fill:#59636e;font-size:12.5px}.name{font-weight:600}"
    "rect{fill:#0a7d91}path{stroke:#59636e;opacity:.5}"
    "@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.quiet{fill:#9198a1}rect{fill:#4cc2d8}}"
)


def panel(left: float, name: str, lengths: list[int], length: int, answer: tuple[bool, str]) -> str:
    """A title, a bar for each head, and the answer; `lengths` in order of layers and heads."""
    right, said = answer
    top, wide = 84, STEP * len(lengths)
    bars = "".join(
        f'<rect x="{left + STEP * i:.1f}" y="{top + HEIGHT * (1 - n / length):.1f}" width="{STEP - 1:.1f}"'
        f' height="{HEIGHT * n / length:.1f}"/>'
        for i, n in enumerate(lengths)
    )
    spread = f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else f"{lengths[0]}"
    return (
        f'<text class="name" x="{left}" y="74">{escape(name)}</text>{bars}'
        f'<path d="M{left} {top + HEIGHT}h{wide:.0f}"/>'
        f'<text class="quiet" x="{left}" y="{top + HEIGHT + 18}">{len(lengths)} heads, first layer to last: '
        f"{spread} of {length} entries</text>"
        f'<text x="{left}" y="{top + HEIGHT + 42}">{"✓" if right else "✗"} answers {escape(said)}</text>'
    )


def draw(made: dict[str, Any]) -> str:
    """The picture as SVG, light and dark."""
    shown = made["picture"]
    at = shown["shares"].index(SHARE)
    panels, left = "", 16.0
    for name, column in made["columns"].items():
        lengths = [n for layer in column["lengths"][at] for n in layer]
        panels += panel(left, name, lengths, shown["length"], column["answers"][at])
        left += STEP * len(lengths) + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left - GAP + 16:.0f} 250" role="img">'
        f"<style>{STYLE}</style>"
        '<text class="quiet" x="16" y="20">A tenth of the cache is kept. Only then somebody asks:</text>'
        f'<text x="16" y="42">{escape(shown["question"])}</text>{panels}</svg>\n'
    )


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(json.loads((BOOK / "data" / "first_screen.json").read_text("utf-8"))), "utf-8")
