"""kvpress made real: what its presses mask is gone here, and the answers are those of its own masked runs.

Needs kvpress beside the transformers that headkv runs with; `make test-kvpress` has both, and kvpress with the
transformers that it pins in an environment of its own, whose Python is named by KVPRESS_PYTHON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress_cases import STEPS, TOKENS, middle, presses, text

import headkv
from headkv.integrations.kvpress import KVPressScorer, realize
from headkv.integrations.masked import fake_key

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("kvpress") is None, reason="needs kvpress: make test-kvpress"
    ),
]

REALIZED = [
    "AdaKV(SnapKV)", "AdaKV(ExpectedAttention)", "AdaKV(KVzap)", "CriticalAdaKV(SnapKV)",
    "LUKV(ExpectedAttention)", "DuoAttention", "DMS(Knorm)", "DMS(KVzap)", "KVzip", "KVzip+", "KVgrad", "FastKVzip",
]  # fmt: skip
REFUSED = {
    "KVCompose": "removes or adds some itself",
    "SnapKV": "removes or changes them itself",
    "ThinK": "removes or changes them itself",
    "Decoding(AdaKV(Knorm))": "while decoding",
}
OWN = os.environ.get("KVPRESS_PYTHON")
PYTHONS = {
    "kvpress's own transformers": pytest.param(
        OWN, marks=pytest.mark.skipif(OWN is None, reason="needs KVPRESS_PYTHON: make test-kvpress")
    ),
    "this transformers": pytest.param(sys.executable),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return tmp_path_factory.mktemp("kvpress")


@pytest.fixture(scope="module")
def masked(folder: Path) -> Any:
    """kvpress's masked runs by an interpreter: the first that is asked makes the model, from the same seed each time."""
    known: dict[str, Any] = {}

    def by(python: str) -> dict[str, Any]:
        if python not in known:
            where = folder / str(len(known))
            where.mkdir()
            script = Path(__file__).with_name("kvpress_cases.py")
            env = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
            done = subprocess.run(
                [python, str(script), str(where)], capture_output=True, text=True, env=env, timeout=900
            )
            assert done.returncode == 0, done.stderr
            known[python] = torch.load(where / "masked.pt") | {"folder": where}
        return known[python]

    return by


@pytest.fixture(scope="module")
def real() -> Any:
    """The same with headkv: the cache after the prompt, then the logits of the steps."""
    known: dict[tuple[str, str], Any] = {}

    def run(name: str, where: Path) -> dict[str, Any]:
        if (name, str(where)) not in known:
            known[name, str(where)] = realized_run(name, where)
        return known[name, str(where)]

    return run


def realized_run(name: str, where: Path) -> dict[str, Any]:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(where / "model", dtype=torch.float32).eval()
    ids, logits, times = text(), [], []
    untouched = {name: [*vars(module), *module._modules] for name, module in model.named_modules()}
    with headkv.compress(model, realize(presses()[name])) as session, torch.no_grad():
        model(ids[:, :TOKENS])
        cache = session.cache
        rows = [[layer.row(0, h).positions.long() for h in range(2)] for layer in cache.layers]
        nbytes = cache.nbytes
        for i in range(TOKENS, TOKENS + STEPS):
            begin = time.perf_counter()
            logits.append(model(ids[:, i : i + 1], past_key_values=cache).logits[0, 0])
            times.append(time.perf_counter() - begin)
    assert untouched == {name: [*vars(module), *module._modules] for name, module in model.named_modules()}
    return {"rows": rows, "logits": torch.stack(logits), "bytes": nbytes, "seconds": middle(times)}


@pytest.mark.parametrize("python", PYTHONS.values(), ids=PYTHONS)
@pytest.mark.parametrize("name", REALIZED)
def test_same_sets_and_logits_as_kvpress_masks(name: str, python: str, masked: Any, real: Any) -> None:
    theirs = masked(python)
    if "error" in theirs[name]:
        pytest.skip(f"kvpress itself fails here: {theirs[name]['error']}")
    ours = real(name, theirs["folder"])
    hidden = 0
    for indices, rows in zip(theirs[name]["masked"], ours["rows"], strict=True):
        visible = torch.ones(2, TOKENS, dtype=torch.bool)
        if indices is not None:
            visible[indices[1], indices[2]] = False
        hidden += int((~visible).sum())
        assert [row.sort().values.tolist() for row in rows] == [x.nonzero()[:, 0].tolist() for x in visible]
    assert hidden > TOKENS // 4
    torch.testing.assert_close(ours["logits"], theirs[name]["logits"], atol=1e-4, rtol=0)
    assert ours["bytes"] < theirs[name]["bytes"]


