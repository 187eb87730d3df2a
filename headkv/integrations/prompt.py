"""A prompt that all layers have read, for methods that decide once it is: its layers, and its text read again.

Until then the cache stores all of it; a `TextMemory` remembers the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from headkv.attention import api
from headkv.attention.api import Backend
from headkv.cache import RaggedLayer
from headkv.integrations.carry import check_carries
from headkv.integrations.hook import NewTokens
from headkv.integrations.planning import Observation, prefill_of, texts_of
from headkv.integrations.states import Beside, StatefulCache, selected, state_of
from headkv.integrations.text import Text
from headkv.logits import Rule
from headkv.prefill import Parts, Prefill

if TYPE_CHECKING:
    from torch.nn import Module

Watch = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True, eq=False)
class WaitingLayer:
    """One layer of a prompt that waits to be compressed: all of it, and the queries that a method asked for."""

    ragged: RaggedLayer
    observed: Observation
    backend: Backend
    parts: Parts


@dataclass(frozen=True, eq=False)
class CachedPrompt:
    """One sequence of a batch as a `headkv.methods.Prompt`.

    Args:
        decoder: reads more text.
        layers: of the cache.
        text: what the decoder was given.
        batch: which sequence.
        whole: all layers of the cache: `layers`, and in hybrids those that do not attend.
    """

    decoder: Module
    layers: Sequence[WaitingLayer]
    text: Text
    batch: int
    whole: Sequence[Any]
    _last: dict[int, Prefill] = field(default_factory=dict)
    _carries: list[bool] = field(default_factory=list)  # filled once states are known to go on

    @property
    def num_layers(self) -> int:
        """Layers of the model that attend."""
        return len(self.layers)

    @property
    def length(self) -> int:
        """Tokens of the prompt, padding not counted."""
        return int(self.layers[0].ragged.lengths()[self.batch, 0])

    @property
    def input_ids(self) -> Tensor:
        """The text, `[n]` int64, without padding.

        Raises:
            ValueError: the model was given embeddings in place of tokens.
        """
        if self.text.input_ids is None:
            raise ValueError(
                "input_ids must be given to the model by a method that reads them again, got embeddings"
            )
        where = self.layers[0].ragged.row(self.batch, 0).positions.long()
        ids = self.text.input_ids[self.batch]
        return ids[where.to(ids.device)]

    def layer(self, layer_idx: int) -> Prefill:
        """One layer, made when asked; the last one is remembered."""
        if layer_idx not in self._last:
            self._last.clear()
            waiting = self.layers[layer_idx]
            keys, values, valid = waiting.ragged.to_dense()
            text = texts_of(valid, keys.shape[0])[self.batch]
            self._last[layer_idx] = prefill_of(
                *(waiting.observed, keys, values, text, self.batch),
                layer_idx=layer_idx,
                num_layers=self.num_layers,
                parts=waiting.parts,
            )
        return self._last[layer_idx]

    @torch.no_grad()
    def read(self, input_ids: Tensor, watch: Watch) -> None:
        """Read `input_ids` `[m]` behind the prompt, and forget them again; see `headkv.methods.Prompt`."""
        if input_ids.ndim != 1 or input_ids.numel() == 0 or input_ids.dtype != torch.int64:
            got = f"{input_ids.dtype} {list(input_ids.shape)}"
            raise ValueError(f"input_ids must be int64 of shape [m] with at least one token, got {got}")
        if not self._carries and any(map(state_of, self.whole)):
            check_carries(self.decoder, self.whole)
            self._carries.append(True)
        self._last.clear()  # a layer that was spread out is memory that the model may need
        first = self.text.next_positions[self.batch]
        positions = first + torch.arange(input_ids.numel(), device=first.device)
        layers = [
            _ReadingLayer(self._sequence(x.ragged), x.backend, i, watch) for i, x in enumerate(self.layers)
        ]
        seen = layers[0].ragged.seen
        cache = StatefulCache(layers=self._around(layers))
        try:
            self.decoder(
                input_ids=input_ids[None], position_ids=positions[None], past_key_values=cache, use_cache=True
            )
        finally:
            for layer in layers:
                layer.ragged.crop(layer.ragged.seen - seen)

    def _around(self, layers: Sequence[_ReadingLayer]) -> list[Any]:
        """All layers of a cache for one more text: states go on in copies."""
        every: list[Any] = []
        attending = iter(layers)
        for layer in self.whole:
            own = state_of(layer)
            state = None if own is None else selected(own, self.batch)
            if layer is own:
                every.append(state)
            elif hasattr(layer, "attend"):
                reading = next(attending)
                reading.state = state
                every.append(reading)
            else:
                every.append(layer)  # one that holds nothing
        return every

    def _sequence(self, ragged: RaggedLayer) -> RaggedLayer:
        """This sequence's rows: the layer itself where it is the only one, else a copy."""
        if ragged.batch_size == 1:
            return ragged
        return ragged.select(torch.tensor([self.batch], device=ragged.device))


class _ReadingLayer(Beside, CacheLayerMixin):
    """A layer that stores new tokens behind a prompt, and shows them to a watcher."""

    def __init__(self, ragged: RaggedLayer, backend: Backend, layer_idx: int, watch: Watch) -> None:
        super().__init__()
        self.ragged, self.backend, self.layer_idx, self.watch = ragged, backend, layer_idx, watch
        self.is_initialized = True

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of what is stored."""
        return self.ragged.dtype

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        tokens = NewTokens(self, key_states, value_states)
        return tokens, tokens

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, rule: Rule) -> Tensor:
        self.watch(self.layer_idx, q[0], keys[0])
        self.ragged.append(keys, values, valid)
        return api.extend(q, self.ragged, rule, self.backend)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do."""

    def get_seq_length(self) -> int:
        return self.ragged.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.ragged.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length
