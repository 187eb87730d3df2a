"""Digits in the book's prose: each comes from a cell, a question, a test or a source that the text names, or `STATED`.

Whole numbers under ten are words. A number is known if a cell of the page has it (as it is, or as a percentage), if a
question of the page asks for it (`test_asks.py` checks those), if a test that the paragraph names has it, or if the paragraph
tells what a cited paper says. The others are computed here once more. And of each head that the prose speaks of by its
number, a cell of the page asserts something.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from math import exp

import pytest
from chapters import BOOK, PAGES, code_cells, prose_cells

import headkv
from headkv.heads import HeadProfile
from headkv.heads.contexts import Stream

NUMBER = re.compile(r"(?<![\w.])(\d[\d,_]*(?:\.\d+)?|\.\d+)(%?)")
LEFT_OUT = (
    re.compile(r"^:::\{admonition\} In the papers?$.*?^:::$", re.DOTALL | re.MULTILINE),  # told as theirs
    re.compile(r"<!--.*?-->|<(svg|style).*?</\1>|</?\w[^>]*>", re.DOTALL),
    re.compile(r"^```\{.*?^```$", re.DOTALL | re.MULTILINE),
)
NO_CLAIMS = (
    re.compile(r"^ *(?:\d+\.|\|) ", re.MULTILINE),  # lists
    re.compile(r"\b(?:SmolLM2|Llama|LLaMA|Qwen|Gemma|Mistral|AVX|H|A)-?\d*[-\d.]*\w*(?: v[\d.]+)?"),  # names
    re.compile(r"\b(?:[Ee]xercise|[Ss]ection|[Ss]olution) [\d.]+"),
    re.compile(r"\b\d+(?: bits?| degrees|-bit)\b|\b10\^"),
    re.compile(r"\]\([^)]*\)"),
)
HEAD = re.compile(r"[Hh]ead (\d+) of layer (\d+)|[Ll]ayer (\d+),? head (\d+)")


# Weights, from its configuration.
SMOLLM2 = 49_152 * 576 + 30 * (2 * 576 * (576 + 192) + 3 * 576 * 1536 + 2 * 576) + 576
LLAMA_8B = 8_030_261_248
POOL = 4 * 4  # HeadKV by hand: four heads give half of their eight entries each


def ruler_table(number: int) -> float:
    """Documents and tokens of the README's table of RULER's tasks: (tokens, of each task, together)."""
    text = (BOOK.parent / "benchmarks" / "README.md").read_text("utf-8")
    about = re.search(r"--lengths (\d+) --count 8`.*?; the means are over (\d+)\)", text, re.DOTALL)
    assert about
    return float(about[number])


# (page, number as it is written): what it is, from somewhere else than the page.
STATED: dict[tuple[str, str], Callable[[], float]] = {
    ("cost", "12,000"): lambda: 4 * SMOLLM2 / (2 * 30 * 3 * 64 * 4),
    ("cost", "60"): lambda: LLAMA_8B / SMOLLM2,
    ("heads", "512"): lambda: HeadProfile.builtin("smollm2-induction").parameters["num_tokens"],
    ("ada_kv", "0.8"): lambda: 1 - 0.2,
    ("ada_kv", "2.2"): lambda: (1 - 0.2) * 2 + 0.2 * 3,
    ("ada_kv", "3.8"): lambda: (1 - 0.2) * 4 + 0.2 * 3,
    ("ada_kv", "32"): lambda: headkv.SnapKVScorer().window,
    ("head_kv", "32"): lambda: headkv.SnapKVScorer().window,
    ("head_kv", "6%"): lambda: 100 * Stream().recent_share,
    ("head_kv", "16"): lambda: POOL,
    ("head_kv", "15.2"): lambda: 4 + 0.7 * POOL,
    ("head_kv", "5.6"): lambda: 4 + 0.1 * POOL,
    ("head_kv", "7.2"): lambda: 4 + 0.2 * POOL,
    ("head_kv", "5.2"): lambda: 4 + 0.7 * POOL - 10,
    ("duo_attention", "4,000"): lambda: max(
        HeadProfile.builtin("smollm2-gate-published").parameters["lengths"]
    ),
    ("duo_attention", "36"): lambda: sum(range(1, 9)),  # cells of the causal square
    ("duo_attention", "300"): lambda: 300 * headkv.DuoAttention(gates(), 0.5).stored_share(300),
    ("razor_attention", "61%"): lambda: 100 * exp(-1 / 2),
    ("kvzip", "30"): lambda: gates().num_layers,
    ("kvzip", "89"): lambda: gates().scores.numel() - 1,
    ("ragged_cache", "12"): lambda: sum(n + 2 for n in (3, 1, 2)),  # and row 2's end: (3 + 2) + (1 + 2) + 4
    ("ragged_cache", "255"): lambda: 2**8 - 1,  # -127 to 127
    ("laptop", "268"): lambda: 2 * 8 * 32_768 * 128 * 4 / 1e6,
    ("does_it_work", "0.6"): lambda: 1 - 8 / 20,
    ("does_it_work", "0.11"): lambda: (8 / 20 * (1 - 8 / 20) / 20) ** 0.5,
    ("does_it_work", "30"): lambda: gates().num_layers,
    ("new_method", "3.2"): lambda: 4 * 4 / (4 + 1),
}


def gates() -> HeadProfile:
    return HeadProfile.builtin("smollm2-gate")


@cache
def numbers_of(source: str) -> set[float]:
    """The numbers in Python code, those in its strings and comments included."""
    return {value(match[1]) for match in NUMBER.finditer(source.replace("_", ""))}


def value(text: str) -> float:
    return float(text.rstrip(",_").replace(",", "").replace("_", ""))


@cache
def known(page: str) -> set[float]:
    asked = " ".join(re.findall(r"<!-- ask: (.*?) -->", (BOOK / f"{page}.md").read_text("utf-8")))
    return numbers_of("\n".join(cell.source for cell in code_cells(page))) | numbers_of(asked)


def paragraphs(page: str) -> Iterator[str]:
    for text in prose_cells(page):
        for pattern in LEFT_OUT:
            text = pattern.sub(" ", text)
        yield from re.split(r"\n\s*\n|\n(?=\||\s*(?:\d+\.|[-*]) )", text)


def unknown(page: str, paragraph: str, there: set[float]) -> Iterator[str]:
    """The numbers of a paragraph that nothing on the page vouches for."""
    if "{cite" in paragraph or "**Open.**" in paragraph:
        return
    for name in re.findall(r"`(?:tests/)?(test_\w+)(?:\.py)?`", paragraph):
        there = there | numbers_of(source_of_test(name))
    text = re.sub(r"\{\w[\w:-]*\}(?=`)", "", paragraph).replace("{,}", ",")
    text = re.sub(r"`[^`]*`", " ", text)
    for pattern in NO_CLAIMS:
        text = pattern.sub(" ", text)
    for match in NUMBER.finditer(text):
        number, percent = value(match[1]), bool(match[2])
        if number in there or (percent and any(abs(number - 100 * x) < 1e-9 for x in there)):
            continue
        if percent or number != int(number) or number >= 10:
            yield match[0].rstrip(",_")


@cache
def source_of_test(name: str) -> str:
    """A test by its name, with its cases; or all of a file of them."""
    for file in (BOOK.parent / "tests").glob("test_*.py"):
        text = file.read_text("utf-8")
        if file.stem == name:
            return text
        for node in ast.parse(text).body if f"def {name}(" in text else ():
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return "\n".join(map(ast.unparse, [*node.decorator_list, node]))
    raise AssertionError(f"no test is called {name}")


@pytest.fixture(scope="module")
def unknowns() -> list[tuple[str, str]]:
    """(page, number) of what no page vouches for."""
    return [
        (page, number)
        for page in PAGES
        for paragraph in paragraphs(page)
        for number in unknown(page, paragraph, known(page))
    ]


def test_each_number_of_the_prose_is_known(unknowns: list[tuple[str, str]]) -> None:
    """Otherwise: let a cell compute or assert it, or say in `STATED` what it is."""
    assert [found for found in unknowns if found not in STATED] == []


def test_nothing_is_stated_that_no_page_says(unknowns: list[tuple[str, str]]) -> None:
    assert [stated for stated in STATED if stated not in unknowns] == []


@pytest.mark.parametrize(("page", "number"), STATED, ids=lambda part: part)
def test_a_number_is_what_the_page_says(page: str, number: str) -> None:
    """Half a unit of the last digit that is not zero is left to rounding."""
    said, found = value(number.rstrip("%")), STATED[page, number]()
    digits = number.rstrip("%").partition(".")[2]
    unit = (
        10.0 ** -len(digits) if digits else 10 ** (len(f"{said:.0f}") - len(f"{said:.0f}".rstrip("0") or "0"))
    )
    assert abs(said - found) <= unit / 2 + 1e-9, f"{page} says {number}, and it is {found}"


@pytest.mark.parametrize("page", PAGES)
def test_a_head_that_is_named_is_checked(page: str) -> None:
    """A cell of the page asserts something that has (layer, head) in it."""
    named = set()
    for paragraph in paragraphs(page):
        for k, layer, other, head in HEAD.findall(paragraph):
            named.add((int(layer), int(k)) if layer else (int(other), int(head)))
    checked = {
        pair
        for cell in code_cells(page)
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Assert)
        for pair in pairs(node)
    }
    assert named <= checked


def pairs(node: ast.AST) -> Iterator[tuple[int, int]]:
    """The pairs of whole numbers in a piece of code."""
    for part in ast.walk(node):
        if isinstance(part, ast.Tuple) and all(isinstance(x, ast.Constant) for x in part.elts):
            yield ast.literal_eval(part)


@pytest.mark.parametrize(
    ("paragraph", "found"),
    [
        ("It is 37.5 times, 41%, 12,345 tokens, .25 or 3.", ["37.5", "41%", "12,345", ".25"]),
        (
            "$32{,}769$ in [](page_77.md), `code 78` and section 79, exercise 80 of H200 and Llama-3.1-8B",
            ["32,769"],
        ),
        ("Over 41% is saved {cite:p}`someone2024`.", []),
        ("Known: 20% of 90.", []),
    ],
)
def test_what_counts_as_a_number(paragraph: str, found: list[str]) -> None:
    assert list(unknown("", paragraph, {0.2, 90.0})) == found
