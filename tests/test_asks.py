"""Questions of the book that take an answer: each is well formed, its answer is the right one, and the page says so."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headkv.cache import RaggedLayer
from headkv.evaluation.compare import interval
from headkv.heads import HeadProfile
from headkv.widgets import SideBySide

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
NUMBER = re.compile(r"(-?[\d,_.]+)(?:\s*±\s*([\d.]+)(%?))?(?:\s+(.+))?")
CHOICES = re.compile(r"(?:\([ x]\)\s*[^()=]+)+")
ASK = re.compile(r"<!-- ask: (?:([^=\n]*?) = )?(.+?) -->")
ASKED = [
    pytest.param(page.stem, match[1] or "", match[2], match.start(), id=f"{page.stem}-{match[1] or i}")
    for page in sorted(BOOK.glob("*.md"))
    for i, match in enumerate(ASK.finditer(page.read_text(encoding="utf-8")))
]


def first_screen() -> SideBySide:
    made = json.loads((BOOK / "data" / "first_screen.json").read_text(encoding="utf-8"))
    return SideBySide(made["columns"], **made["picture"])


def share_left_needs() -> float:
    screen = first_screen()
    return 100 * min(
        share for share, (right, _) in zip(screen.shares, screen.answers[0], strict=True) if right
    )


def heads_for_half(profile: str) -> int:
    """The fewest full heads, of those that were tried, with half of the full cache's answers."""
    cells = json.loads((BOOK / "data" / "full_heads.json").read_text(encoding="utf-8"))["cells"]
    found: dict[int, list[int]] = {}
    for cell in cells:
        if cell["profile"] == f"smollm2-{profile}" and cell["length"] == 1000:
            found.setdefault(cell["heads"], []).append(2 * cell["right"] - cell["full"])
    return min(count for count, over in found.items() if sum(over) >= 0)


def times_less() -> float:
    table = json.loads((BOOK / "data" / "kernel_gpu.json").read_text(encoding="utf-8"))["table"]
    return table["26214"]["headkv"] / table["1638"]["headkv"]


def enough_beside_none() -> int:
    """The fewest of twenty whose interval lies above that of none."""
    most = interval(0, 20)[1]
    return next(n for n in range(21) if interval(n, 20)[0] > most)


def press_that_moves() -> int:
    zeros = [(torch.zeros(n, 2), torch.zeros(n, 2)) for n in (3, 1, 4)]
    layer = RaggedLayer.from_rows([zeros], headroom=2)
    for press in range(1, 9):
        pool = layer.keys
        layer.append(torch.zeros(1, 3, 1, 2), torch.zeros(1, 3, 1, 2))
        if layer.keys is not pool:
            return press
    raise AssertionError("no press moved it")


def gate(d: float, rent: float = 0.1) -> float:
    return max(0.0, 1 - rent / (2 * d))


WEIGHTS = 2 * 8_030_261_248  # Llama-3.1-8B, two bytes each
TOKEN = 2 * 32 * 8 * 128 * 2
# What a box asks to predict, from somewhere else than the box: (page, label): the number.
PREDICTED: dict[tuple[str, str], Callable[[], float]] = {
    ("index", "The left side needs"): share_left_needs,
    ("index", "Heads with the whole number"): lambda: first_screen().whole()[1, 1],
    ("cost", "About"): lambda: WEIGHTS / TOKEN,
    ("cost", "At about"): lambda: WEIGHTS / TOKEN / 0.2,
    ("duo_attention", "From token"): lambda: 2 + 3 - 1,
    ("duo_attention", "Token 6 loses token"): lambda: 6 - 3,
    ("duo_attention", "The first"): lambda: gate(1),
    ("duo_attention", "The second"): lambda: gate(0.1),
    ("duo_attention", "The third"): lambda: gate(0.01),
    ("heads", ""): lambda: int((HeadProfile.builtin("smollm2-induction").kv_scores(3, "max") > 0.5).sum()),
    ("head_kv", ""): lambda: 0,  # the chapter's next cell asserts it
    ("kernel", "Equally fast with"): lambda: 8,  # one a row
    ("ragged_cache", "The first press that moves all"): lambda: press_that_moves() - 1,  # one is done
    ("duo_attention", "The first list needs"): lambda: heads_for_half("gate-published"),
    ("duo_attention", "The best one needs"): lambda: heads_for_half("ablation"),
    ("scores", "SnapKV, unseen"): lambda: 0,  # and here
    ("what_bounds_it", "Times less"): times_less,
    ("does_it_work", "At least"): enough_beside_none,
}


