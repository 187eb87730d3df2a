"""The widgets in a real chromium, hosted by the plain contract `render({model, el})` and nothing else."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("anywidget", reason="pip install 'headkv[widgets]'")
pytest.importorskip("playwright.sync_api", reason="pip install playwright")

from headkv.allocators import AdaptiveAllocator, UniformAllocator  # noqa: E402
from headkv.cache import RaggedLayer  # noqa: E402
from headkv.cache.ragged import MIN_HEADROOM  # noqa: E402
from headkv.methods import Prefill, plan_by_scores  # noqa: E402
from headkv.scorers import SnapKVScorer  # noqa: E402
from headkv.widgets import (  # noqa: E402
    BudgetExplorer,
    CacheBill,
    EvictionTimeline,
    HeadGrid,
    RaggedPool,
    SideBySide,
    WorkShares,
)
from headkv.widgets.base import read  # noqa: E402
from headkv.widgets.budget_explorer import HEADROOM  # noqa: E402
from headkv.widgets.work_shares import equal_shares  # noqa: E402

import axe  # noqa: E402 isort:skip
import readers  # noqa: E402 isort:skip
from conftest import computed, counting  # noqa: E402 isort:skip
from hosted import Shown, shown  # noqa: E402 isort:skip
from measured import head_map, quality_map, roofline, sparsity_dial  # noqa: E402 isort:skip


def skewed(layers: int, heads: int, m: int, *, seed: int = 0, ties: bool = False) -> np.ndarray:
    """Made-up attention: heads of different sharpness, a heavy sink, two facts that one head looks at."""
    rng = np.random.default_rng(seed)
    sharp = rng.uniform(0.4, 3, (layers, heads, 1))
    scores = np.exp(rng.normal(size=(layers, heads, m)) * sharp)
    scores[:, :, :3] *= 30
    scores[-1, 0, m // 3 : m // 3 + 8] *= 60
    scores /= scores.sum(-1, keepdims=True)
    return np.round(scores, 3) if ties else scores


@dataclass(frozen=True)
class Given:
    """A scorer with scores at hand, pooled as SnapKV's."""

    scores: torch.Tensor
    pooling: str
    kernel_size: int
    window: int
    observed_queries: int = 0

    def score(self, prefill: Prefill) -> torch.Tensor:
        if self.pooling == "none":
            return self.scores
        return SnapKVScorer(self.window or 1, self.kernel_size, self.pooling).pool(self.scores)


def kept_by_package(explorer: BudgetExplorer, **setting: Any) -> np.ndarray:
    """The masks `[layers, heads, n]` that headkv's own scorer, allocator and selection give."""
    layers, heads, m = explorer._shape
    n = m + explorer.window
    allocator = (
        AdaptiveAllocator(setting["safeguard"]) if setting["allocator"] == "adaptive" else UniformAllocator()
    )
    masks = []
    for layer in range(layers):
        empty = torch.zeros(heads, n, 4)
        prefill = Prefill(empty[:, :0], empty, empty, layer, layers, 1.0)
        scores = torch.from_numpy(np.array(explorer.scores[layer]))
        scorer = Given(scores, setting["pooling"], setting["kernel_size"], explorer.window)
        masks.append(plan_by_scores(prefill, scorer, allocator, setting["budget"]).mask.numpy())
    return np.stack(masks)


SETTINGS = [
    dict(budget=b, safeguard=s, pooling=p, kernel_size=k, allocator=a)
    for b, s, p, k, a in [
        (0.2, 0.2, "max", 7, "adaptive"),
        (0.2, 0.0, "max", 21, "adaptive"),
        (0.5, 0.35, "avg", 5, "adaptive"),
        (0.37, 0.2, "avg", 31, "uniform"),
        (0.08, 0.5, "none", 7, "adaptive"),
        (0.9, 1.0, "max", 3, "adaptive"),
        (0.61, 0.05, "none", 1, "uniform"),
        (0.02, 0.2, "max", 7, "adaptive"),
        (1.0, 0.2, "max", 7, "adaptive"),
    ]
]


@pytest.mark.parametrize(
    ("shape", "window", "ties"),
    [
        pytest.param((12, 3, 230), 16, False, id="skewed"),
        pytest.param((12, 3, 230), 16, True, id="ties"),
        pytest.param((4, 8, 101), 32, True, id="8-heads-ties"),
        pytest.param((3, 2, 40), 0, False, id="no-window"),
    ],
)
def test_the_page_keeps_what_the_package_keeps(chromium, shape, window, ties):
    explorer = BudgetExplorer(skewed(*shape, ties=ties), window=window)
    n = shape[2] + window
    with shown(chromium, explorer) as page:
        for setting in SETTINGS:
            page.set(**setting)
            kept = page.kept(shape[:2], n)
            expected = kept_by_package(explorer, **setting)
            np.testing.assert_array_equal(page.get("budgets"), expected.sum(-1), err_msg=str(setting))
            np.testing.assert_array_equal(kept, expected, err_msg=str(setting))
            assert page.state()["kept"] == np.flatnonzero(expected[0, 0]).tolist()


PLAN = """async ({ source, cases }) => {
  const address = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  const { Scores, makePlan, packKept } = await import(address);
  const view = (text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  return cases.map(({ scores, shape, exponent, ...setting }) => {
    const all = new Scores(view(scores), shape, exponent);
    const plan = makePlan(all, setting);
    return [plan.budgets[0], [...new Uint8Array(packKept(all, plan, setting).buffer)]];
  });
}"""


