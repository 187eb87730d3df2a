"""What the benchmark compares with reads the rows that it is given, as far as that shows without a GPU.

Rows are made in Triton's interpreter, so this file runs once more in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="for the interpreter's process"
)
LENGTHS = ([7, 1, 300], [16, 32, 256], [1, 1, 1])
GROUP, DIM = 4, 32


def benchmark():
    spec = importlib.util.spec_from_file_location("rivals", ROOT / "benchmarks" / "rivals.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["rivals"] = module
    spec.loader.exec_module(module)
    return module


def make_layer(lengths: list[int]) -> SimpleNamespace:
    """Rows with free slots between them, which hold NaN, and a new token."""
    from headkv_kernels import Rows

    length = torch.tensor(lengths)
    start = (length + 5).cumsum(0) - length - 2
    pools = torch.full((2, int(length.sum()) + 5 * len(lengths) + 3, DIM), torch.nan)
    for begin, n in zip(start.tolist(), lengths, strict=True):
        pools[:, begin : begin + n] = torch.randn(2, n, DIM)
    zeros = torch.zeros_like(length)
    rows = Rows(*pools, torch.zeros(pools.shape[1], dtype=torch.int32), start, length, zeros, zeros)
    q, new = torch.randn(1, len(lengths) * GROUP, DIM), torch.randn(2, 1, len(lengths), DIM)
    return SimpleNamespace(rows=rows, q=q, new=new)


def truth(layer: SimpleNamespace, scale: float) -> torch.Tensor:
    found = []
    for r, (begin, n) in enumerate(zip(layer.rows.start.tolist(), layer.rows.length.tolist(), strict=True)):
        keys, values = layer.rows.keys[begin : begin + n], layer.rows.values[begin : begin + n]
        logits = layer.q[0, r * GROUP : (r + 1) * GROUP].double() @ keys.double().T * scale
        found.append(logits.softmax(-1) @ values.double())
    return torch.cat(found)


@interpreted
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("size", "room"), [(1, 0), (16, 0), (16, 1), (256, 0), (256, 1)])
def test_pages_hold_the_rows(lengths: list[int], size: int, room: int) -> None:
    rows = make_layer(lengths).rows
    pages = benchmark().in_pages(rows, size, room)
    for r, (begin, n) in enumerate(zip(rows.start.tolist(), lengths, strict=True)):
        index = pages.index[pages.ends[r] : pages.ends[r + 1]]
        assert len(index) == -(-(n + room) // size)
        assert torch.equal(pages.table[r, : len(index)], index)
        assert pages.last[r] == n - (-(-n // size) - 1) * size
        for got, pool in ((pages.keys, rows.keys), (pages.values, rows.values)):
            assert torch.equal(got[index.long()].reshape(-1, DIM)[:n], pool[begin : begin + n])


@interpreted
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_fastdms(lengths: list[int]) -> None:
    pytest.importorskip("fastdms", reason="FastDMS is not installed")
    layer = make_layer(lengths)
    reading = [rival for rival in benchmark().fastdms([layer], scale=0.2) if not rival.appends]
    assert reading
    for rival in reading:  # the interpreter can not run its append
        got = rival.prepare(layer).step()
        torch.testing.assert_close(got.double(), truth(layer, 0.2), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="is that process")
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-1000:]
    assert int(ran.stdout.split(" passed")[0].split()[-1]) >= len(LENGTHS) * 5
