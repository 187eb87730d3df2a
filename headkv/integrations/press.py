"""What a press of the kvpress library is called with: one layer of one prompt, as its hook would see it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from headkv.integrations.support import decoder_of
from headkv.prefill import Parts, Prefill
from headkv.scorers.attention import attention_weights


@dataclass(frozen=True, eq=False)
class PressCall:
    """The arguments of a press's `score` and `compress`, a batch of one.

    Attributes:
        module: the layer's attention; what a press writes on it stays off the user's model.
        hidden: `[1, n, hidden]`.
        keys, values: `[1, H, n, D]`.
        attentions: `[1, HQ, queries, n]` float32, or None.
        kwargs: of the attention's forward call.

    What is not known (of a prefill that no model made) is refused by name when a press reaches for it.
    """

    module: Any
    hidden: Any
    keys: Tensor
    values: Tensor
    attentions: Tensor | None
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, press: Any, prefill: Prefill, observed_queries: int | None) -> PressCall:
        """What `press` is called with for `prefill`, and the weights of so many last queries (None: of all)."""
        name, keys, n = type(press).__name__, prefill.keys[None], prefill.length
        hidden: Any = _Stub(name, "hidden_states", shape=torch.Size((1, n, 0)), device=keys.device)
        kwargs = _Known(name, attention_mask=None)
        kwargs["cache_position"] = torch.arange(n, device=keys.device)
        kwargs["position_ids"] = kwargs["cache_position"][None]
        if prefill.hidden is not None:
            hidden = kwargs["hidden_states"] = prefill.hidden[None]
            if prefill.parts.rotary is not None:
                cos, sin = prefill.parts.rotary(kwargs["cache_position"])
                kwargs["position_embeddings"] = (cos[None].to(hidden.dtype), sin[None].to(hidden.dtype))
        known = prefill.parts.module is not None
        module = _twin(prefill.parts) if known else _stub_module(name, prefill)
        return cls(module, hidden, keys, prefill.values[None], _weights(prefill, observed_queries), kwargs)


def _twin(parts: Parts) -> Any:
    """The layer's attention with the same weights: its own attributes, so that none is left on the user's."""
    twin = copy.copy(parts.module)
    twin._modules = dict(twin._modules)
    twin.rotary_emb = getattr(decoder_of(parts.model), "rotary_emb", None)
    twin.masked_key_indices = None
    return twin


def _weights(prefill: Prefill, observed_queries: int | None) -> Tensor | None:
    heads, n, dim = prefill.keys.shape
    count = n if observed_queries is None else min(observed_queries, n)
    if count == 0:
        return None
    if prefill.queries.shape[1] < count:
        raise ValueError(f"queries must hold the last {count} tokens, got {prefill.queries.shape[1]}")
    queries = prefill.queries[:, -count:].reshape(heads, -1, count, dim)
    weights = attention_weights(queries, prefill.keys, n - count, prefill.rule)
    return weights.reshape(1, -1, count, n)


def _stub_module(name: str, prefill: Prefill) -> _Stub:
    heads, _, dim = prefill.keys.shape
    config = _Stub(
        name, "module.config", num_attention_heads=prefill.queries.shape[0], num_key_value_heads=heads,
        num_hidden_layers=prefill.num_layers, head_dim=dim, _attn_implementation="headkv",
    )  # fmt: skip
    where: dict[str, Any] = {"layer_idx": prefill.layer_idx, "head_dim": dim, "masked_key_indices": None}
    return _Stub(name, "module", config=config, **where)


def _refuse(press: str, what: str) -> NotImplementedError:
    return NotImplementedError(
        f"{press} needs {what}, which this prefill does not have: run the method over a model "
        "(headkv.compress), whose attention must be of a form that headkv knows"
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


class _Known(dict[str, Any]):
    """The keyword arguments of the attention's forward call, as far as they are known."""

    def __init__(self, press: str, **known: Any) -> None:
        super().__init__(**known)
        self._press = press

    def __missing__(self, key: str) -> Any:
        raise _refuse(self._press, f"kwargs[{key!r}]")
