"""The experiments that ask whether the model is to blame: their small path, and that what they turn is turned."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from letters import letters
from prefills import prefill

import headkv
from headkv.allocators import AdaptiveAllocator
from headkv.evaluation.harness import Sample
from headkv.methods import CriticalKV
from headkv.models.tiny import tiny_model
from headkv.scorers import KeyDiffScorer, SnapKVScorer
from headkv.scorers.defensive import DefensiveScorer

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def turned(monkeypatch: Any) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("turned_around")
    for name in ("turned_around", "turned_methods", "whole_answers", "measure"):
        sys.modules.pop(name, None)


def test_every_study_of_a_small_document(turned: Any) -> None:
    from whole_answers import read

    model, tokenizer = tiny_model("llama"), letters()
    text = "".join(f"the number of {chr(97 + i % 26)} is {i * 37 % 1000}. " for i in range(14))
    sample = Sample("small", 300, 0, 0, text, "which number?", ("x",), 5, score=lambda reply: 1.0)
    document = read(model, tokenizer, sample)
    found = turned.measure([document], torch.rand(3, 2), [5, 9, 4], shares=(0.3,))
    assert set(found) == {f"{name}, 30%" for name in turned.STUDIES}
    tables = turned.shown(found)
    for title, rows in tables.items():
        assert len(rows) >= 3, title
    for title, one in found.items():
        assert all(nats < 0 for by_task in one.cells.values() for _, nats in by_task["small"]), title
        assert len({by_task["small"][0][1] for by_task in one.cells.values()}) > 2, title
        assert one.rows()[0]["better : worse"] == "0 : 0"
    for largest, needed in found["Ada-KV unseen, 30%"].parts:
        assert 0.5 <= largest <= 1 and 0 < needed < 1
    # What the full cache writes is its own first choice.
    full = {"full": headkv.FullCache()}
    for way in ("seen", "unseen"):
        reading, tokens = document.way(way)
        assert reading.cache.seen == document.compressed(way).shape[1]
        assert turned.judged(reading, tokens, document.answer, full)[0][0]
    assert (
        read(model, tokenizer, Sample(*["small", 9, 0, 0, text, "what?", ("x",), 5], score=lambda reply: 0.0))
        is None
    )


def test_one_layer_together_is_ada_kv_and_all_are_its_wider_scope(turned: Any) -> None:
    from headkv.evaluation.reading import Reading

    ids = torch.randint(3, 97, (1, 121), generator=torch.Generator().manual_seed(0))
    reading, scorer = Reading(tiny_model("llama"), ids), SnapKVScorer(8)
    for layers, scope in ((1, "layer"), (3, "model")):
        together = reading.kept(turned.Together(0.3, scorer, layers))
        assert torch.equal(together, reading.kept(headkv.AdaKV(0.3, scorer, scope=scope)))


def test_parts_are_turned(turned: Any) -> None:
    p = prefill(60)
    scores, norms = torch.tensor([[0.4, 0.1, 0.1, 0.1]]), torch.tensor([[1.0, 3.0, 2.0, 1.0]])
    budgets = torch.tensor([2])
    first = CriticalKV(2).second_look(scores, norms, budgets).argsort(descending=True)[0, :2]
    turned_first = turned.LeastNorms(2).second_look(scores, norms, budgets).argsort(descending=True)[0, :2]
    assert (first.tolist(), turned_first.tolist()) == ([0, 1], [0, 3])
    plain = KeyDiffScorer().score(p)
    pooled = turned.Pooled(KeyDiffScorer(), 5).score(p)
    assert float(pooled[1, 20]) == float(plain[1, 18:23].max())


def test_an_earlier_window_does_not_look_at_the_end(turned: Any) -> None:
    """Whatever the last queries are, the scores stay; without the skip they do not."""
    from dataclasses import replace

    weight = torch.randn(96, 96, generator=torch.Generator().manual_seed(3))
    p = prefill(60, queries=20)
    p = replace(p, parts=replace(p.parts, output=weight))
    queries = p.queries.clone()
    queries[:, -6:] *= -3
    other = replace(p, queries=queries)
    earlier = turned.Earlier(DefensiveScorer(window=8), skipped=6)
    assert earlier.window == 14 and earlier.score(p).shape == (3, 46)
    assert torch.equal(earlier.score(p), earlier.score(other))
    assert not torch.equal(DefensiveScorer(window=8).score(p), DefensiveScorer(window=8).score(other))
    kept = headkv.ScoredMethod(20, earlier, AdaptiveAllocator(0.0)).plan(p).mask
    assert bool(kept[:, -14:].all()) and int(kept.sum()) == 60