@pytest.mark.slow
def test_thousands_of_random_plans_are_the_packages(chromium):
    """One layer each: few heads and entries, many ties, windows wider than the budget, every setting."""
    rng = np.random.default_rng(11)
    cases, expected = [], []
    for _ in range(2000):
        shape = (1, int(rng.integers(1, 6)), int(rng.integers(1, 41)))
        scores = rng.exponential(size=shape) ** rng.choice([0.5, 1, 4])
        if rng.random() < 0.5:
            scores = np.round(scores, 1)
        explorer = BudgetExplorer(scores, window=int(rng.integers(0, 9)))
        setting = {
            "budget": round(float(rng.uniform(0.01, 1)), 2),
            "safeguard": round(float(rng.choice([0, 1, rng.random()])), 2),
            "pooling": str(rng.choice(["max", "avg", "none"])),
            "kernel_size": int(rng.integers(0, 16)) * 2 + 1,
            "allocator": str(rng.choice(["adaptive", "uniform"])),
        }
        mask = kept_by_package(explorer, **setting)[0]
        expected.append([(mask.sum(-1) - min(explorer.window, mask.sum() // shape[1])).tolist(),
                         np.packbits(mask, axis=-1).ravel().tolist()])  # fmt: skip
        kernel = setting.pop("kernel_size")
        cases.append({"scores": base64.b64encode(explorer._scores).decode(), "shape": shape,
                      "exponent": explorer._exponent, "window": explorer.window, "kernel": kernel, **setting})  # fmt: skip
    page = chromium.new_page()
    found = page.evaluate(PLAN, {"source": read("plan.js"), "cases": cases})
    page.close()
    wrong = [i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]]
    assert not wrong, (len(wrong), cases[wrong[0]], found[wrong[0]], expected[wrong[0]])


def test_by_hand_two_heads_three_slots_each(chromium):
    with shown(chromium, by_hand(budget=3)) as page:
        assert page.state()["budgets"] == [[2, 4]]
        story = page.page.locator(".hk-story").text_content()
        # Of 2: 1.60, 1.55.
        assert "80.0% of the attention" in story and "uniform budgets would hold 77.5%" in story, story
        page.page.get_by_role("radio", name="Uniform").check()
        assert page.state()["budgets"] == [[3, 3]]


def by_hand(budget: int) -> BudgetExplorer:
    scores = [[0.6, 0.2, 0.1, 0.05, 0.03, 0.02], [0.25, 0.2, 0.2, 0.15, 0.1, 0.1]]
    return BudgetExplorer(scores, budget=budget, window=0, pooling="none", head_names=["A", "B"])


def test_a_case_by_hand_shows_every_weight_and_every_step_counts(chromium):
    with shown(chromium, by_hand(budget=1)) as page:
        budget = page.page.get_by_label("Budget", exact=True)
        totals = []
        for _ in range(6):
            totals.append(sum(page.state()["budgets"][0]))
            kept = page.page.locator(".hk-weight:not(.hk-evicted-weight)").count()
            assert kept == totals[-1], "a solid bar is an entry kept, of either head"
            budget.press("ArrowRight")
        assert totals == [2, 4, 6, 8, 10, 12] and page.get("budget") == 1
        bar = page.page.get_by_role("img", name="head B, entry 3: weight .15, kept")
        assert bar.inner_text() == ".15"
        assert page.page.get_by_label("Slots given").is_visible(), "the race is open"
        assert not page.page.locator(".hk-bill").is_visible(), "a few bytes say nothing"


def test_the_bill_shows_head_room_and_in_how_many_heads_a_fact_is_whole(chromium):
    explorer = explorer_with_text()
    assert HEADROOM == MIN_HEADROOM == explorer.headroom
    with shown(chromium, explorer) as page:
        room = 6 * 3 * MIN_HEADROOM * 512
        assert f"{room / 1e3:.0f} kB more are free slots" in page.page.locator(".hk-bill-line").text_content()
        width = page.page.locator(".hk-bill-room").evaluate("(e) => Number.parseFloat(e.style.width)")
        assert width == pytest.approx(100 * MIN_HEADROOM / 120, abs=1e-3)
        for budget in (0.2, 0.5, 1.0):
            page.set(budget=budget)
            kept = page.kept((6, 3), 120)
            whole = [int(kept[..., start:end].all(-1).sum()) for start, end in ((36, 40), (70, 72))]
            note = page.page.locator(".hk-bill-note").text_content()
            assert f"Kept whole: fact 1 by {whole[0]}, fact 2 by {whole[1]} of 18 heads." in note
        assert whole == [18, 18]


def test_cells_are_told_from_the_even_share(chromium):
    with shown(chromium, explorer_with_text()) as page:
        lengths = np.array(page.state()["budgets"]).ravel()
        cells = page.page.locator("[role=gridcell]")
        for i, ratio in enumerate(lengths / lengths.mean()):
            kind = ("more-3" if ratio >= 4 else "more-2" if ratio >= 2 else "more-1" if ratio >= 1.1 else
                    "even" if ratio > 0.9 else "less-1" if ratio > 0.5 else "less-2")  # fmt: skip
            assert f"hk-{kind}" in cells.nth(i).get_attribute("class")
        page.page.get_by_role("radio", name="Attention", exact=True).check()
        assert page.page.locator("[role=gridcell].hk-against").count() == 0


def test_slider_and_bill_stay_in_sight_on_a_phone(chromium):
    with shown(chromium, explorer_with_text(), width=390) as page:
        page.page.locator(".hk-strip").scroll_into_view_if_needed()
        page.page.mouse.wheel(0, 200)
        for part in (page.page.get_by_label("Budget", exact=True), page.page.locator(".hk-bill-bar")):
            box = part.bounding_box()
            assert box["y"] >= 0 and box["y"] + box["height"] <= 300


def test_a_head_chosen_in_one_picture_is_chosen_in_all_of_its_size(chromium):
    with shown(chromium, HeadGrid(skewed(6, 3, 1)[..., 0])) as page:
        tell = """(detail) => document.dispatchEvent(new CustomEvent("headkv-selected", { detail }))"""
        page.page.evaluate(tell, {"layers": 6, "heads": 3, "selected": [4, 2]})
        assert page.get("selected") == [4, 2]
        page.page.evaluate(tell, {"layers": 5, "heads": 3, "selected": [1, 1]})
        assert page.get("selected") == [4, 2], "another grid"
        page.page.evaluate(
            "document.addEventListener('headkv-selected', (event) => (window.said = event.detail.selected))"
        )
        page.page.locator('[data-layer="2"][data-head="1"]').click()
        assert page.page.evaluate("said") == [2, 1]


def explorer_with_text() -> BudgetExplorer:
    tokens = [f" w{i}" for i in range(119)] + ["\n"]
    answers = [{"budget": 0.1, "right": 1, "asked": 3}, {"budget": 0.3, "right": 3, "asked": 3}]
    facts = [(36, 40, "a city"), (70, 72)]
    return BudgetExplorer(
        skewed(6, 3, 110), tokens=tokens, facts=facts, window=10, answers=answers, title="Try it"
    )


def test_the_budget_slider_moves_all_three_pictures(chromium):
    with shown(chromium, explorer_with_text()) as page:
        cell = page.page.locator('[data-layer="2"][data-head="1"]')
        before = (cell.get_attribute("aria-label"), page.page.locator(".hk-bill-line").text_content())
        share = page.page.locator(".hk-bill-fill").evaluate("(e) => e.style.width")
        evicted = page.page.locator(".hk-strip .hk-evicted").count()
        slider = page.page.get_by_label("Budget", exact=True)
        slider.focus()
        for _ in range(15):
            slider.press("ArrowRight")
        assert page.get("budget") == 0.35
        assert before != (cell.get_attribute("aria-label"), page.page.locator(".hk-bill-line").text_content())
        assert page.page.locator(".hk-bill-fill").evaluate("(e) => e.style.width") != share
        assert page.page.locator(".hk-strip .hk-evicted").count() < evicted
        assert page.page.locator(".hk-strip .hk-evicted").count() == 120 - len(page.state()["kept"])
        assert sum(map(sum, page.state()["budgets"])) == 6 * 3 * 42
        assert "at 30% the model answers 3 of 3 right" in page.page.locator(".hk-bill-note").text_content()
        assert page.page.evaluate("model.saves") > 0


def test_a_chosen_cell_is_chosen_everywhere(chromium):
    with shown(chromium, explorer_with_text()) as page:
        page.page.locator('[data-layer="4"][data-head="1"]').click()
        assert page.get("selected") == [4, 1]
        page.page.keyboard.press("ArrowDown")
        page.page.keyboard.press("ArrowRight")
        page.page.keyboard.press("ArrowRight")  # no fourth head: stays
        assert page.get("selected") == [5, 2]
        assert page.page.get_by_label("Layer", exact=True).input_value() == "5"
        assert page.page.locator(".hk-track-row.hk-chosen").get_attribute("data-track") == "2"
        focusable = page.page.locator('[role=gridcell][tabindex="0"]')
        assert focusable.count() == 1 and focusable.get_attribute("aria-selected") == "true"
        page.page.get_by_label("Layer", exact=True).select_option("1")
        assert page.get("selected") == [1, 2]
        page.set(selected=[3, 0])  # as from Python
        assert page.state()["selected"] == [3, 0]
        assert page.page.locator('[data-layer="3"][data-head="0"]').get_attribute("aria-selected") == "true"


def test_cells_show_the_attention_held_and_controls_can_be_left_out(chromium):
    scores = [[0.6, 0.2, 0.1, 0.05, 0.03, 0.02], [0.25, 0.2, 0.2, 0.15, 0.1, 0.1]]
    explorer = BudgetExplorer(
        scores, budget=3, window=0, pooling="none", allocator="uniform", controls=["budget", "cells"]
    )
    with shown(chromium, explorer) as page:
        page.page.get_by_role("radio", name="Attention").check()
        cells = page.page.locator("[role=gridcell]")
        assert cells.all_text_contents() == ["90%", "65%"] and page.get("cells") == "attention"
        visible = [
            e.get_attribute("data-control")
            for e in page.page.locator("[data-control]").all()
            if e.is_visible()
        ]
        assert set(visible) == {"budget", "cells", "head"}
        assert not page.page.locator("summary").is_visible()
        assert (
            page.page.locator(".hk-story")
            .text_content()
            .startswith("Uniform budgets keep 6 of 12 entries: 3 a head.")
        )


def test_the_strip_opens_at_the_first_fact(chromium):
    tokens = [f" w{i}" for i in range(900)]
    explorer = BudgetExplorer(skewed(2, 2, 890), tokens=tokens, facts=[(500, 504)], window=10)
    with shown(chromium, explorer) as page:
        page.page.wait_for_function("document.querySelector('.hk-strip').scrollTop > 0")
        for width in (900, 400):  # also when the page becomes narrower before the reader has moved
            page.page.set_viewport_size({"width": width, "height": 800})
            page.page.wait_for_function("""(width) => {
              const [strip, fact] = [".hk-strip", ".hk-strip .hk-fact"].map((name) =>
                document.querySelector(name).getBoundingClientRect());
              return innerWidth === width && strip.y < fact.y && fact.y < strip.y + strip.height / 2;
            }""", arg=width)  # fmt: skip
        page.page.locator(".hk-strip").click()
        page.page.locator(".hk-strip").evaluate("(strip) => (strip.scrollTop = 0)")
        page.page.set_viewport_size({"width": 800, "height": 800})
        page.settled(200)
        assert page.page.locator(".hk-strip").evaluate("(strip) => strip.scrollTop") == 0


def test_slots_go_one_by_one_and_can_be_paused(chromium):
    with shown(chromium, explorer_with_text()) as page:
        page.page.locator("summary").click()
        slots = page.page.get_by_label("Slots given")
        total = 3 * (24 - 10)
        page.page.wait_for_function(f"document.querySelector('[data-control=slots]').value == {total}")
        page.page.get_by_role("button", name="Restart").click()
        page.page.get_by_role("button", name="Step").click()
        assert slots.input_value() == "1"
        page.page.get_by_role("button", name="Play").click()
        page.page.wait_for_function("document.querySelector('[data-control=slots]').value > 3")
        page.page.get_by_role("button", name="Pause").click()
        paused = slots.input_value()
        page.settled(200)
        assert slots.input_value() == paused != str(total)
        assert f"{paused} of {total} slots given" in page.page.locator(".hk-race-story").text_content()


def test_head_grid_syncs_its_selection(chromium):
    grid = HeadGrid([[0.1, 0.2], [0.9, 0.3], [0.0, 0.4]], label="Induction score")
    with shown(chromium, grid) as page:
        page.page.locator('[data-layer="1"][data-head="0"]').click()
        assert page.get("selected") == [1, 0]
        assert page.page.locator(".hk-chosen-line").text_content() == "Layer 1, head 0: 0.90, number 1 of 6"
        page.page.locator("[data-rank]").nth(1).click(force=True)
        assert page.get("selected") == [2, 1]


def test_head_grid_ranks_and_sums_as_numpy_does(chromium):
    scores = skewed(5, 4, 1, seed=3)[..., 0]
    flat = scores.ravel()
    with shown(chromium, HeadGrid(scores)) as page:
        labels = page.page.locator("[role=gridcell]").evaluate_all(
            "cells => cells.map((cell) => cell.ariaLabel)"
        )
        ranks = (-flat).argsort(kind="stable").argsort() + 1
        assert [label.split(", ")[2] for label in labels] == [f"number {rank} of 20" for rank in ranks]
        held = 100 * flat.max() / flat.sum()
        assert f"The top 1 hold {held:.0f}% of the sum." in page.page.locator(".hk-rank").inner_text()


def test_less_than_nothing_is_another_colour_and_hatched(chromium):
    with shown(chromium, HeadGrid([[-0.5, 0.2], [0.0, -0.1]])) as page:
        cells = page.page.locator("[role=gridcell]")
        minus = [cells.nth(i).evaluate("(e) => e.classList.contains('hk-minus')") for i in range(4)]
        shades = [cells.nth(i).evaluate("(e) => e.style.getPropertyValue('--hk-level')") for i in range(4)]
        assert minus == [True, False, False, True] and shades == ["100.0%", "40.0%", "0.0%", "20.0%"]
        bars = page.page.locator("[data-rank]")
        spans = [tuple(float(bars.nth(i).get_attribute(k)) for k in ("y", "height")) for i in range(4)]
        zero = 100 * 0.2 / 0.7
        assert spans[0] == pytest.approx((0, zero)) and spans[3] == pytest.approx((zero, 100 - zero))


def test_kinds_are_told_apart_by_signs(chromium):
    with shown(chromium, HeadGrid([["full", "streaming"], ["streaming", "streaming"]])) as page:
        assert page.page.locator("[role=gridcell]").all_text_contents() == ["■", "□", "□", "□"]
        assert "streaming: 3 of 4 heads, 75%" in page.page.locator(".hk-kinds").text_content()


def test_cache_bill_follows_its_controls(chromium):
    with shown(chromium, CacheBill(context=1000)) as page:
        root = page.page.locator(".hk-cache-bill")
        assert root.get_attribute("data-bytes-per-token") == "46080"
        page.page.get_by_label("Model").select_option("Llama-3.1-8B")
        page.set(context=131072)
        assert root.get_attribute("data-bytes-per-token") == "131072"
        assert "17.2 GB" in page.page.locator(".hk-bill-line").text_content()
        assert "at about 122,500 tokens" in page.page.locator(".hk-story").text_content()
        page.page.get_by_label("KV heads").fill("32")
        page.page.get_by_label("KV heads").press("Enter")
        assert root.get_attribute("data-bytes-per-token") == str(4 * 131072)
        page.page.get_by_role("radio", name="int4").check()
        assert root.get_attribute("data-bytes-per-token") == str(131072)
        assert "× 0.5" in page.page.locator(".hk-formula").text_content()
        page.page.get_by_label("Layers").fill("0")
        page.page.get_by_label("Layers").press("Enter")
        assert page.get("layers") == 32 and page.page.get_by_label("Layers").input_value() == "32"


def test_cache_bill_says_what_fits_on_a_card(chromium):
    widget = CacheBill(
        layers=32, kv_heads=8, head_dim=128, dtype="bfloat16", context=8192, card_bytes=24 * 10**9
    )
    with shown(chromium, widget) as page:
        root, story = page.page.locator(".hk-cache-bill"), page.page.locator(".hk-story")
        for share in (1.0, 0.2):
            page.set(share=share)
            widget.share = share
            assert root.get_attribute("data-fits") == str(widget.tokens_that_fit)
            assert f"holds {widget.tokens_that_fit:,} tokens" in story.text_content()
        page.page.get_by_label("Texts at once").press("ArrowRight")
        page.page.get_by_label("Texts at once").press("ArrowRight")
        assert page.get("batch") == 4
        assert root.get_attribute("data-full-bytes") == str(4 * 8192 * 131072)
        assert "at about 153,200 tokens a text" in story.text_content()  # 122,532 / 0.2 / 4
        page.page.get_by_label("Card", exact=True).select_option("16.0 GB")
        assert "does not even hold the weights" in story.text_content()
        page.page.get_by_label("Card", exact=True).select_option("none")
        assert "card" not in story.text_content()
        assert not page.page.locator(".hk-curve-card").is_visible()


def test_cache_bill_knows_the_weights_of_known_models_only(chromium):
    with shown(chromium, CacheBill(context=1000)) as page:
        weights, model = page.page.locator(".hk-weights"), page.page.get_by_label("Model")
        page.page.get_by_role("radio", name="bfloat16").check()
        assert weights.is_visible() and model.input_value() == "0", "another type of cache, the same model"
        page.page.get_by_label("Layers").fill("60")
        page.page.get_by_label("Layers").press("Enter")
        assert not weights.is_visible() and model.input_value() == ""
        assert "weights" not in page.page.locator(".hk-story").text_content()
        page.page.get_by_label("Layers").fill("30")
        page.page.get_by_label("Layers").press("Enter")
        assert weights.is_visible() and page.get("weight_bytes") == 4 * 134_515_008


def test_focus_is_drawn_round_the_thumb_not_over_the_label(chromium):
    with shown(chromium, CacheBill()) as page:
        page.page.keyboard.press("Tab")
        slider = page.page.get_by_label("Context")
        slider.focus()
        assert slider.evaluate("(e) => e.matches(':focus-visible')")
        assert slider.evaluate("(e) => getComputedStyle(e).outlineStyle") == "none"


def settled(page: Shown) -> dict[str, Any]:
    page.page.wait_for_function("!model.get('state').busy")
    return page.get("state")


def test_ragged_pool_moves_as_the_cache_does(chromium):
    zeros = [torch.zeros(length, 4) for length in (3, 1, 4)]
    layer = RaggedLayer.from_rows([[(x, x) for x in zeros]], headroom=2)
    with shown(chromium, RaggedPool([3, 1, 4], headroom=2, bytes_per_entry=100)) as page:
        assert page.get("state")["capacities"] == layer.capacity.tolist() == [5, 3, 6]
        for _ in range(2):
            page.page.get_by_role("button", name="Append one token").click()
            state = settled(page)
            layer.append(torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 4))
            assert state["lengths"] == layer.length.tolist()
            assert state["capacities"] == layer.capacity.tolist()
        assert state["moved"] == 6 * 100  # three rows, twice, in place
        assert state["copied"] == (11 + 14) * 100  # all of it, twice

        page.page.get_by_role("button", name="row 0, position 2").click()
        page.page.get_by_role("button", name="row 2, position 5").click()
        page.page.get_by_role("button", name="Evict marked").press("Enter")
        state = settled(page)
        assert page.page.evaluate("document.activeElement.dataset.control") == "append", (
            "the focus is not lost"
        )
        keep = torch.ones(1, 3, 6, dtype=torch.bool)
        keep[0, 0, 1] = keep[0, 2, 5] = False
        layer.evict(keep, headroom=2)
        assert state["lengths"] == layer.length.tolist() == [4, 3, 5]
        assert state["capacities"] == layer.capacity.tolist()
        assert state["moved"] == (6 + 12) * 100