@pytest.mark.parametrize(("page", "label", "answer", "at"), ASKED)
def test_an_answer_is_right(page: str, label: str, answer: str, at: int) -> None:
    text = (BOOK / f"{page}.md").read_text(encoding="utf-8")
    if answer.startswith("("):
        assert CHOICES.fullmatch(answer) and answer.count("(x)") == 1 and answer.count("( )") >= 1, answer
        return
    found = NUMBER.fullmatch(answer)
    assert found, f"neither a number nor choices: {answer}"
    value = float(re.sub("[,_]", "", found[1]))
    if at < text.find("## Exercises") or "## Exercises" not in text:
        exact = float(PREDICTED[page, label]())
        slack = float(found[2] or 0) * (abs(value) / 100 if found[3] else 1)
        assert abs(value - exact) <= slack / 10 + 1e-9, f"{page} asks for {answer}, and it is {exact}"
        return
    number = re.findall(r"^(\d)\. ", text[text.find("## Exercises") : at], re.MULTILINE)[-1]
    solution = re.search(rf'prompt_show: "Solution {number}\b.*?\n---\n(.*?)\n```', text, re.DOTALL)
    assert solution, f"{page} has no solution {number}"
    digits = re.findall(r"-?\d*\.?\d+(?:[\d_,]*\d)?", solution[1])
    assert value in {float(re.sub("[,_]", "", x)) for x in digits}, f"solution {number} does not say {answer}"


PAGE = """<!doctype html><html lang="en"><title>asks</title><style>%s</style><body>
<div class="admonition tip"><p class="admonition-title">Predict</p><p>How many?</p>
<!-- ask: About = 122,500 ±20%% tokens -->
<!-- ask: It takes = ( ) twice (x) four times -->
</div>
<div class="cell"><details><summary>The code</summary><pre>code</pre></details><div class="cell_output"><pre>result</pre></div></div>
<div class="admonition tip"><p>Which?</p>
<!-- ask: 4 of 90 -->
</div><p>No cell here.</p>
<ol><li><p>Warm-up.</p><!-- ask: Share = 0.51 -->
<!-- ask: ( ) A (x) B --></li></ol><script>%s</script>"""


@pytest.fixture
def asking(chromium: Any) -> Iterator[Any]:
    page = chromium.new_page(viewport={"width": 390, "height": 900})
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    style, script = ((BOOK / "_static" / name).read_text("utf-8") for name in ("book.css", "asks.js"))
    page.set_content(PAGE % (style, script))
    yield page
    page.close()
    assert wrong == []


def test_a_box_takes_an_answer_before_it_shows(asking: Any) -> None:
    number, choices, alone, *_ = asking.locator("form.ask").all()
    result = asking.get_by_text("result", exact=True)
    assert not result.is_visible(), "what the next cell shows waits"
    height = number.bounding_box()["height"]
    number.get_by_role("button", name="Guess").click()
    assert number.locator("output").inner_text() == "Type a number."
    number.get_by_label("About").fill("60000")
    number.get_by_label("About").press("Enter")
    assert number.locator("output").inner_text() == "✗ It is about 122,500 tokens."
    assert number.bounding_box()["height"] == height, "nothing moves"
    assert not result.is_visible(), "one question is open"
    choices.get_by_label("four times").press("Space")
    choices.get_by_role("button").press("Enter")
    assert choices.locator("output").inner_text() == "✓ Yes: four times."
    assert result.is_visible() and asking.locator(".ask-veil").count() == 0
    assert not asking.get_by_text("code", exact=True).is_visible(), "the code stays folded"
    for typed in ("100,000 tokens", "1.4e5", "130 000"):
        number.get_by_label("About").fill(typed)
        number.get_by_label("About").press("Enter")
        assert number.locator("output").inner_text() == "✓ Yes: about 122,500 tokens.", typed
    alone.get_by_label("Your guess").fill("4")
    alone.get_by_role("button").click()
    assert alone.locator("output").inner_text() == "✓ Yes: 4 of 90."


def test_a_reader_may_look_without_a_guess(asking: Any) -> None:
    asking.get_by_role("button", name="Show it without a guess").click()
    assert asking.get_by_text("result", exact=True).is_visible()


def test_an_exercise_says_right_or_not_yet(asking: Any) -> None:
    *_, number, choices = asking.locator("form.ask").all()
    says = {"0.6": "✗ Not yet. Too high.", ".5": "✗ Not yet. Too low.", "51%": "✓ Right.", "0.51": "✓ Right."}
    for typed, verdict in says.items():
        number.get_by_label("Share").fill(typed)
        number.get_by_role("button", name="Check").click()
        assert number.locator("output").inner_text() == verdict
    choices.get_by_role("button").click()
    assert choices.locator("output").inner_text() == "Choose one."
    for label, verdict in (("A", "✗ Not yet."), ("B", "✓ Right.")):
        choices.get_by_label(label, exact=True).check()
        choices.get_by_role("button").click()
        assert choices.locator("output").inner_text() == verdict
    assert asking.evaluate("document.documentElement.scrollWidth") <= 390
    names = asking.evaluate("[...document.querySelectorAll('form.ask input')].every((e) => e.labels.length)")
    assert names, "every field has a label"
