"""kvpress scorers inside headkv's methods: what they see, and what they can not have."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from prefills import prefill
from torch import Tensor

from headkv.integrations.kvpress import KVPressScorer
from headkv.methods import AdaKV, SnapKV
from headkv.scorers import KeyNormScorer, ObservedAttentionScorer


@dataclass
class Press:
    """What kvpress calls with `score`, as a function."""

    function: Any
    compression_ratio: float = 0.0

    def score(
        self, module: Any, hidden_states: Any, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any
    ) -> Tensor:
        return self.function(module, hidden_states, keys, values, attentions, kwargs)


def test_keys_and_values_are_a_batch_of_one() -> None:
    p = prefill(40)
    norm = KVPressScorer(Press(lambda m, h, keys, values, a, k: -keys.norm(dim=-1)), window=8)
    torch.testing.assert_close(norm.score(p), KeyNormScorer(8).score(p))
    assert torch.equal(AdaKV(20, norm).plan(p).mask, AdaKV(20, KeyNormScorer(8)).plan(p).mask)
    values = KVPressScorer(Press(lambda m, h, keys, values, a, k: values.sum(-1)))
    assert torch.equal(values.score(p), p.values.sum(-1))


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
def test_attention_weights_of_as_many_queries_as_asked(softcap: float | None) -> None:
    p = prefill(30, softcap=softcap)

    def accumulated(
        module: Any, hidden: Any, keys: Tensor, values: Tensor, attentions: Tensor, kwargs: Any
    ) -> Tensor:
        heads = module.config.num_key_value_heads
        assert attentions.shape[1] == module.config.num_attention_heads == 6
        assert hidden.shape[1] == keys.shape[2] == 30 and module.layer_idx == 0
        return attentions.sum(2).view(1, heads, -1, keys.shape[2]).mean(2)

    whole = KVPressScorer(Press(accumulated), window=4, observed_queries=None)
    torch.testing.assert_close(whole.score(p), ObservedAttentionScorer(4).score(p))
    last = KVPressScorer(Press(accumulated), window=4, observed_queries=1).score(p)
    assert torch.equal(
        SnapKV(9, KVPressScorer(Press(accumulated), 4, 1)).plan(p).mask[:, :26].sum(1), torch.tensor([5] * 3)
    )
    assert float(last.sum(1).max()) <= 1
    nothing: list[Any] = []
    KVPressScorer(Press(lambda m, h, k, v, a, kw: nothing.append(a) or k.sum(-1))).score(p)
    assert nothing == [None]


@pytest.mark.parametrize(
    "function, what",
    [
        (lambda m, h, k, v, a, kw: m.q_proj(h), "module.q_proj"),
        (lambda m, h, k, v, a, kw: hasattr(m, "k_proj"), "module.k_proj"),
        (lambda m, h, k, v, a, kw: m.config.rope_theta, "module.config.rope_theta"),
        (lambda m, h, k, v, a, kw: h[:, 4:], "hidden_states"),
        (lambda m, h, k, v, a, kw: h.mean(), "hidden_states.mean"),
        (lambda m, h, k, v, a, kw: kw["position_embeddings"], r"kwargs\['position_embeddings'\]"),
    ],
)
def test_parts_of_the_model_are_refused_by_name(function: Any, what: str) -> None:
    with pytest.raises(NotImplementedError, match=f"Press needs {what}, which a method does not see"):
        KVPressScorer(Press(function)).score(prefill(20))


def needs_attention(m: Any, h: Any, k: Tensor, v: Tensor, attentions: Any, kw: Any) -> Tensor:
    if attentions is None:
        raise AssertionError("no attention")
    return k.sum(-1)


@pytest.mark.parametrize(
    "scorer, message",
    [
        (
            KVPressScorer(Press(needs_attention)),
            r"Press refused its input \(no attention\), with observed_queries=0",
        ),
        (
            KVPressScorer(Press(lambda m, h, k, v, a, kw: k)),
            r"must have shape \[1, 3, 20\], got \[1, 3, 20, 16\]",
        ),
        (KVPressScorer(Press(needs_attention), 0, 9), "queries must hold the last 9 tokens, got 5"),
    ],
)
def test_refusals(scorer: KVPressScorer, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scorer.score(prefill(20, queries=5))


def test_bad_parameters() -> None:
    with pytest.raises(TypeError, match="press must be an object with score"):
        KVPressScorer(None)
    with pytest.raises(ValueError, match="window must be an int of at least 0, got -1"):
        KVPressScorer(Press(None), window=-1)


AGREE = """
import torch
try:
    from kvpress import KnormPress, ObservedAttentionPress, SnapKVPress
except ImportError as error:
    raise SystemExit(f"skip: {error}")
from prefills import prefill
from headkv.integrations.kvpress import KVPressScorer
from headkv.scorers import KeyNormScorer, ObservedAttentionScorer, SnapKVScorer

p = prefill(100)
for theirs, ours in (
    (KVPressScorer(KnormPress()), KeyNormScorer(0)),
    (KVPressScorer(SnapKVPress(window_size=16), 16, 16), SnapKVScorer(16, 5, "avg")),
    (KVPressScorer(ObservedAttentionPress(), 0, None), ObservedAttentionScorer(0, average=True)),
):
    torch.testing.assert_close(theirs.score(p), ours.score(p))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("kvpress") is None, reason="needs kvpress: pip install kvpress")
def test_the_library_agrees_with_our_scorers() -> None:
    """In a process of its own: importing kvpress wraps the attention functions of transformers."""
    path = [entry for entry in sys.path if entry]
    code = f"import sys; sys.path[:0] = {path!r}\n{AGREE}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    if done.stderr.startswith("skip: "):
        pytest.skip(f"kvpress is there but does not import: {done.stderr[6:].strip()}")
    assert done.returncode == 0, done.stderr