def test_ragged_pool_rewrites_only_when_full_and_trims_windows(chromium):
    pool = RaggedPool([3, 1, 4], headroom=1, windows=[(0, 0), (0, 0), (1, 2)], bytes_per_entry=1)
    with shown(chromium, pool) as page:
        page.page.get_by_role("button", name="Trim windows").click()
        assert settled(page)["lengths"] == [3, 1, 3]
        assert page.get("state")["moved"] == 2  # the recent two move down behind the sink
        page.page.get_by_role("button", name="Append one token").click()
        settled(page)
        page.page.get_by_role("button", name="Append one token").click()
        state = settled(page)
        assert state["lengths"] == [5, 3, 4]  # the windowed row was trimmed on the way
        assert state["moved"] == 2 + 3 + (4 + 2 + 3) + 3
        page.page.get_by_role("button", name="Restart").click()
        assert page.get("state")["lengths"] == [3, 1, 4] and page.get("state")["moved"] == 0


def test_ragged_pool_says_what_it_did(chromium):
    with shown(chromium, RaggedPool([3, 1, 4], headroom=2, windows=[(0, 0), (0, 0), (1, 9)])) as page:
        story = page.page.locator(".hk-story")
        append = page.page.get_by_role("button", name="Append one token")
        for _ in range(3):
            append.click()
            assert page.page.get_by_role("button", name="Evict marked").is_disabled(), "nothing is marked"
            settled(page)
        assert story.text_content() == (
            "A row was full: 14 entries moved into a new pool of 20 slots. Then 3 entries were written."
        )
        assert "its 14 slots are freed" in page.page.locator(".hk-ragged-pool").text_content()
        append.click()
        settled(page)
        assert story.text_content() == "Appended: 3 entries written, nothing else touched."
        assert "sees 1 sink + 9 recent" in page.page.locator(".hk-ragged-pool").text_content()
        gap = """row => row.getBoundingClientRect().right - row.lastElementChild.getBoundingClientRect().right"""
        rows = page.page.locator(".hk-pool-slots")
        assert all(rows.nth(i).evaluate(gap) < 8 for i in range(rows.count())), "no wider than its slots"


