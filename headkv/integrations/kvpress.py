"""Scorers of the kvpress library as scorers of headkv: theirs rank entries, ours really evicts them.

Nothing of kvpress is imported here: whoever has a press has imported it. That import wraps the attention
functions of transformers for kvpress's own masks; the adapter does not use them.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from headkv import _checks
from headkv.prefill import Prefill
from headkv.scorers.attention import attention_weights


@dataclass(frozen=True, eq=False)
class KVPressScorer:
    """A kvpress `ScorerPress` as a `Scorer`: `headkv.SnapKV(0.2, scorer=KVPressScorer(KnormPress()))`.

    A method sees queries, keys and values of a layer, not the model. So presses that rank by keys and
    values (key norm, KeyDiff, LagKV, CUR, streaming, random) work as they are, and those that rank by
    attention weights (SnapKV, TOVA, observed attention) work if they are given them: say for how many last
    queries. A press that reaches for the weights or hidden states of the model (expected attention,
    leverage scores) is refused when it does. The press's own `compression_ratio` evicts nothing here: the
    method's budget does.

    Attributes:
        press: the press; only its `score` is used.
        window: last entries that are always kept and do not compete.
        observed_queries: last queries whose attention weights, `[1, HQ, queries, n]`, the press is given;
            None for all of them (n x n for all heads of a layer at once), 0 for none.
    """

    press: Any
    window: int = 0
    observed_queries: int | None = 0

    def __post_init__(self) -> None:
        _checks.has("press", self.press, "score", "compression_ratio")
        _checks.whole("window", self.window)
        if self.observed_queries is not None:
            _checks.whole("observed_queries", self.observed_queries)

    def score(self, prefill: Prefill) -> Tensor:
        """Scores `[H, n - window]` float32.

        Raises:
            NotImplementedError: the press needs a part of the model that a method does not see.
            ValueError: the press refuses its input, or gives scores that are not `[1, H, n]`.
        """
        heads, n, dim = prefill.keys.shape
        name = type(self.press).__name__
        group = prefill.queries.shape[0] // heads
        config = _Stub(
            name, "module.config", num_attention_heads=heads * group, num_key_value_heads=heads,
            num_hidden_layers=prefill.num_layers, head_dim=dim,
        )  # fmt: skip
        module = _Stub(name, "module", config=config, layer_idx=prefill.layer_idx, head_dim=dim)
        hidden = _Stub(name, "hidden_states", shape=torch.Size((1, n, 0)), device=prefill.keys.device)
        keys, values = prefill.keys[None], prefill.values[None]
        try:
            scores = self.press.score(
                module, hidden, keys, values, self._attention(prefill), _NoArguments(name)
            )
        except AssertionError as error:
            got = self.observed_queries
            raise ValueError(f"{name} refused its input ({error}), with observed_queries={got}") from error
        if tuple(scores.shape) != (1, heads, n):
            raise ValueError(f"scores of {name} must have shape [1, {heads}, {n}], got {list(scores.shape)}")
        return scores[0, :, : max(0, n - self.window)].float()

    def _attention(self, prefill: Prefill) -> Tensor | None:
        """`[1, HQ, queries, n]` float32, or None."""
        heads, n, dim = prefill.keys.shape
        count = n if self.observed_queries is None else min(self.observed_queries, n)
        if count == 0:
            return None
        if prefill.queries.shape[1] < count:
            raise ValueError(f"queries must hold the last {count} tokens, got {prefill.queries.shape[1]}")
        queries = prefill.queries[:, -count:].reshape(heads, -1, count, dim)
        weights = attention_weights(queries, prefill.keys, n - count, prefill.rule)
        return weights.reshape(1, -1, count, n)


def _refuse(press: str, what: str) -> NotImplementedError:
    return NotImplementedError(
        f"{press} needs {what}, which a method does not see; presses that rank by keys, values or attention "
        "weights (set observed_queries) are supported"
    )


class _Stub(SimpleNamespace):
    """The few attributes that are known of a part of the model; any other says which press asked for what."""

    def __init__(self, press: str, part: str, **known: Any) -> None:
        super().__init__(**known)
        self._names = (press, part)

    def __getattr__(self, name: str) -> Any:
        press, part = self._names
        raise _refuse(press, f"{part}.{name}")

    def __getitem__(self, key: Any) -> Any:
        press, part = self._names
        raise _refuse(press, part)


class _NoArguments(dict[str, Any]):
    """The forward pass's keyword arguments, of which none are known."""

    def __init__(self, press: str) -> None:
        super().__init__()
        self._press = press

    def __missing__(self, key: str) -> Any:
        raise _refuse(self._press, f"kwargs[{key!r}]")
