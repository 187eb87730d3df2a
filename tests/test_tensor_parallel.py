"""Two processes that share a model's heads answer, and store together, what one process does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from ranks import CASES, FAMILIES, KV_HEADS, LAYERS, SHAPE, WAYS, answers, profile, save_models

import headkv
from headkv.heads import RankLoads, balanced_order
from headkv.models import reorder_heads
from headkv.models.tiny import tiny_model

pytest.importorskip("transformers", minversion="5.16", reason="ranks have DTensors from 5.16 on")
# transformers shares out the experts of GPT-OSS and leaves its attention whole: every rank has all heads.
WHOLE = "gpt_oss"
NAMES = [*CASES, *WAYS, *(family for family in FAMILIES[1:] if family != WHOLE)]
RANKS = 2


def run(folder: Path) -> list[dict[str, Any]]:
    """What each rank found."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(free.getsockname()[1]),
            "WORLD_SIZE": str(RANKS),
        }
    paths = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    started = []
    for rank in range(RANKS):
        more = {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        hidden = {"CUDA_VISIBLE_DEVICES": ""}  # over gloo, where there are GPUs too
        command = [sys.executable, ranks.__file__, str(folder)]
        with (folder / f"said-{rank}").open("wb") as said:
            env = {**os.environ, **where, **more, **hidden}
            started.append(subprocess.Popen(command, env=env, stdout=said, stderr=subprocess.STDOUT))
    try:
        ended = [process.wait(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    assert ended == [0] * RANKS, (folder / "said-0").read_text()[-3000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    save_models(folder)
    return run(folder)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return answers(lambda family: tiny_model(family, **SHAPE))


def test_every_method_is_a_case():
    made = {type(method).__name__ for method in CASES.values()}
    assert made >= {name for name in headkv.methods.__all__ if name[0].isupper() and _is_method(name)}


def _is_method(name: str) -> bool:
    kind = getattr(headkv.methods, name)
    return hasattr(kind, "observed_queries") and hasattr(kind, "for_share")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, WHOLE])
def test_the_same_tokens(name: str, shared: list[dict[str, Any]], alone: dict[str, Any]):
    for found in shared:
        assert found["answers"][name]["tokens"] == alone[name]["tokens"]


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_stores_its_heads(name: str, shared: list[dict[str, Any]], alone: dict[str, Any]):
    found = [x["answers"][name] for x in shared]
    together = torch.cat([torch.tensor(x["lengths"]) for x in found], 2)
    assert together.tolist() == alone[name]["lengths"]
    # Bookkeeping of rows and head room are there once a rank.
    assert sum(x["nbytes"] for x in found) <= 1.1 * alone[name]["nbytes"]


def test_a_plan_that_leaves_attention_whole(shared: list[dict[str, Any]], alone: dict[str, Any]):
    for found in shared:
        assert found["answers"][WHOLE]["lengths"] == alone[WHOLE]["lengths"]


def test_heads_differ_where_they_compete(alone: dict[str, Any]):
    """Cases in which the ranks' shares are not even, so that they would fail if each rank split its own budget."""
    for name in (
        "AdaKV",
        "AdaKV over all layers",
        "DefensiveKV",
        "KVzip",
        "chance",
        "bounded while decoding",
    ):
        halves = torch.tensor(alone[name]["lengths"]).unflatten(2, (RANKS, -1)).sum(3)  # [L, B, ranks]
        assert bool((halves[..., 0] != halves[..., 1]).any()), name


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("odd", "3 KV heads, which 2 ranks can not share evenly; tp_size must be one of 1, 3"),
        ("own way", "OwnWay decides over the whole prompt"),
        ("save", "a cache can not be saved where 2 ranks share the model's heads"),
        ("reorder", "model must be whole: reorder heads before"),
    ],
)
def test_refused(name: str, says: str, shared: list[dict[str, Any]]):
    for found in shared:
        assert found["refused"][name].startswith("ValueError") and says in found["refused"][name]


def test_the_report_is_of_all_ranks(shared: list[dict[str, Any]]):
    first, second = (torch.tensor(found["report"]) for found in shared)
    assert first.shape == (LAYERS, RANKS) and torch.equal(first, second)
    cache = headkv.RaggedCache.for_model(model := tiny_model("llama", **SHAPE), CASES["AdaKV"])
    with torch.no_grad():
        model(ranks.prompts()["input_ids"], past_key_values=cache)
    whole = cache.lengths().sum(1)
    assert torch.equal(first, RankLoads.of(whole, RANKS).layers)
    with pytest.raises(ValueError, match="there are no ranks"):
        cache.rank_loads()


def test_loads_of_ranks_by_hand():
    loads = RankLoads.of(torch.tensor([[9.0, 7, 1, 1], [1, 1, 4, 4]]), 2)
    assert loads.layers.tolist() == [[16, 2], [2, 8]]
    assert loads.uneven == 18 / 14 and loads.waits == 24 / 14
    assert "1.286" in str(loads)


@pytest.mark.parametrize(("heads", "on"), [(4, 2), (8, 2), (8, 4), (8, 8), (6, 3)])
def test_an_order_evens_loads_out(heads: int, on: int):
    loads = torch.distributions.Exponential(1.0).sample((32, heads))
    order = balanced_order(loads, on)
    assert torch.equal(order.sort(1).values, torch.arange(heads).expand(32, -1))
    before, after = RankLoads.of(loads, on), RankLoads.of(loads, on, order)
    assert after.waits <= before.waits and after.uneven <= max(before.uneven, 1.05)
    if heads == 8 and on == 2:  # the best of all 35 ways in almost every layer
        assert after.uneven < 1.02 and after.waits < 1.1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reordered_model_is_the_same(family: str):
    """And its profile follows its heads."""
    model, twin = tiny_model(family, **SHAPE), tiny_model(family, **SHAPE)
    order = torch.stack([torch.randperm(KV_HEADS) for _ in range(LAYERS)])
    reorder_heads(twin, order)
    gates = profile("gate", 0, "query")
    ids, lengths = ranks.prompts()["input_ids"], []
    for one, of in ((model, gates), (twin, gates.reordered(order))):
        cache = headkv.RaggedCache.for_model(one, headkv.DuoAttention(of, 0.5, 1, 5))
        with torch.no_grad():
            lengths.append((one(ids, past_key_values=cache).logits, cache.lengths()[:, 0]))
    assert torch.equal(lengths[0][1].gather(1, order), lengths[1][1])
    torch.testing.assert_close(lengths[0][0], lengths[1][0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: balanced_order(torch.ones(2, 3), 2), "ranks must be a divisor of the 3 KV heads, got 2"),
        (lambda: balanced_order(-torch.ones(2, 4), 2), "loads must be"),
        (lambda: reorder_heads(tiny_model("llama"), torch.zeros(3, 2).long()), "every head of a layer once"),
        (lambda: reorder_heads(tiny_model("llama"), torch.zeros(3)), r"order must be int64 \[3, H\]"),
        (
            lambda: reorder_heads(tiny_model("llama"), torch.arange(4).expand(3, -1)),
            "of the model's 2 KV heads, got 4",
        ),
        (
            lambda: reorder_heads(tiny_model("phi3"), torch.arange(2).expand(3, -1)),
            r"order must be int64 \[0, H\]",
        ),
        (lambda: profile("gate", 0).reordered(torch.zeros(2, 4).long()), "order must have shape"),
    ],
)
def test_refused_on_one_process(call: Any, says: str):
    with pytest.raises(ValueError, match=says):
        call()
