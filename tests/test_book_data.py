"""Data files of the book: made with what ships, and as the text says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import first_screen as tool
import pytest
import readme_families
import readme_picture
from packaging.version import Version

from headkv.models.tuned import tuned_weights

DATA = Path(__file__).resolve().parents[1] / "book" / "data"


@pytest.fixture(scope="module")
def first_screen() -> dict:
    return json.loads((DATA / "first_screen.json").read_text("utf-8"))


def test_first_screen_is_of_the_weights_that_ship(first_screen):
    """Otherwise: python tools/first_screen.py --texts 12 --out book/data/first_screen.json."""
    assert first_screen["weights"] == hashlib.sha256(tuned_weights().read_bytes()).hexdigest()


def test_first_screen_holds_what_the_page_says(first_screen):
    """The full cache has all twelve, both columns the same bytes, some heads fifty times as much as others."""
    assert [text["full"][0] for text in first_screen["texts"]] == [True] * 12
    tenth = first_screen["picture"]["shares"].index(0.1)
    even, own = (column["lengths"][tenth] for column in first_screen["columns"].values())
    totals = [sum(map(sum, lengths)) for lengths in (even, own)]
    assert totals[0] == totals[1]
    assert len({row for layer in even for row in layer}) == 1
    assert max(map(max, own)) >= 50 * min(map(min, own))
    wrong, right = (column["answers"][tenth][0] for column in first_screen["columns"].values())
    assert (wrong, right) == (False, True)


def test_first_screen_holds_the_times_of_a_step(first_screen):
    """Otherwise: python tools/first_screen.py --times --out book/data/first_screen.json."""
    assert first_screen["times"]["device"] == "CPU, 2 threads", "as the page says"
    full = first_screen["picture"]["full_step_ms"]
    for column in first_screen["columns"].values():
        assert len(column["step_ms"]) == len(first_screen["picture"]["shares"])
        assert min(column["step_ms"]) > full / 3, "the page says that they move less than the bytes"
        assert column["step_ms"][-1] == pytest.approx(full, rel=0.2), "all of the cache"


def test_times_are_not_added_to_a_file_of_other_weights(first_screen, tmp_path, monkeypatch, capsys):
    file = tmp_path / "other.json"
    file.write_text(json.dumps(first_screen | {"weights": "0"}), "utf-8")
    before = file.read_bytes()
    monkeypatch.setattr("sys.argv", ["first_screen.py", "--times", "--out", str(file)])
    with pytest.raises(SystemExit):
        tool.main()
    assert "must be of the weights that ship" in capsys.readouterr().err and file.read_bytes() == before


def test_the_readme_shows_the_first_screen(first_screen):
    """Otherwise: python tools/readme_picture.py."""
    assert readme_picture.PICTURE.read_text("utf-8") == readme_picture.draw(first_screen)
    readme = (readme_picture.BOOK.parent / "README.md").read_text("utf-8")
    assert readme_picture.PICTURE.relative_to(readme_picture.BOOK.parent).as_posix() in readme


def test_the_readme_says_which_families_are_served():
    """Otherwise: make families, or python tools/readme_families.py."""
    readme, found = readme_families.README.read_text("utf-8"), readme_families.versions()
    assert readme == readme_families.written(readme, found)
    assert readme_families.share(found) in readme and list(found) == sorted(found, key=Version)
    newest = list(found.values())[-1]
    assert all(
        newest[name] == "served" for name in ("qwen3_next", "falcon_h1", "lfm2", "nemotron_h", "zamba2")
    )
    assert all(newest[name].startswith("served: ") for name in ("jamba", "zamba"))
