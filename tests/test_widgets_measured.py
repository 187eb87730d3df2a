"""Widgets of measured figures: what they refuse, and that a page shows what was measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("anywidget", reason="pip install 'headkv[widgets]'")
pytest.importorskip("playwright.sync_api", reason="pip install playwright")

from headkv.evaluation.profile_compare import first_heads  # noqa: E402
from headkv.widgets import SparsityDial  # noqa: E402

from hosted import shown  # noqa: E402 isort:skip
from measured import COUNTS, KINDS, LENGTHS, LISTS, dial_cells, dial_scores, sparsity_dial  # noqa: E402 isort:skip


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
