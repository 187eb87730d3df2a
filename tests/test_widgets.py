"""The widgets: arguments, text alternative, and (test_widgets_browser.py) what a page does with them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest
import torch

pytest.importorskip("anywidget", reason="pip install 'headkv[widgets]'")

from headkv.cache import RaggedLayer  # noqa: E402
from headkv.widgets import (  # noqa: E402
    BudgetExplorer,
    CacheBill,
    EvictionTimeline,
    HeadGrid,
    RaggedPool,
    SideBySide,
    WorkShares,
)
from headkv.widgets.work_shares import UNIT, equal_shares  # noqa: E402

from measured import head_map, quality_map, roofline, sparsity_dial  # noqa: E402 isort:skip

STATIC = files("headkv.widgets") / "static"
SCORES = [[0.6, 0.2, 0.1, 0.05, 0.03, 0.02], [0.25, 0.2, 0.2, 0.15, 0.1, 0.1]]
EXPLORER = {"window": 2}


def side_by_side(**changes):
    """Two shares, one layer of two heads, four entries of which the last three are shown."""
    few, all_ = [[[1, 0, 0], [0, 1, 1]]], [[[1, 1, 1]] * 2]
    column = {"lengths": [[[1, 2]], [[4, 4]]], "kept": [few, all_], "answers": [(False, "1"), (True, "17")]}
    made = {
        "columns": {"even": column},
        "shares": [0.375, 1.0],
        "length": 4,
        "tokens": ["is ", "1", "7"],
        "fact": (0, 3),
        "answer": (1, 3),
        "question": "What is it?",
        "expected": "17",
    }
    made["columns"]["even"] |= {
        k: v for k, v in changes.items() if k in ("lengths", "kept", "answers", "right", "step_ms")
    }
    return SideBySide(**made | {k: v for k, v in changes.items() if k not in made["columns"]["even"]})


def zeros(rows, tokens, batch=1):
    return (torch.zeros(batch, rows, tokens, 2),) * 2


def four_rows(prompt=9, **options):
    """One row keeps all, one its best three, one streams, one compensates; five tokens follow, with two trims."""
    layer = RaggedLayer.from_dense(*zeros(4, prompt))
    moments = [("prefill", layer.snapshot())]
    keep = torch.zeros(1, 4, prompt, dtype=torch.bool)
    keep[0, 0], keep[0, 1, [0, 3, 5]], keep[0, 2:, :1], keep[0, 2:, -3:] = True, True, True, True
    windows = {"sinks": torch.tensor([[0, 0, 1, 1]]), "recent": torch.tensor([[0, 0, 3, 3]])}
    layer.evict(keep, **windows, compensate=torch.tensor([[False, False, False, True]]))
    moments.append(("compression", layer.snapshot()))
    for step in range(5):
        layer.append(*zeros(4, 1))
        moments.append(("one token", layer.snapshot()))
        if step % 2:
            layer.trim()
            moments.append(("trim", layer.snapshot()))
    names = ["keeps all", "keeps its best", "streams", "compensates"]
    return EvictionTimeline(moments, **{"names": names, **options})


def moments_of(*layers):
    return [("now", layer.snapshot()) for layer in layers]


def late_compensation():
    """What was evicted before the row began to compensate, nobody remembers."""
    layer = RaggedLayer.from_dense(*zeros(1, 6))
    layer.evict(torch.tensor([[[True, False, True, True, True, True]]]))
    first = layer.snapshot()
    layer.set_windows(1, 2, torch.tensor([[True]]))
    return EvictionTimeline([("a", first), ("b", layer.snapshot())])


ALL = [
    BudgetExplorer(SCORES),
    HeadGrid([[0.1, 0.9]]),
    CacheBill(),
    four_rows(),
    head_map(),
    quality_map(),
    RaggedPool(),
    roofline(),
    side_by_side(),
    sparsity_dial(),
    WorkShares([9, 2]),
]


@pytest.mark.parametrize(
    ("scores", "options", "error", "says"),
    [
        pytest.param([[0.1, np.nan]], {}, ValueError, "scores must be finite, got nan", id="nan"),
        pytest.param([[0.1, np.inf]], {}, ValueError, "scores must be finite, got inf", id="infinite"),
        pytest.param([[0.1, -0.2]], {}, ValueError, "scores must be at least 0", id="negative"),
        pytest.param(
            [0.1, 0.2], {}, ValueError, "scores must have 2 or 3 dimensions, got shape (2,)", id="ndim"
        ),
        pytest.param(np.zeros((2, 0, 3)), {}, ValueError, "scores must not be empty", id="empty"),
        pytest.param([["a", "b"]], {}, TypeError, "scores must be an array of numbers", id="words"),
        pytest.param(SCORES, {"tokens": ["a"]}, ValueError, "tokens must hold 8 strings, got 1", id="tokens"),
        pytest.param(
            SCORES, {"tokens": "abcdefgh"}, TypeError, "tokens must be a sequence", id="tokens-string"
        ),
        pytest.param(
            SCORES, {"budget": 0}, ValueError, "budget must be a positive int or a share", id="budget-0"
        ),
        pytest.param(SCORES, {"budget": 1.5}, ValueError, "share in (0, 1], got 1.5", id="budget-over"),
        pytest.param(SCORES, {"budget": np.nan}, ValueError, "budget must be", id="budget-nan"),
        pytest.param(
            SCORES, {"safeguard": -0.1}, ValueError, "safeguard must be a share in [0, 1]", id="safeguard"
        ),
        pytest.param(SCORES, {"kernel_size": 4}, ValueError, "kernel_size must be odd", id="even-kernel"),
        pytest.param(SCORES, {"kernel_size": 33}, ValueError, "an int in [1, 31], got 33", id="wide-kernel"),
        pytest.param(
            SCORES, {"pooling": "mean"}, ValueError, "'max', 'avg', 'none', got 'mean'", id="pooling"
        ),
        pytest.param(SCORES, {"allocator": "pyramid"}, ValueError, "'uniform', 'adaptive'", id="allocator"),
        pytest.param(
            SCORES, {"facts": [(7, 9)]}, ValueError, "facts[0] end must be an int in [8, 8]", id="fact"
        ),
        pytest.param(
            SCORES, {"selected": (1, 0)}, ValueError, "selected[0] must be an int in [0, 0]", id="select"
        ),
        pytest.param(SCORES, {"head_names": ["A"]}, ValueError, "head_names must hold 2 strings", id="names"),
        pytest.param(
            SCORES, {"answers": [{"budget": 0.2}]}, ValueError, "budget, right and asked", id="answers"
        ),
        pytest.param(
            SCORES, {"cells": "bytes"}, ValueError, "'entries', 'attention', got 'bytes'", id="cells"
        ),
        pytest.param(SCORES, {"controls": ["beta"]}, ValueError, "controls must be one of", id="controls"),
        pytest.param(SCORES, {"window": -1}, ValueError, "window must be an int of at least 0", id="window"),
    ],
)
def test_budget_explorer_refuses(scores, options, error, says):
    with pytest.raises(error, match=re.escape(says)):
        BudgetExplorer(scores, **{**EXPLORER, **options})


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        pytest.param(
            lambda: HeadGrid([1.0, 2.0]), ValueError, "values must have 2 dimensions", id="grid-ndim"
        ),
        pytest.param(lambda: HeadGrid([[np.nan]]), ValueError, "values must be finite", id="grid-nan"),
        pytest.param(
            lambda: HeadGrid([list("abcdefg")]), ValueError, "at most 6 different kinds", id="grid-kinds"
        ),
        pytest.param(
            lambda: CacheBill(layers=0), ValueError, "layers must be an int of at least 1", id="layers"
        ),
        pytest.param(
            lambda: CacheBill(batch=3),
            ValueError,
            "batch must be a power of two, 1 to 256, got 3",
            id="batch",
        ),
        pytest.param(
            lambda: CacheBill(card_bytes=-1), ValueError, "card_bytes must be an int of at least 0", id="card"
        ),
        pytest.param(
            lambda: BudgetExplorer([[1.0]], window=0, headroom=-1),
            ValueError,
            "headroom must be an int",
            id="headroom",
        ),
        pytest.param(lambda: CacheBill(dtype="fp4"), ValueError, "dtype must be one of", id="dtype"),
        pytest.param(lambda: CacheBill(share=0.0), ValueError, "share must be a share in (0, 1]", id="share"),
        pytest.param(lambda: CacheBill(context=1.5), TypeError, "context must be an int", id="context"),
        pytest.param(lambda: RaggedPool([]), ValueError, "lengths must hold 1 to 16 rows", id="no-rows"),
        pytest.param(
            lambda: RaggedPool([0]), ValueError, "lengths[0] must be an int in [1, 256]", id="empty-row"
        ),
        pytest.param(
            lambda: RaggedPool([1], windows=[]), ValueError, "windows must hold 1 pairs", id="windows"
        ),
        pytest.param(
            lambda: side_by_side(columns={}), ValueError, "columns must hold 1 to 3 ways, got 0", id="no-ways"
        ),
        pytest.param(
            lambda: side_by_side(columns={"a": {"lengths": []}}),
            ValueError,
            "must have lengths, kept",
            id="way",
        ),
        pytest.param(lambda: side_by_side(shares=[1.0, 0.5]), ValueError, "shares must rise", id="shares"),
        pytest.param(
            lambda: side_by_side(lengths=[[[1, 5]], [[4, 4]]]),
            ValueError,
            "2 grids of counts in [0, 4]",
            id="counts",
        ),
        pytest.param(
            lambda: side_by_side(kept=[[[[1, 0]] * 2]] * 2),
            ValueError,
            "must have shape [2, 1, 2, 3]",
            id="masks",
        ),
        pytest.param(
            lambda: side_by_side(answers=[(True, "7")]), ValueError, "must be 2, got 1 and 0", id="told"
        ),
        pytest.param(
            lambda: side_by_side(right=[1, 3], asked=2), ValueError, "an int in [0, 2], got 3", id="right"
        ),
        pytest.param(
            lambda: side_by_side(step_ms=[3.5]), ValueError, "step_ms of 'even' must be 2 numbers", id="times"
        ),
        pytest.param(
            lambda: side_by_side(step_ms=[3.5, -1.0]),
            ValueError,
            "step_ms of 'even' must be a number of at least 0, got -1.0",
            id="time",
        ),
        pytest.param(
            lambda: side_by_side(full_step_ms="31"),
            TypeError,
            "full_step_ms must be a number",
            id="full-time",
        ),
        pytest.param(
            lambda: side_by_side(answer=(1, 4)),
            ValueError,
            "answer end must be an int in [2, 3]",
            id="answer",
        ),
        pytest.param(lambda: side_by_side(at=2), ValueError, "at must be an int in [0, 1], got 2", id="at"),
        pytest.param(
            lambda: EvictionTimeline(moments_of(RaggedLayer.from_dense(*zeros(1, 3)))),
            ValueError,
            "moments must hold at least 2, got 1",
            id="one-moment",
        ),
        pytest.param(
            lambda: EvictionTimeline([("a", RaggedLayer.from_dense(*zeros(1, 3)))] * 2),
            TypeError,
            "moments[0] must be (name, layer.snapshot()), got RaggedLayer",
            id="no-snapshot",
        ),
        *(
            pytest.param(
                lambda shape=shape: EvictionTimeline(
                    moments_of(*[RaggedLayer.from_dense(*zeros(*shape))] * 2)
                ),
                ValueError,
                f"at most 40 tokens, got batch {shape[-1]} of {shape[0]} rows, {shape[1]} tokens",
                id=f"timeline-{name}",
            )
            for name, shape in {"rows": (9, 3, 1), "tokens": (1, 41, 1), "batch": (1, 3, 2)}.items()
        ),
        pytest.param(
            lambda: EvictionTimeline(moments_of(*(RaggedLayer.from_dense(*zeros(1, n)) for n in (4, 3)))),
            ValueError,
            "moments[1] must follow moments[0] of 1 rows and 4 tokens, got 1 rows and 3 tokens",
            id="backwards",
        ),
        pytest.param(
            late_compensation,
            ValueError,
            "row 0, must compensate for all 3 entries that it does not see, got 2",
            id="late-compensation",
        ),
        pytest.param(lambda: four_rows(tokens=["a"]), ValueError, "tokens must hold 14 strings", id="words"),
        pytest.param(lambda: four_rows(names=["a"]), ValueError, "names must hold 4 strings", id="row-names"),
        pytest.param(lambda: four_rows(at=9), ValueError, "at must be an int in [0, 8], got 9", id="moment"),
        pytest.param(lambda: WorkShares([]), ValueError, "lengths must hold 1 to 64 rows", id="nothing"),
        pytest.param(
            lambda: WorkShares([4], multiprocessors=3), ValueError, "an int in [4, 132], got 3", id="few"
        ),
    ],
)
def test_other_widgets_refuse(make, error, says):
    with pytest.raises(error, match=re.escape(says)):
        make()


@pytest.mark.parametrize("widget", ALL, ids=lambda w: type(w).__name__)
def test_text_stands_in_for_the_picture(widget):
    data, _ = widget._repr_mimebundle_()
    assert data["text/plain"] == repr(widget) == widget.describe()
    assert re.match(rf"{type(widget).__name__}: .*\d.*\.$", data["text/plain"])
    assert "application/vnd.jupyter.widget-view+json" in data


@pytest.mark.parametrize("widget", ALL, ids=lambda w: type(w).__name__)
def test_front_end_is_self_contained(widget):
    assert widget._esm.count("export default { render }") == 1
    assert not re.search(r"^\s*import\b|\bimport\(|\bfetch\(", widget._esm, re.MULTILINE)
    addresses = re.findall(r"https?://[^\s\"')]+", widget._esm + widget._css)
    assert set(addresses) <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("widget", ALL, ids=lambda w: type(w).__name__)
def test_front_end_holds_each_file_once_behind_what_it_imports(widget):
    texts = {path.name: path.read_text() for path in STATIC.glob("*.js")}
    imports = {name: set(re.findall(r'from "\./(\w+\.js)"', text)) for name, text in texts.items()}
    first = {name: text.splitlines()[0] for name, text in texts.items()}
    places = {name: widget._esm.find(line) for name, line in first.items() if line in widget._esm}
    entry = max(places, key=places.get)
    assert first[entry].startswith(f"// {type(widget).__name__}: ")
    assert {entry}.union(*(imports[name] for name in places)) == places.keys(), (
        "all that is asked for, no more"
    )
    for name in places:
        assert widget._esm.count(first[name]) == 1
        assert all(places[other] < places[name] for other in imports[name]), name


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4], ids=str)
def test_scores_travel_as_half_floats_of_any_size(scale):
    rng = np.random.default_rng(0)
    scores = rng.random((2, 3, 50)) ** 6 * scale
    travelled = BudgetExplorer(scores).scores
    assert travelled.shape == scores.shape and travelled.dtype == np.float32
    np.testing.assert_allclose(travelled, scores, rtol=2**-11, atol=scale * 2**-38)


def test_all_zero_scores_and_tensors_are_taken():
    torch = pytest.importorskip("torch")
    explorer = BudgetExplorer(torch.zeros(1, 2, 5, dtype=torch.bfloat16))
    assert (explorer.scores == 0).all() and explorer._shape == [1, 2, 5]


def test_a_profile_of_ninety_heads_fits_in_a_page():
    explorer = BudgetExplorer(np.random.default_rng(0).random((30, 3, 968)))
    assert len(explorer._scores) == 30 * 3 * 968 * 2
    assert len(json.dumps(explorer._esm)) + len(json.dumps(explorer._css)) < 100_000


@pytest.mark.parametrize(("budget", "share"), [(3, 0.5), (0.25, 0.25), (99, 1.0)], ids=str)
def test_budgets_are_counts_or_shares(budget, share):
    assert BudgetExplorer(SCORES, window=0, budget=budget).budget == share


def test_traits_set_later_are_checked_too():
    explorer = BudgetExplorer(SCORES)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        explorer.kernel_size = 2
    with pytest.raises(ValueError, match=re.escape("selected[1] must be an int in [0, 1], got 2")):
        explorer.selected = [0, 2]
    with pytest.raises(RuntimeError, match="show the widget first"):
        explorer.kept_mask()


@pytest.mark.parametrize(
    ("bill", "bytes_a_token", "full"),
    [
        pytest.param(CacheBill(context=1000), 46_080, "46,080,000 bytes", id="SmolLM2"),
        pytest.param(
            CacheBill(context=1000, dtype="int4"), 5_760, "x 0.5 bytes = 5,760 bytes a token", id="4 bits"
        ),
        pytest.param(CacheBill(context=1000, batch=4), 46_080, "184,320,000 bytes", id="four texts"),
        pytest.param(
            CacheBill(layers=32, kv_heads=8, head_dim=128, dtype="bfloat16", context=131_072),
            131_072,
            "17,179,869,184 bytes",
            id="Llama-3.1-8B",
        ),
    ],
)
def test_cache_bill_by_hand(bill, bytes_a_token, full):
    assert bill.bytes_per_token == bytes_a_token
    assert full in bill.describe()


SHARES = {
    "by hand": ([12, 4, 16], 4, 0),
    "one row": ([1000], 132, 128),
    "more programs than units": ([3, 1, 4], 9, 0),
    "many short rows": ([1] * 50 + [900], 7, 0),
    "shares that are all gap": ([1] * 50 + [900], 300, 128),
    "skewed": ([95321, 15034, 3814, 1740, 7770, 12850, 6061, 67117], 132, 0),
    "skewed, with gaps": ([95321, 15034, 3814, 1740, 7770, 12850, 6061, 67117], 132, 128),
}


@pytest.mark.parametrize(("lengths", "programs", "gap"), SHARES.values(), ids=SHARES.keys())
def test_equal_shares_serve_every_entry_once(lengths, programs, gap):
    served = equal_shares(lengths, programs, gap)
    assert len(served) == programs
    seen = [(row, entry) for own in served for row, begin, end in own for entry in range(begin, end)]
    assert seen == [(row, entry) for row, length in enumerate(lengths) for entry in range(length)]
    line = sum(-(-length // UNIT) for length in lengths) + gap // UNIT * (len(lengths) - 1)
    most = -(-line // programs) * UNIT
    times = [sum(end - begin for _, begin, end in own) + gap * (len(own) - 1) for own in served if own]
    assert max(times) <= most, "a gap is the time of one more segment"


def test_shares_are_cut_in_the_kernels_units():
    shares = pytest.importorskip("headkv_kernels.shares", reason="needs Triton: pip install triton")
    assert shares.UNIT.value == UNIT


def test_what_a_page_sends_back_is_taken():
    explorer = BudgetExplorer(SCORES, window=2)
    sent = np.packbits(np.eye(2, 8, dtype=bool), axis=-1).tobytes()
    explorer.set_state({"kept": memoryview(sent), "budgets": [[1, 1]], "selected": [0, 1]})
    assert explorer.kept == sent and explorer.selected == [0, 1]
    assert np.argwhere(explorer.kept_mask()[0]).tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("order", "kinds"),
    [(None, ["streaming", "full"]), (["full", "streaming"], ["full", "streaming"])],
    ids=str,
)
def test_kinds_keep_their_order(order, kinds):
    grid = HeadGrid([["streaming", "full"]], kinds=order)
    assert grid.kinds == kinds and grid.values == [[kinds.index("streaming"), kinds.index("full")]]


def test_anywidget_loads_only_when_a_widget_is_asked_for():
    code = (
        "import sys, headkv; headkv.widgets; assert 'anywidget' not in sys.modules; headkv.widgets.HeadGrid"
    )
    subprocess.run([sys.executable, "-c", code + "; assert 'anywidget' in sys.modules"], check=True)


def test_heads_that_keep_the_answer_whole_are_counted():
    assert side_by_side().whole().tolist() == [[1, 2]]
    assert side_by_side(answer=(0, 3)).whole().tolist() == [[0, 2]]


def test_a_step_is_told_where_it_was_timed():
    said = "SideBySide: 1 layer of 2 KV heads, 4 entries; at 38% of the bytes: even answers 1 (wrong)"
    assert side_by_side().describe() == f"{said}."
    timed = side_by_side(step_ms=[3.456, 31], full_step_ms=31.25)
    assert timed.describe() == f"{said} at 3.46 ms a step; full cache: 31.2 ms a step."


def test_what_fits_on_a_card_by_hand() -> None:
    sizes = dict(layers=32, kv_heads=8, head_dim=128, dtype="bfloat16", weight_bytes=16 * 10**9)
    assert CacheBill(**sizes).tokens_that_fit == 0, "no card"
    assert CacheBill(**sizes, card_bytes=10**9).tokens_that_fit == 0, "not even the weights"
    bill = CacheBill(**sizes, card_bytes=24 * 10**9)
    assert bill.tokens_that_fit == 8 * 10**9 // 131072
    bill.share = 0.5
    assert bill.tokens_that_fit == 8 * 10**9 * 2 // 131072


# (moment, row): stored, hidden, taken into the mean, and the words.
HAPPENED = {
    (0, 0): ([*range(9)], [], None, "0 to 8 stored"),
    (0, 3): ([*range(9)], [], None, "0 to 8 stored"),
    (1, 0): ([*range(9)], [], None, "no change"),
    (1, 1): ([0, 3, 5], [], None, "drops 1, 2, 4, 6 to 8"),
    (1, 2): ([0, 6, 7, 8], [], None, "drops 1 to 5"),
    (1, 3): ([0, 6, 7, 8], [], [1, 2, 3, 4, 5], "drops 1 to 5, into the diamond"),
    (2, 1): ([0, 3, 5, 9], [], None, "9 comes"),
    (2, 2): ([0, 6, 7, 8, 9], [6], None, "9 comes, 6 leaves the window"),
    (2, 3): ([0, 6, 7, 8, 9], [6], [*range(1, 7)], "9 comes, 6 leaves the window, into the diamond"),
    (3, 2): ([0, 6, 7, 8, 9, 10], [6, 7], None, "10 comes, 7 leaves the window"),
    (4, 0): ([*range(11)], [], None, "no change"),
    (4, 2): ([0, 8, 9, 10], [], None, "drops 6, 7"),
    (4, 3): ([0, 8, 9, 10], [], [*range(1, 8)], "drops 6, 7"),
    (8, 1): ([0, 3, 5, *range(9, 14)], [], None, "13 comes"),
    (8, 3): ([0, 10, 11, 12, 13], [10], [*range(1, 11)], "13 comes, 10 leaves the window, into the diamond"),
}


@pytest.mark.parametrize(("moment", "row"), HAPPENED, ids=str)
def test_a_timeline_tells_what_happened_to_each_row(moment, row):
    said = four_rows().moments[moment]["rows"][row]
    assert (said["stored"], said["hidden"], said["mean"], said["says"]) == HAPPENED[moment, row]


def test_a_timeline_says_the_moment_in_words():
    timeline = four_rows(at=2)
    assert timeline.describe() == (
        "EvictionTimeline: moment 3 of 9, one token, 10 tokens. Keeps all: 9 comes; stores 10 of 10. "
        "Keeps its best: 9 comes; stores 4 of 10. Streams: 9 comes, 6 leaves the window; stores 5 of 10. "
        "Compensates: 9 comes, 6 leaves the window, into the diamond; stores 5 of 10, and one entry stands for 6."
    )
    with pytest.raises(ValueError, match=re.escape("at must be an int in [0, 8], got 9")):
        timeline.at = 9
