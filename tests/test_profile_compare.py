"""Profiles compared: counts on held-out needles, rank correlation and overlap, the table, the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from headkv.cli import main
from headkv.evaluation.profile_compare import (
    Cell,
    compare_profiles,
    first_heads,
    overlap,
    plot_cells,
    rank_correlation,
)
from headkv.heads import HeadProfile
from headkv.models import load_smollm2, tiny_model


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [2, 1, 4, 3], 0.6),
        ([1, 1, 2, 3], [1, 1, 2, 3], 1.0),
        ([1, 1, 2], [1, 2, 3], 0.866),  # ranks .5 .5 2 and 0 1 2
    ],
    ids=["same", "reversed", "swapped", "ties", "ties-against-none"],
)
def test_rank_correlation(first: list[int], second: list[int], expected: float) -> None:
    one, two = (torch.tensor(scores, dtype=torch.float32) for scores in (first, second))
    assert rank_correlation(one, two) == pytest.approx(expected, abs=1e-3)


def test_overlap_and_the_order_of_equal_heads() -> None:
    one, two = torch.tensor([[0.0, 3.0], [3.0, 1.0]]), torch.tensor([[2.0, 0.0], [3.0, 2.0]])
    assert first_heads(one, 3) == [1, 2, 3] and first_heads(two, 3) == [2, 0, 3]
    assert [overlap(one, two, k) for k in (1, 2, 3, 4)] == [0, 0.5, pytest.approx(2 / 3), 1]


def test_the_picture_has_a_panel_a_kind_and_length_and_a_line_a_profile() -> None:
    cells = [
        Cell(name, "words", length, heads, 0.1, heads, 9, 12)
        for name in ("a", "b")
        for length in (100, 200)
        for heads in (3, 9)
    ]
    axes = plot_cells(cells).axes
    assert [axis.get_title() for axis in axes] == ["words, 100 tokens", "words, 200 tokens"]
    for axis in axes:
        assert [list(line.get_ydata()) for line in axis.lines] == [[1 / 3, 1], [1 / 3, 1]]


def test_a_profile_of_another_model_and_too_many_heads_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="profile must fit the model"):
        compare_profiles(model, None, {"gate": HeadProfile.builtin("smollm2-gate")}, heads=(2,))
    with pytest.raises(ValueError, match="heads must be between 0 and 6, got 7"):
        compare_profiles(model, None, {}, heads=(7,))


@pytest.mark.slow
def test_all_heads_are_the_full_cache_and_the_best_head_alone_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command on one text of 300 tokens: 90 heads are right wherever the full cache is."""
    model, _ = load_smollm2()
    scores = HeadProfile.builtin("smollm2-ablation").scores
    HeadProfile(model.config._name_or_path, "ablation", "kv", -scores).save(tmp_path / "worst.json")
    picture = tmp_path / "answers.png"
    command = [
        "profile",
        "compare",
        "smollm2-ablation",
        str(tmp_path / "worst.json"),
        "--heads",
        "0",
        "27",
        "90",
    ]
    options = ["--lengths", "300", "--kinds", "numbers", "--texts", "1", "--seed", "1"]
    assert main([*command, *options, "--json", "--picture", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    right = {(cell["profile"], cell["heads"]): cell["right"] for cell in found["cells"]}
    full, asked = found["cells"][0]["full"], found["cells"][0]["asked"]
    assert 1 <= full <= asked == 2
    assert right["smollm2-ablation", 90] == right["worst", 90] == full
    assert right["smollm2-ablation", 27] >= right["worst", 27] == right["worst", 0] == 0
    stored = {cell["heads"]: cell["stored"] for cell in found["cells"]}
    assert stored[90] == 1 and stored[0] == pytest.approx(34 / 300, abs=0.02) and stored[0] < stored[27] < 1
    (pair,) = found["pairs"]
    assert pair["rank_correlation"] == pytest.approx(-1) and pair["overlap"]["90"] == 1
    assert picture.stat().st_size > 5000
    assert main([*command, *options]) == 0
    shown = capsys.readouterr().out
    assert f"numbers, 300 tokens: share of the {full} that the full cache has right, of 2" in shown
    assert "smollm2-ablation and worst: rank correlation -1.00" in shown