def test_ragged_pool_may_begin_after_some_tokens(chromium):
    with shown(chromium, RaggedPool([3, 1, 4], headroom=2, appended=3, bytes_per_entry=1)) as page:
        for _ in range(2):
            state = settled(page)
            assert (state["lengths"], state["capacities"]) == ([6, 4, 7], [7, 5, 8]), (
                "the third found rows full"
            )
            assert (state["moved"], state["copied"]) == (6 + 14 + 3, 11 + 14 + 17)
            assert "Then 3 entries were written." in page.page.locator(".hk-story").text_content()
            page.page.get_by_role("button", name="Append one token").click()
            settled(page)
            page.page.get_by_role("button", name="Restart").click()


def test_no_row_is_left_empty(chromium):
    with shown(chromium, RaggedPool([1, 2])) as page:
        page.page.get_by_role("button", name="row 0, position 1").click()
        assert page.page.get_by_role("button", name="Evict marked").is_disabled()
        assert "no row is ever left empty" in page.page.locator(".hk-story").text_content()


@pytest.mark.parametrize("lengths", [[12, 4, 16], [95321, 15034, 3814, 1740], [1] * 60 + [700]], ids=len)
def test_work_shares_cuts_as_the_package_does(chromium, lengths):
    widget = WorkShares(lengths, multiprocessors=12)
    with shown(chromium, widget) as page:
        state = page.get("state")
        assert state["shares"] == [[list(segment) for segment in own] for own in widget.shares]
        read = [sum(end - begin for _, begin, end in own) for own in state["rows"]]
        assert read == widget.by_row and state["ends"][0] == max(widget.by_row)
        page.page.get_by_label("Multiprocessors").press("ArrowRight")
        page.page.get_by_label("Row lengths").press("Home")
        state = page.get("state")
        assert page.get("multiprocessors") == 16 and len(set(state["lengths"])) == 1
        assert state["shares"] == [
            [list(segment) for segment in own] for own in equal_shares(state["lengths"], 16)
        ]
        widths = (
            "[...document.querySelectorAll('.hk-work-plot')].map((e) => e.style.getPropertyValue('--hk-end'))"
        )
        page.page.get_by_role("radio", name="Each its own").check()
        assert page.page.evaluate(widths) == ["100%", "100%"]


