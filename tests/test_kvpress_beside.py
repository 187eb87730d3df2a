"""`benchmarks/beside_kvpress.py` on a small model: kvpress's own presses keep what headkv's methods keep, set alike."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress_cases import SHAPE

from headkv.evaluation.reading import Reading

OWN = os.environ.get("KVPRESS_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(OWN is None, reason="needs KVPRESS_PYTHON: make test-kvpress"),
]


def test_same_entries_and_nats_at_equal_settings(monkeypatch: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    bench = importlib.import_module("beside_kvpress")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    draw = torch.Generator().manual_seed(1)
    ids, question, answer = (torch.randint(3, 257, (1, n), generator=draw) for n in (700, 3, 4))
    reading = Reading(model, torch.cat([ids, question[:, :1]], 1))
    prompts = [bench.Prompt(reading, ids, question, answer)]
    theirs = bench.beside(model, prompts, OWN, [0.2, 0.5])
    here = {name: (lambda share, n, name=name: bench.alike(share, n, 3, 2)[name]) for name in bench.HERE}
    rows = bench.compare(prompts, here, theirs)
    assert [row["press"] for row in rows] == 2 * list(bench.HERE)
    for row in rows:
        assert row["same, alike"] == row["same, here"] == "1.0000", row
        if row["press"] != "StreamingLLM" and row["kvpress fails"] == "0":  # headkv's window slides
            assert float(row["nats, kvpress"]) == pytest.approx(float(row["nats alike"]), abs=2e-3), row
    # A last layer of less than the window: kvpress's pyramid is none, at half of the entries it is one.
    flat, steep, narrow = (
        theirs[0][name, share]["kept"].sum((1, 2)).tolist()
        for name, share in (("PyramidKV", 0.2), ("PyramidKV", 0.5), ("PyramidKV, window 4", 0.2))
    )
    assert len({*flat}) == 1 and all(x == sorted(x)[::-1] and x[0] > 2 * x[-1] for x in (steep, narrow))
