"""Quality against bytes: means and intervals by hand, tables that say how the question was asked, figures, a page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from headkv.cli import main
from headkv.evaluation.report import as_text, bootstrap, cells, sections
from headkv.evaluation.report_map import as_map
from headkv.evaluation.report_page import as_html
from headkv.evaluation.report_plots import plot_needles, plot_quality, save_pictures
from headkv.evaluation.rows import SweepRow, write_rows


def row(method: str, score: float, doc_id: int, **other) -> SweepRow:
    values = {
        "model": "tiny",
        "device": "cpu",
        "versions": "headkv 0",
        "method": method,
        "parameters": f"{method}()",
        "budget": 1.0 if method == "FullCache" else 0.1,
        "question": "unseen",
        "task": "mills",
        "length": 512,
        "seed": 0,
        "doc_id": doc_id,
        "depth": doc_id / 4,
        "tokens": 500,
        "stored_share": 1.0 if method == "FullCache" else 0.1,
        "nbytes": 2_000_000 if method == "FullCache" else 300_000,
        "full_nbytes": 2_000_000,
        "max_new_tokens": 8,
        "reply": "",
        "expected": ("a",),
        "score": score,
        "log_probability": -2.0 - doc_id,
        "answer_tokens": 2,
        "divergence": 0.0 if method == "FullCache" else 0.5,
        **other,
    }
    return SweepRow(**values)


SCORES = {"mills": (1.0, 1.0, 0.0, 0.0), "harbours": (1.0, 0.5)}
ROWS = [
    row(method, 1.0 if method == "FullCache" else score, i, task=task)
    for method in ("SnapKV", "FullCache")
    for task, scores in SCORES.items()
    for i, score in enumerate(scores)
]


def test_cells_by_hand():
    full, snap = cells(ROWS)
    assert (full.method, full.score, full.interval, full.parts) == (
        *("FullCache", 1.0, (1.0, 1.0)),
        {"mills": 1.0, "harbours": 1.0},
    )
    assert snap.parts == {"mills": 0.5, "harbours": 0.75} and snap.documents == 6
    assert snap.score == 0.625, "tasks count alike, however many documents they have"
    assert snap.log_probability == pytest.approx(((-2 - 1.5) / 2 + (-2 - 0.5) / 2) / 2)
    assert (snap.nbytes, snap.full_nbytes, snap.stored_share, snap.divergence) == (3e5, 2e6, 0.1, 0.5)
    assert 0 < snap.interval[0] < 0.625 < snap.interval[1] <= 1


def test_depths_are_quarters():
    _, snap = cells([x for x in ROWS if x.task == "mills"], "depth")
    assert snap.parts == {"0% to 25%": 1.0, "25% to 50%": 1.0, "50% to 75%": 0.0, "75% to 100%": 0.0}
    assert cells([row("SnapKV", 1.0, 0, depth=None)], "depth") == []
    (last,) = cells([row("SnapKV", 1.0, 0, depth=1.0)], "depth")
    assert list(last.parts) == ["75% to 100%"]


def test_lengths_are_in_order():
    (cell,) = cells([row("SnapKV", 1.0, 0, length=n) for n in (4096, 512)], "length")
    assert list(cell.parts) == ["512 tokens", "4096 tokens"]


def test_the_bootstrap_is_that_of_a_binomial():
    """60 of 100 right: the share's deviation is the root of .6 x .4 / 100; the ends are quantiles of 2,000 draws."""
    low, high = bootstrap([[1.0] * 60 + [0.0] * 40])
    assert (low, high) == pytest.approx((0.6 - 1.96 * 0.049, 0.6 + 1.96 * 0.049), abs=0.015)
    assert bootstrap([[1.0] * 60 + [0.0] * 40]) == (low, high)
    two = bootstrap([[1.0] * 60 + [0.0] * 40] * 2)
    assert two[1] - two[0] == pytest.approx((high - low) / 2**0.5, rel=0.1), "the mean of two parts is surer"


def test_every_table_says_how_the_question_was_asked():
    rows = [row("SnapKV", 1.0, i, question=way) for way in ("seen", "unseen", "second") for i in range(2)]
    titles = [title for title, _ in sections(rows)]
    assert titles == [
        f"tiny, question {way}, 512 tokens, 2 documents a row" for way in ("seen", "unseen", "second")
    ]
    lines = as_text(ROWS).splitlines()
    assert lines[0] == "tiny, question unseen, 512 tokens, 6 documents a row"
    assert re.split(r"\s{2,}", lines[4])[:8] == [
        "SnapKV",
        "0.1",
        "0.30",
        "15.0%",
        "10.0%",
        "0.50",
        "0.75",
        "0.62",
    ]


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ("colour", "by must be one of 'task', 'length', 'depth', 'seed', got 'colour'"),
        ("depth", "with a depth"),
    ],
)
def test_parts_that_are_not_there(by, message):
    with pytest.raises(ValueError, match=message):
        sections([row("SnapKV", 1.0, 0, depth=None)], by)