def two_ways(timed: bool = True) -> SideBySide:
    """Three shares, five layers of three heads, 40 entries of which nine are shown; the fact is 2 to 6."""
    rng = np.random.default_rng(7)
    columns = {}
    for name in ("Even", "Each its own"):
        lengths = np.array([[[4, 8, 12]] * 5, [[10, 20, 30]] * 5, [[40] * 3] * 5])
        kept = rng.random((3, 5, 3, 9)) < np.array([0.5, 0.9, 1.0])[:, None, None, None]
        answers = [(False, "3"), (name != "Even", "31"), (True, "316")]
        columns[name] = {"lengths": lengths, "kept": kept, "answers": answers, "right": [0, 5, 8]}
        if timed:
            columns[name]["step_ms"] = [9.876, 12.34, 30.0] if name == "Even" else [9.5, 12.0, 31.25]
    return SideBySide(
        columns, shares=[0.2, 0.5, 1.0], length=40, tokens=[f"w{i} " for i in range(9)], fact=(2, 6), asked=8,
        question="What is it?", expected="316", at=1, title="Two ways", full_step_ms=31.04 if timed else None,
    )  # fmt: skip


def test_side_by_side_shows_what_was_measured(chromium):
    widget = two_ways()
    whole = widget.whole()
    with shown(chromium, widget) as page:
        columns = page.page.locator(".hk-column")
        for at in (1, 2, 0):
            page.set(at=at)
            for c in (0, 1):
                text = columns.nth(c).inner_text()
                right, said = widget.answers[c][at]
                assert f"{'✓' if right else '✗'} {said}" in text
                assert f"kept whole by {whole[c, at]} of 15 heads" in text
                assert f"Right on {[0, 5, 8][at]} of 8" in text
        page.page.get_by_label("Kept of the cache").press("End")
        assert page.get("at") == 2 and "100% · 307 kB of 307 kB" in page.page.locator("output").inner_text()
        page.page.get_by_label("Kept of the cache").press("ArrowLeft")
        cells = page.page.locator(".hk-cell[aria-selected='true']")
        columns.nth(0).locator(".hk-cell").nth(5).click()
        assert page.get("selected") == [1, 2] and cells.all_inner_texts() == ["30", "30"]
        assert "1.5 times the even share" in cells.first.get_attribute("aria-label")
        bits = np.unpackbits(np.frombuffer(widget._kept, np.uint8).reshape(2, 3, 5, 3, -1), axis=-1, count=9)
        for c in (0, 1):
            gone = columns.nth(c).locator(".hk-evicted").all_inner_texts()
            assert [text.strip() for text in gone] == [f"w{i}" for i in np.flatnonzero(bits[c, 1, 1, 2] == 0)]


