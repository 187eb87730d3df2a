"""A full cache whose evicted entries stay and are masked, as kvpress does it: for comparison only, it saves nothing.

Every head of a rectangular cache has the same number of entries. What a head should not see any more gets a fake key,
so far away from all queries of a call that its weight is 0. Queries that spread leave no such place: then it leaks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from headkv import _checks
from headkv.attention import dense
from headkv.integrations.hook import NAME, NewTokens, register
from headkv.integrations.planning import Observation, prefill_of
from headkv.integrations.support import (
    check_method,
    has_states,
    is_whole_prompt,
    parts_of,
    supported_model,
)
from headkv.logits import Rule
from headkv.models.attention import choose_attention, decoder_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headkv.methods.base import Method

FAR = 1e5
ROUNDS = 1000


def fake_key(queries: Tensor) -> Tensor:
    """A key that every one of these queries should find irrelevant, by the search of kvpress 0.5.

    It begins with the mean of the queries; as long as some point away from what is found, their mean is added. What
    points the other way is the key: -1e5 y / |y|^2. Only the sign of each product is asked for, not how large it is.

    Args:
        queries: `[m, D]`.

    Returns:
        `[D]` float32.

    Raises:
        ValueError: nothing is found in 1000 rounds.
    """
    queries = queries.float()
    found = queries.mean(0)
    for _ in range(ROUNDS):
        away = queries @ found <= 0
        if not bool(away.any()):
            return -FAR * found / found.square().sum()
        found = found + queries[away].mean(0)
    m, dim = queries.shape
    raise ValueError(f"queries must share a half space, but none was found for {m} of {dim} dimensions")


class MaskedLayer(DynamicLayer):
    """One layer: all keys and values, and which of the prompt's a head should not see, `hidden` `[H, n]` bool.

    Attributes:
        leaked: the greatest share of its attention that a query of the latest call gave to hidden entries.
    """

    def __init__(self, method: Method, where: dict[str, Any], fake_keys: bool) -> None:
        super().__init__()
        self.method, self.where, self.fake_keys = method, where, fake_keys
        self.hidden: Tensor | None = None
        self.leaked = 0.0

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """Of keys and values; None before the first token."""
        return self.dtype if self.is_initialized else None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Wrap the new tokens for the attention function, which stores them."""
        tokens = NewTokens(self, key_states, value_states)
        return tokens, tokens

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, rule: Rule) -> Tensor:
        """Store T new tokens and attend: `q` `[1, HQ, T, D]` -> the same. The first call is the prompt.

        Raises:
            ValueError: a batch or padding; or no fake key is found, and keys are overwritten up to there.
        """
        if q.shape[0] != 1 or valid is not None:
            raise ValueError(f"a MaskedCache serves one sequence without padding, got {q.shape[0]}")
        every, values = super().update(keys, values)
        if self.hidden is None:
            observed = Observation.of(q, None, self.method.observed_queries, rule)
            self.hidden = ~self.method.plan(prefill_of(observed, keys, values, None, 0, **self.where)).mask
            return dense.prefill(q, keys, values, rule)
        groups = q[0].unflatten(0, (every.shape[1], -1))  # [H, G, T, D]
        rules = [rule.of_heads([h], len(groups)) for h in range(len(groups))]
        rows = zip(groups, every[0], values[0], self.hidden, rules, strict=True)
        self.leaked = 0.0
        out = [self._row(*row) for row in rows]
        return torch.cat(out)[None].to(q.dtype)

    def _row(self, queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, rule: Rule) -> Tensor:
        """Attention of one KV head's queries `[G, T, D]` over `[n, D]`."""
        hidden = torch.cat([hidden, hidden.new_zeros(len(keys) - len(hidden))])
        if self.fake_keys and bool(hidden.any()):
            keys[hidden] = fake_key(queries.flatten(0, 1)).to(keys.dtype)  # in place: the true ones are lost
        at = torch.arange(len(keys), device=keys.device)
        logits = rule.logits(queries.float(), keys.float())  # [G, T, n]
        logits = logits.masked_fill(rule.hides(at[-queries.shape[1] :, None], at), -torch.inf)
        if not self.fake_keys:
            logits = logits.masked_fill(hidden, -torch.inf)
        weights = rule.softmax(logits)
        self.leaked = max(self.leaked, float(weights[..., hidden].sum(-1).max()))
        return weights @ values.float()


class MaskedCache(Cache):
    """A transformers cache that hides what a method evicts, and stores it all the same.

    For comparison with `RaggedCache`: the same entries are seen, nothing is saved. What slides with the text (windows
    of a `Keep`) is as it was at the end of the prompt.
    """

    layers: list[MaskedLayer]  # type: ignore[assignment]

    @classmethod
    def for_model(cls, model: PreTrainedModel, method: Method, *, fake_keys: bool = True) -> MaskedCache:
        """An empty cache for one prompt, without padding; sets the model's attention to "headkv".

        Args:
            model: a decoder of transformers.
            method: one that decides layer by layer.
            fake_keys: hide by fake keys, which may leak; False: by a mask of the attention, which never does.

        Raises:
            TypeError, ValueError: on what is not supported, by name.
        """
        model = supported_model(model)
        check_method(method, model, chunked_prefill=False)
        _checks.flag("fake_keys", fake_keys)
        if is_whole_prompt(method):
            raise ValueError(f"method must decide layer by layer, got {method!r}")
        if has_states(model):
            raise ValueError(f"model must hold no states of the text beside keys, got {type(model).__name__}")
        parts = parts_of(model)
        where = [{"layer_idx": i, "num_layers": len(parts), "parts": part} for i, part in enumerate(parts)]
        register()
        if decoder_attention(model) != NAME:
            choose_attention(model, NAME)
        return cls(layers=[MaskedLayer(method, x, fake_keys) for x in where])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, the hidden ones among them."""
        stored = [(layer.keys, layer.values) for layer in self.layers]
        return sum(x.nbytes for pair in stored for x in pair if x is not None)

    @property
    def leaked(self) -> float:
        """The greatest share of its attention that a query of the latest call gave to entries it should not see."""
        return max(layer.leaked for layer in self.layers)
