"""Widgets of measured figures: what they refuse, and that a page shows what was measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("anywidget", reason="pip install 'headkv[widgets]'")
pytest.importorskip("playwright.sync_api", reason="pip install playwright")

from headkv.evaluation.profile_compare import first_heads  # noqa: E402
from headkv.widgets import HeadMap, QualityMap, Roofline, SparsityDial  # noqa: E402

from hosted import shown  # noqa: E402 isort:skip
from measured import (  # noqa: E402 isort:skip
    BUDGETS,
    COUNTS,
    KINDS,
    LENGTHS,
    LISTS,
    METHODS,
    ROOF,
    TASKS,
    dial_cells,
    dial_scores,
    found_cells,
    head_map,
    quality_map,
    roofline,
    sparsity_dial,
)


def cell(**changes: Any) -> dict[str, Any]:
    return {"profile": "a", "kind": "words", "length": 9, "heads": 0, "stored": 0.5, "right": 1, "full": 2,
            "asked": 3, **changes}  # fmt: skip


ENDS = [cell(), cell(heads=2)]


@pytest.mark.parametrize(
    ("profiles", "cells", "options", "error", "says"),
    [
        pytest.param(
            {}, ENDS, {}, ValueError, "profiles must hold one list of scores or more", id="no profile"
        ),
        pytest.param(
            {"a": [1.0, 2.0]}, ENDS, {}, ValueError, "scores of 'a' must have 2 dim", id="flat scores"
        ),
        pytest.param(
            {"a": [[1, 2]], "b": [[1]]}, ENDS, {}, ValueError, "scores of 'b' must be [1, 2]", id="shape"
        ),
        pytest.param(
            {"a": [[1, 2]]}, ENDS[:1], {}, ValueError, "two numbers of heads or more, got [0]", id="one"
        ),
        pytest.param(
            {"a": [[1, 2]]}, [*ENDS, {}], {}, ValueError, "cells[2] must have profile", id="no fields"
        ),
        pytest.param({"a": [[1, 2]]}, [cell(heads=3)], {}, ValueError, "cells[0] heads must be", id="heads"),
        pytest.param({"a": [[1, 2]]}, [cell(right=3)], {}, ValueError, "cells[0] right must be", id="right"),
        pytest.param({"a": [[1, 2]]}, [cell(full=4)], {}, ValueError, "cells[0] full must be", id="full"),
        pytest.param(
            {"a": [[1, 2]]}, [cell(stored=1.5)], {}, ValueError, "cells[0] stored must be", id="stored"
        ),
        pytest.param(
            {"b": [[1, 2]]}, ENDS, {}, ValueError, "cells must hold 'b', words, 9 tokens, 0", id="missing"
        ),
        pytest.param(
            {"a": [[1, 2]]}, ENDS, {"profile": "z"}, ValueError, "profile must be one of", id="profile"
        ),
        pytest.param({"a": [[1, 2]]}, ENDS, {"heads": 3}, ValueError, "heads must be", id="too many heads"),
        pytest.param({"a": [[1, 2]]}, ENDS, {"selected": (0, 2)}, ValueError, "selected[1]", id="selected"),
    ],
)
def test_the_dial_refuses(profiles: Any, cells: Any, options: Any, error: type, says: str) -> None:
    with pytest.raises(error) as raised:
        SparsityDial(profiles, cells, **options)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"), [("at", 5), ("profile", -1), ("length", 2), ("kind", "songs"), ("selected", [9, 0])]
)
def test_the_dial_refuses_what_a_page_can_not_send(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        setattr(sparsity_dial(), name, value)


def test_the_dial_says_what_it_shows() -> None:
    widget = sparsity_dial(profile="ablation", heads=9)
    right = sum(
        x["right"] for x in dial_cells() if (x["profile"], x["length"], x["heads"]) == ("ablation", 1000, 9)
    )
    assert repr(widget) == (
        "SparsityDial: 9 of 15 KV heads keep all, the highest by ablation; 64% of the bytes at 1,000 tokens: "
        f"{right} of 15 answers."
    )
    assert sparsity_dial().counts[sparsity_dial().at] == 4, "nearest to a fifth"


def test_the_page_turns_the_dial_as_the_package_does(chromium: Any) -> None:
    widget, scores = sparsity_dial(bytes_per_entry=100), dial_scores()
    with shown(chromium, widget) as page:
        for length, n in enumerate(LENGTHS):
            for p, name in enumerate(LISTS):
                for at, count in enumerate(COUNTS):
                    for kind in ("", *KINDS):
                        page.set(length=length, profile=p, at=at, kind=kind)
                        mine = [
                            x for x in dial_cells()
                            if (x["profile"], x["length"], x["heads"]) == (name, n, count)
                            and kind in ("", x["kind"])
                        ]  # fmt: skip
                        state = page.page.evaluate(
                            "JSON.parse(document.querySelector('.hk-sparsity-dial').dataset.state)"
                        )
                        assert state["keep"] == sorted(first_heads(torch.tensor(scores[name]), count))
                        assert state["right"] == sum(x["right"] for x in mine)
                        assert state["full"] == sum(x["full"] for x in mine)
                        assert state["bytes"] == round(mine[0]["stored"] * n * 15 * 100)


def test_the_dial_goes_by_keys_and_by_pointer(chromium: Any) -> None:
    with shown(chromium, sparsity_dial(heads=4)) as page:
        page.page.get_by_label("Heads that keep all").first.press("ArrowRight")
        assert page.get("at") == 3 and page.page.locator(".hk-kind-0[role=gridcell]").count() == 9
        point = page.page.locator(".hk-dot[aria-pressed=true]")
        point.press("ArrowLeft")
        point.press("Home")
        assert page.get("at") == 0
        point.press("End")
        point.press("ArrowRight")  # there is none
        assert page.get("at") == 4
        point.press("ArrowLeft")
        heights = {
            p: sum(
                x["right"] for x in dial_cells() if (x["profile"], x["length"], x["heads"]) == (name, 1000, 9)
            )
            for p, name in enumerate(LISTS)
        }
        order = sorted(heights, key=lambda p: (heights[p], -p))
        page.set(profile=order[0])
        for p in order[1:]:
            point.press("ArrowUp")
            assert page.get("profile") == p and page.get("at") == 3
        assert point.evaluate("(e) => e === document.activeElement"), "focus goes along"
        page.page.get_by_role("button", name="by lot", exact=True).click()
        assert page.get("profile") == 2
        page.page.get_by_label("Heads ordered by").select_option("gates")
        page.page.get_by_label("Tokens").select_option("2,000")
        page.page.get_by_role("radio", name="numbers").check()
        assert (page.get("profile"), page.get("length"), page.get("kind")) == (0, 1, "numbers")
        page.page.locator("summary").click()
        table = page.page.locator("table tbody tr").nth(3).locator("th, td").all_inner_texts()
        expected = [
            next(
                x["right"]
                for x in dial_cells()
                if (x["profile"], x["kind"], x["length"], x["heads"]) == (name, "numbers", 2000, 9)
            )
            for name in LISTS
        ]
        assert table == ["9", "64%", *(f"{right} of 6" for right in expected)]


def test_the_dial_says_where_the_threshold_lies(chromium: Any) -> None:
    """Equal gates: which of them keep all is said, and the number is exact."""
    gates = np.sort(dial_scores()["gates"].ravel())[::-1]
    with shown(chromium, sparsity_dial(profile="gates", heads=9)) as page:
        words = page.page.locator(".hk-stage-dial").inner_text()
        if gates[8] > gates[9]:
            assert f"a score of {gates[8]:.2f} or more; the next has {gates[9]:.2f}" in words
        else:
            equal = int((gates == gates[8]).sum())
            assert f"as {equal} heads have: among equals the earlier one is taken" in words
        page.set(at=4)
        assert "Every head keeps all." in page.page.locator(".hk-stage-dial").inner_text()


CELL = [0, 0, 0, 0, 0, 0, 10, 20, 0.5, 0.5, 0.4, 0.6, -1.0, 0.1, 3]
FOUND = {
    "models": ["m"], "questions": ["seen"], "tasks": ["t"], "lengths": [9], "methods": ["FullCache", "a"],
    "budgets": [0.5], "cells": [CELL, [*CELL[:4], 1, *CELL[5:]]],
}  # fmt: skip


def changed(at: int, value: Any) -> list[list[Any]]:
    return [[*CELL[:at], value, *CELL[at + 1 :]]]


@pytest.mark.parametrize(
    ("found", "options", "error", "says"),
    [
        pytest.param({"models": ["m"]}, {}, ValueError, "found must have models, ", id="lists"),
        pytest.param({**FOUND, "cells": []}, {}, ValueError, "got no cells", id="no cells"),
        pytest.param({**FOUND, "columns": ["x"]}, {}, ValueError, "columns must be model, ", id="columns"),
        pytest.param(
            {**FOUND, "cells": [CELL[:-1]]}, {}, ValueError, "cells[0] must have 15 values", id="short"
        ),
        pytest.param(
            {**FOUND, "cells": changed(4, 2)}, {}, ValueError, "cells[0] method must be", id="place"
        ),
        pytest.param(
            {**FOUND, "cells": changed(9, 1.5)}, {}, ValueError, "cells[0] score must be", id="score"
        ),
        pytest.param(
            {**FOUND, "cells": changed(9, None)}, {}, ValueError, "cells[0] must be finite", id="None"
        ),
        pytest.param(
            {**FOUND, "cells": changed(6, 0)}, {}, ValueError, "cells[0] must have bytes", id="bytes"
        ),
        pytest.param(
            FOUND, {"method": "b"}, ValueError, "method must be one of FullCache, a, got 'b'", id="method"
        ),
        pytest.param(FOUND, {"budget": 0.1}, ValueError, "budget must be one of 0.5, got 0.1", id="budget"),
        pytest.param(FOUND, {"uniform": ["b"]}, ValueError, "uniform must be one of", id="uniform"),
        pytest.param(
            FOUND, {"task": "all tasks"}, ValueError, "found must have a cell of what is", id="nothing"
        ),
    ],
)
def test_the_map_refuses(found: Any, options: Any, error: type, says: str) -> None:
    with pytest.raises(error) as raised:
        QualityMap(found, **options)
    assert says in str(raised.value)


def test_the_map_says_what_it_shows() -> None:
    """The first view is the question unseen, all tasks, the last method at its least budget."""
    cell = at_place(0, 2, 0, 3, 0)
    assert repr(quality_map()) == (
        "QualityMap: tiny, question unseen, all tasks, 1,000 tokens; KVzip at 10% of the entries, 150 bytes: "
        f"{cell[9]:.2f} right ({cell[10]:.2f} to {cell[11]:.2f}, 10 documents)."
    )
    widget = quality_map(question="second", task="lists", length=2000, method="AdaKV", budget=0.5)
    assert [widget.question, widget.task, widget.length, widget.method, widget.budget] == [1, 1, 1, 2, 1]
    widget.method, widget.question = 3, 1
    assert repr(widget).endswith("KVzip: not measured.")
    with pytest.raises(ValueError, match="task must be"):
        widget.task = 3


def at_place(*place: int) -> list[Any]:
    return next(cell for cell in found_cells() if cell[1:6] == list(place))


def test_the_map_shows_what_was_measured(chromium: Any) -> None:
    with shown(chromium, quality_map(budget=0.5)) as page:
        lines = "JSON.parse(document.querySelector('.hk-quality-map').dataset.state).lines"
        for question, task, length in np.ndindex(2, 3, 2):
            page.set(question=question, task=task, length=length)
            expected = [
                [
                    name,
                    [
                        cell[9]
                        for b in range(3)
                        for cell in found_cells()
                        if cell[1:6] == [question, task, length, method, b]
                    ],
                ]
                for method, name in enumerate(METHODS)
                if method
            ]
            assert page.page.evaluate(lines) == expected
            budget = 0 if question else 1  # KVzip at a half was not measured in the second turn: the nearest
            cell = at_place(question, task, length, 3, budget)
            says = page.page.locator(".hk-map-says").inner_text()
            assert says == (
                f"KVzip, {BUDGETS[budget]:.0%} kept: {cell[9]:.2f} found ({cell[10]:.2f} to {cell[11]:.2f}) with "
                f"{cell[6]:,} B of {cell[7]:,} B."
            )
            full = at_place(question, task, length, 0, 2)
            assert page.page.locator(".hk-lines-level").inner_text() == f"full cache {full[9]:.2f}"
            rows = page.page.locator(".hk-map-behind tbody tr")
            names = [row.split("\t")[0] for row in rows.all_inner_texts()]
            assert names[:3] == [*TASKS, "all tasks"] and names[-2:] == ["1,000", "2,000"]
            own = [at_place(question, t, length, 3, budget) for t in range(3)]
            found = [row.split("\t")[1] for row in rows.all_inner_texts()[:3]]
            assert found == [f"{one[9]:.2f}" for one in own]


def test_a_choice_takes_the_others_to_what_was_measured_with_it(chromium: Any) -> None:
    # The second turn was measured on lists of 2,000 tokens alone.
    cells = [cell for cell in found_cells() if cell[1] == 0 or (cell[2], cell[3]) == (1, 1)]
    with shown(chromium, quality_map(cells=cells)) as page:
        page.page.get_by_role("radio", name="a second one").check()
        assert [page.get(name) for name in ("question", "task", "length")] == [1, 1, 1]
        page.page.get_by_label("Tokens", exact=True).select_option("1,000")
        assert [page.get(name) for name in ("question", "task", "length")] == [0, 1, 0]
        assert page.page.locator(".hk-map-says").inner_text().startswith("KVzip")


def test_the_map_goes_by_keys_and_by_pointer(chromium: Any) -> None:
    with shown(chromium, quality_map()) as page:
        point = page.page.locator(".hk-dot[aria-pressed=true]")
        point.press("ArrowRight")
        assert (page.get("method"), page.get("budget")) == (3, 1)
        page.page.get_by_role("button", name="SnapKV", exact=True).click()
        assert (page.get("method"), page.get("budget")) == (1, 1)
        page.page.locator('.hk-dot[data-at="1,0"]').focus()
        page.page.keyboard.press("Enter")
        assert (page.get("method"), page.get("budget")) == (2, 0)
        page.page.get_by_role("radio", name="a second one").check()
        page.page.get_by_label("Task", exact=True).select_option("lists")
        page.page.get_by_label("Tokens", exact=True).select_option("2,000")
        assert (page.get("question"), page.get("task"), page.get("length")) == (1, 1, 1)
        page.page.locator("summary").click()
        cell = at_place(1, 1, 1, 2, 0)
        table = page.page.locator("details tbody tr").nth(2).locator("th, td").all_inner_texts()
        assert table[:2] == ["AdaKV", f"{cell[9]:.2f} (0.0 MB)"] and table[3] == ""
        page.page.wait_for_function(
            "document.querySelector('[role=status]').textContent.startsWith('AdaKV, 10%')"
        )
        assert page.page.locator(".hk-line-dotted").count() == 1


ONE, LOOK = {"a": [[1.0, 2.0]]}, [[[0.5, 0.5], [1.0, 0.0]]]


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        pytest.param(({}, LOOK, ["a", "b"]), {}, "profiles must hold one list", id="no profile"),
        pytest.param((ONE, [[0.5]], ["a"]), {}, "attention must have 3 dimensions", id="flat"),
        pytest.param(
            (ONE, [[[1.5, 0], [0, 1]]], ["a", "b"]), {}, "attention must lie in [0, 1]", id="weights"
        ),
        pytest.param(({"a": [[1.0]]}, LOOK, ["a", "b"]), {}, "scores of 'a' must be [1, 2]", id="scores"),
        pytest.param((ONE, LOOK, ["a"]), {}, "tokens must hold 2 strings, got 1", id="tokens"),
        pytest.param((ONE, LOOK, ["a", "b"]), {"kept": {"S": [[[True]]]}}, "kept of 'S' must be", id="kept"),
        pytest.param((ONE, LOOK, ["a", "b"]), {"facts": [(1, 3)]}, "facts[0] end must be", id="facts"),
        pytest.param((ONE, LOOK, ["a", "b"]), {"selected": (1, 0)}, "selected[0] must be", id="selected"),
    ],
)
def test_the_head_map_refuses(arguments: Any, options: Any, says: str) -> None:
    with pytest.raises(ValueError) as raised:
        HeadMap(*arguments, **options)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"), [("profile", 2), ("method", -2), ("method", 2), ("selected", [5, 0])]
)
def test_the_head_map_refuses_what_a_page_can_not_send(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        setattr(head_map(), name, value)


def test_the_head_map_shows_attention_and_what_is_kept_of_it(chromium: Any) -> None:
    widget = head_map()
    masks = {name: widget.kept_mask(name) for name in widget.methods}
    with shown(chromium, widget) as page:
        for layer, head in np.ndindex(5, 3):
            page.set(selected=[layer, head])
            state = page.page.evaluate("JSON.parse(document.querySelector('.hk-head-map').dataset.state)")
            look = widget.attention[layer, head]
            assert state["most"] == np.argsort(-look, kind="stable")[:4].tolist()
            assert state["lengths"] == [int(mask[layer, head].sum()) for mask in masks.values()]
            held = [look[mask[layer, head]].sum() / look.sum() for mask in masks.values()]
            assert state["held"] == pytest.approx(held, abs=2e-4)
        page.page.get_by_role("button", name="HeadKV", exact=True).click()
        assert page.get("method") == 1
        gone = page.page.locator(".hk-strip .hk-evicted").all_inner_texts()
        assert gone == [f"w{i}" for i in np.flatnonzero(~masks["HeadKV"][4, 2])]
        page.page.get_by_label("Text shows").select_option("all entries")
        assert page.get("method") == -1 and page.page.locator(".hk-strip .hk-evicted").count() == 0
        shade = "(e) => e.style.getPropertyValue('--hk-look')"
        deepest = page.page.locator(".hk-strip [data-entry]").nth(int(widget.attention[4, 2].argmax()))
        assert deepest.evaluate(shade) == "100%"
        page.page.get_by_label("Heads by").select_option("ablation")
        page.page.locator('[data-layer="4"][data-head="2"]').press("Home")
        assert (page.get("profile"), page.get("selected")) == (1, [4, 0])
        assert page.page.locator(".hk-fact").first.inner_text() == "w7 w8 w9"


def test_the_head_map_says_where_a_head_looks() -> None:
    widget = head_map(selected=(2, 1))
    best = int(widget.attention[2, 1].argmax())
    assert f"layer 2, head 1 looks most at 'w{best}'" in repr(widget)
    share = widget.attention[2, 1][widget.kept_mask("SnapKV")[2, 1]].sum() / widget.attention[2, 1].sum()
    assert f"SnapKV keeps {widget.kept_mask('SnapKV')[2, 1].sum()}, {share:.0%} of it." in repr(widget)


SIZE = {"name": "1", "bytes": 10, "operations": 10}
SIZES = [SIZE, {**SIZE, "name": "2", "operations": 20}]


@pytest.mark.parametrize(
    ("cases", "seconds", "options", "error", "says"),
    [
        pytest.param([SIZE], {"a": [1]}, {}, ValueError, "there must be two cases or more", id="one case"),
        pytest.param(SIZES, {}, {}, ValueError, "and one way, got 2 and 0", id="no way"),
        pytest.param(
            [{"name": "1"}, SIZE], {"a": [1, 1]}, {}, ValueError, "cases[0] must have name, by", id="fields"
        ),
        pytest.param(SIZES[::-1], {"a": [1, 1]}, {}, ValueError, "cases must have more and", id="order"),
        pytest.param(
            [{**SIZE, "bytes": 0}, SIZE], {"a": [1, 1]}, {}, ValueError, "cases[0] bytes must be", id="bytes"
        ),
        pytest.param(SIZES, {"a": [1]}, {}, ValueError, "seconds of 'a' must be 2, one a case", id="times"),
        pytest.param(SIZES, {"a": [1, -1]}, {}, ValueError, "seconds of 'a' must be a number", id="less"),
        pytest.param(SIZES, {"a": [1, "x"]}, {}, TypeError, "a number above 0, got 'x'", id="word"),
        pytest.param(SIZES, {"a": [None] * 2}, {}, ValueError, "'a' must hold a time, got none", id="none"),
        pytest.param(SIZES, {"a": [1, 1]}, {"bandwidth": np.inf}, ValueError, "bandwidth must", id="limit"),
        pytest.param(SIZES, {"a": [1, 1]}, {"arithmetic": True}, TypeError, "arithmetic must", id="bool"),
        pytest.param(SIZES, {"a": [1, 1]}, {"way": "b"}, ValueError, "way must be one of 'a'", id="way"),
        pytest.param(SIZES, {"a": [1, None]}, {"case": "2"}, ValueError, "case must be one of", id="case"),
        pytest.param(SIZES, {"a": [1, 1]}, {"view": "log"}, ValueError, "view must be one of", id="view"),
    ],
)
def test_the_roofline_refuses(cases: Any, seconds: Any, options: Any, error: type, says: str) -> None:
    with pytest.raises(error) as raised:
        Roofline(cases, seconds, **{**ROOF, **options})
    assert says in str(raised.value)


def test_the_roofline_by_hand() -> None:
    """1 TB/s and 40 TFLOP/s: 10.16 MB take 10.16 us, 5.12 G operations 128 us."""
    widget = roofline(case="16")
    assert widget.limits == pytest.approx([10.01e-6, 10.04e-6, 10.16e-6, 32e-6, 128e-6])
    assert repr(widget) == (
        "Roofline: ours (tokens: 16): 20.0 us, 2.0 times the limit of 10.2 us, which the bytes set."
    )
    widget = roofline(way="theirs")
    assert repr(widget) == (
        "Roofline: theirs (tokens: 256): 1.10 ms, 8.6 times the limit of 128 us, which the arithmetic sets."
    )
    widget.case = 1
    assert repr(widget) == (
        "Roofline: theirs (tokens: 4): not measured; the limit is 10.0 us, which the bytes set."
    )
    with pytest.raises(ValueError, match="way must be an int in"):
        widget.way = 2


def test_the_page_draws_the_limit_as_the_package_does(chromium: Any) -> None:
    rng = np.random.default_rng(8)
    for _ in range(6):
        work = np.sort(10 ** rng.uniform(3, 14, 5))
        cases = [
            {"name": str(i), "bytes": 10 ** rng.uniform(2, 10), "operations": x} for i, x in enumerate(work)
        ]
        options = {"bandwidth": 10 ** rng.uniform(6, 13), "arithmetic": 10 ** rng.uniform(6, 15)}
        limits = Roofline(cases, {"a": [1.0] * 5}, **options).limits
        past = rng.uniform(1, 30, 5)
        widget = Roofline(cases, {"a": list(past * limits)}, **options)
        with shown(chromium, widget) as page:
            for at in range(5):
                page.set(case=at)
                state = page.page.evaluate("JSON.parse(document.querySelector('.hk-roofline').dataset.state)")
                assert state["limits"] == pytest.approx(limits) and state["chosen"] == [0, at]
                assert state["past"] == pytest.approx(past[at])
                assert f"{past[at]:.1f} times the limit" in page.page.locator(".hk-map-says").inner_text()
            heights = page.page.evaluate(LIMIT)
            dots = page.page.locator(".hk-dot").evaluate_all("all => all.map((e) => parseFloat(e.style.top))")
            assert all(dot <= height + 1e-6 for dot, (_, height) in zip(dots, heights, strict=True)), (
                "above it"
            )
            page.set(view="speed")
            dots = page.page.locator(".hk-dot").evaluate_all("all => all.map((e) => parseFloat(e.style.top))")
            (_, first), (bend, top), (_, last) = page.page.evaluate(LIMIT)
            assert top == pytest.approx(last) and first >= top - 1e-6 and 0 <= bend <= 100
            assert all(dot >= top - 1e-6 for dot in dots), "none is faster than the flat roof"


LIMIT = """document.querySelector('polyline.hk-line-level').getAttribute('points').split(' ')
  .map((point) => point.split(',').map(Number))"""


def test_the_roofline_goes_by_keys_and_by_pointer(chromium: Any) -> None:
    with shown(chromium, roofline(case="16")) as page:
        point = page.page.locator(".hk-dot[aria-pressed=true]")
        point.press("ArrowRight")
        assert (page.get("way"), page.get("case")) == (0, 3)
        point.press("ArrowUp")
        assert (page.get("way"), page.get("case")) == (1, 4), "the fourth of those that were measured"
        page.page.get_by_role("button", name="ours", exact=True).click()
        page.page.locator('.hk-dot[data-at="0,1"]').focus()
        page.page.keyboard.press("Enter")
        assert (page.get("way"), page.get("case")) == (0, 1)
        page.set(way=1)
        assert page.page.locator(".hk-map-says").inner_text() == (
            "theirs (tokens: 1): 40.0 us, 4.0 times the limit."
        ), "where it was not measured, the nearest"
        page.page.get_by_role("radio", name="speed").check()
        assert (
            page.get("view") == "speed" and "operations a byte" in page.page.locator(".hk-lines").inner_text()
        )
        page.set(case=3)
        says = page.page.locator(".hk-map-figures").inner_text()
        assert says.startswith(
            "10.6 MB, 120 operations a byte. That is more than the 40.0 at which both limits"
        )
        assert says.endswith("4.27 TFLOP/s, 10.7% of what the machine can do.")
        page.page.locator("summary").click()
        rows = page.page.locator("details tbody tr")
        assert rows.nth(1).locator("th, td").all_inner_texts() == ["4", "10.0 us", "16.0 us (1.6 x)", ""]
        page.page.wait_for_function(
            "document.querySelector('[role=status]').textContent.startsWith('theirs (tokens: 64)')"
        )


def test_one_place_on_the_roof_needs_no_second_view(chromium: Any) -> None:
    cases = [{"name": str(n), "bytes": 1e6 * n, "operations": 4e6 * n} for n in (1, 4)]
    with shown(chromium, Roofline(cases, {"a": [1e-5, 2e-5]}, **ROOF)) as page:
        assert page.page.get_by_role("radio").count() == 0 and page.page.locator(".hk-dot").count() == 2