def test_side_by_side_shows_how_long_a_step_takes(chromium):
    with shown(chromium, two_ways()) as page:
        columns = page.page.locator(".hk-column")
        for at, times in enumerate([("9.88", "9.50"), ("12.3", "12.0"), ("30.0", "31.3")]):
            page.set(at=at)
            for c in (0, 1):
                assert f"{times[c]} ms a step, full cache 31.0 ms." in columns.nth(c).inner_text()
        page.page.get_by_label("Kept of the cache").press("Home")
        said = page.page.locator("[aria-live]")
        page.page.wait_for_function(
            "document.querySelector('[aria-live]').textContent.includes('9.50 ms a step')"
        )
        assert "9.88 ms a step, full cache 31.0 ms." in said.first.text_content()
    with shown(chromium, two_ways(timed=False)) as page:
        assert " ms" not in page.page.locator(".hk").inner_text()


def timeline_and_layers() -> tuple[EvictionTimeline, list[RaggedLayer]]:
    """One row keeps all, one three entries, one streams, one compensates; eight tokens follow, two trims among them."""
    zeros = torch.zeros(1, 4, 12, 2)
    layer = RaggedLayer.from_dense(zeros, zeros)
    moments = [("prefill", layer.snapshot())]
    keep = torch.zeros(1, 4, 12, dtype=torch.bool)
    keep[0, 0], keep[0, 1, [0, 3, 5]], keep[0, 2:, :2], keep[0, 2:, -3:] = True, True, True, True
    layer.evict(keep, sinks=torch.tensor([[0, 0, 2, 2]]), recent=torch.tensor([[0, 0, 3, 3]]),
                compensate=torch.tensor([[False, False, False, True]]))  # fmt: skip
    moments.append(("compression", layer.snapshot()))
    for step in range(8):
        layer.append(zeros[:, :, :1], zeros[:, :, :1])
        moments.append(("one token", layer.snapshot()))
        if step % 3 == 2:
            layer.trim()
            moments.append(("trim", layer.snapshot()))
    names = ["keeps all", "keeps its best three", "streams", "compensates"]
    words = [f"word{i} " for i in range(20)]
    timeline = EvictionTimeline(moments, tokens=words, names=names, title="Moment by moment")
    return timeline, [RaggedLayer.from_snapshot(snapshot) for _, snapshot in moments]


