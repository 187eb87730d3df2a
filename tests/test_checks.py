"""Checks of parameters: what is taken, and that a refusal names the argument, what is allowed and what it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import headkv
from headkv import _checks
from headkv.cache import RaggedLayer
from headkv.data import haystack
from headkv.heads import HeadProfile, read_headkv
from headkv.models.tiny import tiny_model
from headkv.widgets import CacheBill


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), True + 2], ids=repr)
@pytest.mark.parametrize("bounds", [(), (3,), (0, 3), (3, 3)], ids=str)
def test_whole_numbers_become_ints(value: Any, bounds: tuple[int, ...]) -> None:
    found = _checks.whole("n", value, *bounds)
    assert found == 3 and type(found) is int


@pytest.mark.parametrize(
    ("value", "bounds", "error", "allowed"),
    [
        (True, (), TypeError, "an int of at least 0"),
        (np.bool_(True), (), TypeError, "an int of at least 0"),
        (3.0, (), TypeError, "an int of at least 0"),
        (np.float32(3), (1,), TypeError, "an int of at least 1"),
        ("3", (), TypeError, "an int of at least 0"),
        (None, (1, 9), TypeError, "an int in [1, 9]"),
        (-1, (), ValueError, "an int of at least 0"),
        (0, (1,), ValueError, "an int of at least 1"),
        (np.int64(10), (1, 9), ValueError, "an int in [1, 9]"),
        (0, (1, 9), ValueError, "an int in [1, 9]"),
    ],
    ids=repr,
)
def test_what_is_no_whole_number(
    value: Any, bounds: tuple[int, ...], error: type[Exception], allowed: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(f'n must be {allowed}, got {value!r}')}$"):
        _checks.whole("n", value, *bounds)


@pytest.mark.parametrize("value", [0.5, 1, np.float32(0.5), np.int8(1), Fraction(1, 3)], ids=repr)
def test_numbers(value: Any) -> None:
    _checks.between("x", value, 0, 1)
    _checks.between("x", value, 0)


@pytest.mark.parametrize(
    ("value", "error"),
    [(True, TypeError), ("0.5", TypeError), (None, TypeError), (1j, TypeError), (-0.1, ValueError), (1.1, ValueError), (float("nan"), ValueError)],
    ids=repr,
)  # fmt: skip
def test_what_is_no_number_between(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=re.escape(f"x must be a number in [0, 1], got {value!r}")):
        _checks.between("x", value, 0, 1)


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


# Whole numbers all over the package: what the argument is called, and a call with it.
COUNTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "from_rows": ("headroom", lambda n: RaggedLayer.from_rows([[(ones(2, 4), ones(2, 4))]], headroom=n)),
    "from_dense headroom": ("headroom", lambda n: RaggedLayer.from_dense(ones(1, 1, 5, 4), ones(1, 1, 5, 4), headroom=n)),
    "from_dense rollback": ("rollback", lambda n: RaggedLayer.from_dense(ones(1, 1, 5, 4), ones(1, 1, 5, 4), rollback=n)),
    "from_dense sinks": ("sinks", lambda n: RaggedLayer.from_dense(ones(1, 1, 5, 4), ones(1, 1, 5, 4), sinks=n, recent=1)),
    "crop": ("tokens", lambda n: RaggedLayer.from_dense(ones(1, 1, 5, 4), ones(1, 1, 5, 4)).crop(n)),
    "for_model": ("headroom", lambda n: headkv.RaggedCache.for_model(tiny_model("llama"), headkv.FullCache(), headroom=n)),
    "StreamingLLM": ("sinks", lambda n: headkv.StreamingLLM(9, sinks=n)),
    "SnapKVScorer": ("window", lambda n: headkv.SnapKVScorer(window=n)),
    "explain": ("length", lambda n: headkv.FullCache().explain(tiny_model("llama"), n)),
    "kv_scores": ("num_kv_heads", lambda n: HeadProfile("t", "gate", "query", ones(3, 6)).kv_scores(n)),
    "echo": ("repeats", lambda n: HeadProfile.measure(tiny_model("llama"), None, "echo", num_tokens=4, seeds=(1,), repeats=n)),
    "CacheBill": ("context", lambda n: CacheBill(context=n)),
}  # fmt: skip


@pytest.mark.parametrize("name, call", COUNTS.values(), ids=COUNTS)
def test_counts_are_checked_in_one_way(name: str, call: Callable[[Any], Any]) -> None:
    call(3)
    call(np.int64(3))
    for wrong in (True, 3.0, "3"):
        with pytest.raises(TypeError, match=f"{name} must be an int (of at least|in) .*, got {wrong!r}"):
            call(wrong)
    with pytest.raises(ValueError, match=f"{name} must be .*, got -1"):
        call(-1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HeadProfile("t", "gate", "kv", ones(3, 6)).kv_scores(6, "median"), "reduce must be one of 'max', 'sum', 'mean', got 'median'"),
        (lambda: read_headkv("x", model="t", num_layers=1, num_heads=1, kind="echo"), "kind must be one of 'retrieval', 'retrieval-reasoning', got 'echo'"),
        (lambda: haystack(None, 100, []), "facts must hold at least one fact, got none"),
    ],
    ids=["reduce", "kind", "facts"],
)  # fmt: skip
def test_words_are_listed(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
