"""The pictures of profiles, caches and explanations: as HTML in a notebook, and by matplotlib."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import headkv
from headkv._grid import TITLED, grid_html, spread
from headkv.models.tiny import tiny_model

SCORES = torch.tensor([[0.0, 0.25, 0.5], [1.0, 0.125, 0.75]])
PROFILE = headkv.HeadProfile("org/Na<me", "gate", "kv", SCORES)


def filled(batch: int = 1) -> headkv.RaggedCache:
    model = tiny_model("llama")
    cache = headkv.RaggedCache.for_model(model, headkv.HeadKV(8, headkv.HeadProfile("t", "gate", "kv", torch.rand(3, 2)), scorer=headkv.SnapKVScorer(4)))  # fmt: skip
    with torch.inference_mode():
        model(torch.randint(3, 97, (batch, 40)), past_key_values=cache)
    return cache


class Page(HTMLParser):
    """Every element with its attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "br":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def shades(page: Page) -> list[float]:
    return [float(cell["fill-opacity"] or "nan") for cell in page.all("rect")]


def test_a_profile_is_shown_as_its_scores() -> None:
    page = Page(PROFILE._repr_html_())
    assert shades(page) == pytest.approx((0.04 + 0.96 * SCORES).flatten().tolist(), abs=0.005)
    places = [(int(cell["y"] or 0), int(cell["x"] or 0)) for cell in page.all("rect")]
    assert places == sorted(places) and len({y for y, _ in places}) == 2 and len({x for _, x in places}) == 3
    (drawing,) = page.all("svg")
    said = "Gate scores of org/Na<me: highest in layer 1, head 0."
    assert drawing["role"] == "img" and drawing["aria-label"] == said, "what a screen reader says"
    assert said in page.texts and "layer 1, KV head 2: 0.75" in page.texts
    assert "2 layers downward, KV heads across; the stronger, the more: 0 to 1" in page.texts


@pytest.mark.parametrize("html", [PROFILE._repr_html_(), filled()._repr_html_()], ids=["profile", "cache"])
def test_a_picture_needs_nothing_and_takes_the_pages_colours(html: str) -> None:
    page = Page(html)
    assert {tag for tag, _ in page.elements} <= {"figure", "figcaption", "svg", "title", "rect", "br"}
    names = {name for _, attributes in page.elements for name in attributes}
    assert (
        not names & {"href", "src", "onclick", "onload", "class"}
        and "url(" not in html
        and "@import" not in html
    )
    assert page.all("svg")[0]["fill"] == "currentColor" and "color:" not in html and "#" not in html


def test_a_cache_is_shown_as_its_lengths() -> None:
    cache = filled()
    page, lengths = Page(cache._repr_html_()), cache.lengths()[:, 0]
    assert shades(page) == pytest.approx(
        (0.04 + 0.96 * lengths / lengths.max()).flatten().tolist(), abs=0.005
    )
    assert f"layer 1, KV head 0: {int(lengths[1, 0])} entries" in page.texts
    both = Page(filled(2)._repr_html_())
    assert len(both.all("rect")) == 6 and any("mean of 2 sequences" in text for text in both.texts)
    empty = headkv.RaggedCache.for_model(tiny_model("llama"), headkv.FullCache())
    assert Page(empty._repr_html_()).texts == ["RaggedCache(3 layers, 0 tokens seen, 0.0 MB stored)"]


def test_an_explanation_is_shown_as_its_budgets() -> None:
    model = tiny_model("llama")
    told = headkv.PyramidKV(0.3).explain(model, 400)
    page = Page(told._repr_html_())
    assert len(page.all("rect")) == 6 and str(told) in page.texts
    assert Page(headkv.AdaKV(0.3).explain(model, 400)._repr_html_()).all("rect") == []


def test_large_grids_stay_small() -> None:
    big = grid_html(torch.rand(80, 64), "Many.", unit="", heads="head")
    assert TITLED < 80 * 64 and len(big) < 500_000
    assert int(Page(big).all("svg")[0]["height"] or 0) <= 320
    one = Page(grid_html(torch.full((1, 1), 7), "One.", unit="entries", heads="head"))
    assert shades(one) == [1.0]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([5, 5], "5"),
        ([1, 12_345], "1 to 12,345"),
        ([0.25, 0.5], "0.25 to 0.5"),
        ([1e-9, 0.12345], "0 to 0.123"),
    ],
)
def test_spread(values: list[float], text: str) -> None:
    assert spread(values) == text


# matplotlib


def test_plots_are_figures_of_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    cache = filled()
    for made, numbers in ((PROFILE.plot(), SCORES), (cache.plot(), cache.lengths()[:, 0])):
        assert isinstance(made, Figure)
        image = made.axes[0].images[0]
        assert torch.equal(torch.as_tensor(image.get_array().data), numbers)
        assert image.get_cmap().name == "cividis_r", "made for eyes that see red and green alike"
        assert (made.axes[0].get_xlabel(), made.axes[0].get_ylabel()) == ("KV head", "layer")
        made.savefig(tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 5_000
        assert made._repr_png_().startswith(b"\x89PNG"), "a notebook shows it without %matplotlib"  # type: ignore[attr-defined]
    assert cache.plot().axes[0].images[0].get_clim()[0] == 0


@pytest.mark.parametrize("thing", [PROFILE, filled()], ids=["profile", "cache"])
def test_without_matplotlib_the_line_that_installs_it_is_said(
    thing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"a plot needs matplotlib: pip install 'headkv\[plots\]'"):
        thing.plot()


def test_an_empty_cache_has_no_plot() -> None:
    with pytest.raises(RuntimeError, match="the cache is empty: run the model on a prompt first"):
        headkv.RaggedCache.for_model(tiny_model("llama"), headkv.FullCache()).plot()