@pytest.mark.parametrize("name", REFUSED)
def test_presses_that_do_more_than_mask_are_refused(name: str, masked: Any, real: Any) -> None:
    where = masked(OWN or sys.executable)["folder"]
    with pytest.raises(ValueError, match=REFUSED[name]):
        real(name, where)


def test_every_scorer_of_the_library_ranks_for_our_methods(masked: Any) -> None:
    """Hidden states, weights of the model and of its attention included; those that download are left out."""
    import kvpress
    from transformers import LlamaForCausalLM

    downloads = {"QFilterPress", "KVzapPress", "ExpectedAttentionStatsPress"}
    model = LlamaForCausalLM.from_pretrained(masked(OWN or sys.executable)["folder"] / "model").eval()
    tried = set()
    for name in sorted(set(kvpress.__all__) - downloads - {"ScorerPress"}):
        kind = getattr(kvpress, name)
        if not (isinstance(kind, type) and issubclass(kind, kvpress.ScorerPress)):
            continue
        press = kind(kvpress.KnormPress()) if name == "CriticalKVPress" else kind()
        observed = None if name == "ObservedAttentionPress" else 0
        scorer = KVPressScorer(press, observed_queries=observed)
        with headkv.compress(model, headkv.SnapKV(100, scorer=scorer)) as session, torch.no_grad():
            model(text()[:, :400])
        assert session.cache.lengths().tolist() == [[[100, 100]]] * 3, name
        tried.add(name)
    assert len(tried) >= 14 and {"SnapKVPress", "ExpectedAttentionPress", "LeverageScorePress"} <= tried


def test_fake_keys_of_our_masked_cache_are_the_library_s() -> None:
    from kvpress.attention_patch import search_hyperplane

    for m in (1, 4, 32, 128):
        queries = torch.randn(1, m, 128, generator=torch.Generator().manual_seed(m))
        torch.testing.assert_close(fake_key(queries[0]), search_hyperplane(queries)[0])


def test_table(masked: Any, real: Any, capsys: Any) -> None:
    """Printed with -s or by `make test-kvpress`: what became of each press, its bytes and its decode step."""
    theirs = masked(OWN or sys.executable)
    rows: dict[str, Any] = {}
    lines = [f"{'press':26} {'bytes masked':>13} {'realised':>10} {'step masked':>12} {'realised':>10}"]
    for name in [*REALIZED, *REFUSED]:
        there = theirs[name]
        if name in REFUSED:
            lines.append(f"{name:26} not realised: {REFUSED[name]}")
            rows[name] = {"why": REFUSED[name]}
        elif "error" in there:
            lines.append(f"{name:26} kvpress itself fails here: {there['error']}")
        else:
            here = real(name, theirs["folder"])
            rows[name] = {"masked": there["bytes"], "realised": here["bytes"]}
            seconds = f"{there['seconds'] * 1e3:9.2f} ms {here['seconds'] * 1e3:7.2f} ms"
            lines.append(f"{name:26} {there['bytes']:13,} {here['bytes']:10,} {seconds}")
    with capsys.disabled():
        print(f"\nkvpress with transformers {theirs['transformers']}, {TOKENS} tokens, float32, one core")
        print("\n".join(lines))
    assert len(lines) == 1 + len(REALIZED) + len(REFUSED)
    if folder := os.environ.get("KVPRESS_DATA"):
        said = {"command": "make test-kvpress DATA=book/data", "transformers": theirs["transformers"]}
        text = json.dumps(said | {"tokens": TOKENS, "presses": rows}, indent=1) + "\n"
        (Path(folder) / "kvpress.json").write_text(text, encoding="utf-8")