def test_the_timeline_shows_what_the_cache_stores(chromium):
    widget, layers = timeline_and_layers()
    with shown(chromium, widget) as page:
        state = lambda: json.loads(page.page.locator(".hk-eviction-timeline").get_attribute("data-state"))  # noqa: E731
        heights = set()
        for at, layer in enumerate(layers):
            assert state()["at"] == page.get("at") == at
            for row, kinds in enumerate(state()["rows"]):
                stored = [position for position, kind in enumerate(kinds) if kind in ("stored", "hidden")]
                assert stored == layer.row(0, row).positions.tolist()
                outside = max(0, len(stored) - 5) if layer.recent[row] else 0
                assert kinds.count("hidden") == outside
                assert kinds.count("later") == 20 - layer.seen
                dropped = "taken" if at and row == 3 else "gone"
                assert kinds.count(dropped) == layer.seen - len(stored)
                number = page.page.locator(".hk-diamond").nth(row).inner_text()
                stands = outside + int(layer.count[row]) if at and row == 3 else 0
                assert number == (f"◆ {stands}" if stands else "")
            line = page.page.locator(".hk-timeline-row").nth(2)
            assert f"{int(layer.length[2])} of {layer.seen} stored" in line.inner_text()
            assert widget.moments[at]["rows"][2]["says"] in line.inner_text()
            assert page.page.locator(".hk-timeline-text .hk-later").count() == 20 - layer.seen
            heights.add(page.page.locator(".hk-eviction-timeline").bounding_box()["height"])
            page.page.get_by_role("button", name="Step: the next moment").click()
        assert page.get("at") == len(layers) - 1, "no step behind the last"
        assert len(heights) == 1, "nothing jumps"