@pytest.mark.parametrize("plot", [plot_quality, plot_needles], ids=["quality", "needles"])
def test_pictures_light_and_dark(plot, tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'headkv[plots]'")
    from matplotlib.image import imread

    light, dark = (
        imread(path) for path in save_pictures(tmp_path / "found.png", lambda dark: plot(ROWS, dark=dark))
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found-dark.png", "found.png"]
    assert light.shape == dark.shape and light[0, 0, :3].mean() > 0.9 and dark[0, 0, :3].mean() < 0.2


def test_a_needle_map_by_hand():
    pytest.importorskip("matplotlib", reason="pip install 'headkv[plots]'")
    rows = [row("SnapKV", x, i, length=n) for n, x in ((512, 1.0), (1024, 0.0)) for i in range(3)]
    axis = plot_needles([*rows, row("SnapKV", 0.0, 0, seed=1), row("SnapKV", 1.0, 9, depth=None)]).axes[0]
    (image,) = axis.images
    assert image.get_array().filled(-1).tolist() == [[0.5, 0.0], [1.0, 0.0], [1.0, 0.0], [-1, -1]]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["512", "1024"]
    with pytest.raises(ValueError, match="rows must have at least one with a depth, got 1 without"):
        plot_needles([row("SnapKV", 1.0, 9, depth=None)])


def test_the_page_stands_alone():
    pytest.importorskip("matplotlib", reason="pip install 'headkv[plots]'")
    page = as_html([*ROWS, row("<b>", 1.0, 0)])
    tags: list[tuple[str, dict[str, str | None]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append((tag, dict(attrs)))

    Reader().feed(page)
    links = [
        str(value) for _, names in tags for name, value in names.items() if name in ("src", "srcset", "href")
    ]
    assert len(links) == 2 and all(link.startswith("data:image/png;base64,") for link in links)
    assert "&lt;b&gt;" in page and not any(tag == "b" for tag, _ in tags)
    assert "question unseen" in page and "headkv 0 on cpu" in page


def test_the_map_has_every_cell_and_all_tasks_together():
    more = [*ROWS, row("SnapKV", 0.25, 0, length=1024, question="seen", budget=0.5)]
    found = json.loads(json.dumps(as_map(more, "headkv report x")))
    assert (found["methods"], found["tasks"], found["budgets"]) == (
        *(["FullCache", "SnapKV"], ["mills", "harbours"]),
        [0.1, 0.5, 1.0],
    )
    by_place = {
        tuple(cell[:6]): dict(zip(found["columns"][6:], cell[6:], strict=True)) for cell in found["cells"]
    }
    assert len(by_place) == len(found["cells"]) == 2 * 3 + 1
    one, _, every = (by_place[0, 0, task, 0, 1, 0] for task in range(3))
    assert (one["score"], one["documents"], every["score"], every["documents"]) == (0.5, 4, 0.625, 6)
    (snap,) = (cell for cell in cells(ROWS) if cell.method == "SnapKV")
    assert (every["low"], every["high"]) == tuple(round(x, 3) for x in snap.interval)
    assert (every["bytes"], every["full_bytes"], every["entries"]) == (300_000, 2_000_000, 0.1)
    assert by_place[0, 1, 0, 1, 1, 1]["score"] == 0.25
    assert found["made_by"] == [
        "headkv eval --model tiny --method SnapKV --budget 0.1 --tasks mills harbours --lengths 512 "
        "--question unseen --seed 0 --limit 4 --new-tokens 8",
        "headkv eval --model tiny --method SnapKV --budget 0.5 --tasks mills --lengths 1024 "
        "--question seen --seed 0 --limit 1 --new-tokens 8",
    ]
    with pytest.raises(ValueError, match="rows must hold one or more"):
        as_map([], "")


def test_the_command(tmp_path, capsys):
    write_rows(tmp_path / "a.parquet", ROWS[:4])
    write_rows(tmp_path / "b.parquet", ROWS[2:])
    files = [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")]
    assert main(["report", *files]) == 0
    assert capsys.readouterr().out.rstrip("\n") == as_text(ROWS)
    assert main(["report", *files, "--json", "--by", "length"]) == 0
    assert list(json.loads(capsys.readouterr().out).values())[0][1]["512 tokens"] == "0.58"
    assert main(["report", *files, "--cells", str(tmp_path / "map.json")]) == 0
    found = json.loads((tmp_path / "map.json").read_text("utf-8"))
    assert found == as_map(ROWS, f"headkv report {' '.join(files)} --cells {tmp_path / 'map.json'}")
    assert main(["report", str(tmp_path / "c.parquet")]) == 2
    assert "headkv report: FILE must be what headkv eval wrote" in capsys.readouterr().err