def test_the_timeline_goes_by_buttons_keys_and_itself(chromium):
    widget, layers = timeline_and_layers()
    with shown(chromium, widget) as page:
        moment = page.page.get_by_label("Moment", exact=True)
        moment.press("End")
        last = len(layers) - 1
        assert page.get("at") == last
        assert moment.get_attribute("aria-valuetext") == f"{last + 1} of {last + 1}: one token, 20 tokens"
        page.page.get_by_role("button", name="Back").press("Enter")
        moment.press("ArrowLeft")
        assert page.get("at") == last - 2
        page.set(at=3)  # as from Python
        assert moment.input_value() == "3"
        page.page.wait_for_function(
            "document.querySelector('[role=status]').textContent.includes('compensates: ')"
        )
        page.page.get_by_role("button", name="Restart").click()
        page.page.get_by_role("button", name="Back").click()
        assert page.get("at") == 0
        page.page.get_by_role("button", name="Play").click()
        page.page.wait_for_function("model.get('at') === 1")
        page.page.get_by_role("button", name="Pause").click()
        assert page.get("at") == 1 and page.page.evaluate("model.saves") > 5


MAKERS = {
    "BudgetExplorer": explorer_with_text,
    "HeadGrid": lambda: HeadGrid(skewed(6, 32, 1)[..., 0], title="Many heads"),
    "HeadGrid, every shade": lambda: HeadGrid(np.linspace(0, 1, 90).reshape(30, 3)),
    "HeadGrid, below zero": lambda: HeadGrid(np.linspace(-1, 0.4, 90).reshape(30, 3)),
    "BudgetExplorer, by hand": lambda: by_hand(budget=3),
    "CacheBill": CacheBill,
    "EvictionTimeline": lambda: timeline_and_layers()[0],
    "HeadMap": head_map,
    "QualityMap": quality_map,
    "RaggedPool": lambda: RaggedPool(windows=[(0, 0), (0, 0), (1, 2)]),
    "Roofline": roofline,
    "Roofline, as speed": lambda: roofline(view="speed"),
    "SideBySide": two_ways,
    "SparsityDial": sparsity_dial,
    "WorkShares": lambda: WorkShares([9000, 2000, 500, 1], title="Four rows"),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_fits_a_phone_and_can_be_read(chromium, make):
    with shown(chromium, make(), width=360) as page:
        for folded in page.page.locator("details:not([open]) > summary").all():
            folded.click()
        for theme in ("light", "dark"):
            page.page.evaluate("(theme) => (document.documentElement.dataset.theme = theme)", theme)
            assert page.page.evaluate("document.documentElement.scrollWidth") <= 360
            assert page.page.locator(".hk").evaluate("(e) => getComputedStyle(e).colorScheme") == theme
            assert axe.findings(page.page) == axe.faint(page.page) == []


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_a_finger_is_enough(chromium, make):
    with shown(chromium, make(), width=360, touch=True) as page:
        assert readers.try_controls(page.page, finger=True) == []
        assert readers.told_to_the_mouse_alone(page.page) == []
        assert readers.without_way_past(page.page) == []


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_keys_are_enough_and_stay_in_the_widget(chromium, make):
    """A notebook in command mode takes the arrows that reach it, and prevents what they do."""
    with shown(chromium, make()) as page:
        assert readers.try_controls(page.page) == []
        page.page.evaluate("() => { window.heard = []; document.body.onkeydown = (e) => heard.push(e.key); }")
        control = page.page.locator(".hk :is(input, button, [role=gridcell][tabindex='0'])").first
        control.focus()
        for key in ("ArrowRight", "ArrowDown", "Home", "Control+s", "Escape"):
            control.press(key)
        assert page.page.evaluate("heard.filter((key) => key !== 'Control')") == ["s", "Escape"]
        page.page.evaluate("window.stop()")
        assert page.page.evaluate("model.watched()") == 0, "a closed view leaves nothing running"


DEAD = """<section class="hk"><button data-control="mute">does nothing</button>
<button data-control="gone" onclick="this.disabled = true; this.append('!')">is gone</button>
<div class="hk-track" style="height: 300px; touch-action: none" onpointermove="tip.hidden = event.pointerType === 'touch'"
  onpointerdown="tip.hidden = true">hovered</div><p class="hk-tip" id="tip" hidden>Aha.</p></section>"""


def test_the_readers_complain(chromium):
    page = chromium.new_page(viewport={"width": 360, "height": 600}, has_touch=True, is_mobile=True)
    page.set_content(DEAD)
    assert readers.told_to_the_mouse_alone(page) == [".hk-track"]
    assert readers.without_way_past(page) == ["track"]
    says = ["nothing changes", "the focus is lost"]
    assert [line.split(": ")[1] for line in readers.try_controls(page)] == says
    page.close()


def test_a_key_takes_less_than_a_tenth_of_a_second(chromium):
    """From the key to the painted picture, 90 heads of 4,000 entries: computing time, as other processes cost none."""
    tokens = [f" w{i}" for i in range(4000)]
    facts = [(1500, 1504), (2500, 2505)]
    explorer = BudgetExplorer(skewed(30, 3, 3984), tokens=tokens, facts=facts, window=16)
    frames = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done())))"
    with shown(chromium, explorer) as page:
        session = counting(page.page)
        page.page.get_by_label("Budget", exact=True).focus()
        taken = []
        for _ in range(9):
            before, drawn = computed(session), page.state()
            page.page.keyboard.press("ArrowRight")
            page.page.evaluate(frames)
            taken.append(computed(session) - before)
            assert page.state() != drawn
        assert min(taken) < 0.1, taken  # not the median: a busy machine's core computes at half its speed
