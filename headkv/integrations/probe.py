"""Whether headkv can serve a model's attention, found by asking it: each kind of attention module is called once.

The module reads two tokens through a cache and the attention function of ours, as in a prefill. It must hand new keys
and values on as it got them, and ask for nothing that `attention_forward` does not know. No list of models is kept.
"""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from headkv._config import WITHOUT_ATTENTION, attention_layers, layer_kinds
from headkv.integrations.carry import check_states
from headkv.integrations.hook import NAME, NewTokens, register
from headkv.integrations.support import (
    declares_interface,
    decoder_of,
    has_states,
    no_interface,
    own_layers,
    supported_config,
)
from headkv.logits import Rule

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel

TOKENS = 2


class _Witness:
    """The layer of a cache that only notes how far its tokens came, and of how many KV heads they were."""

    stored_dtype = None

    def __init__(self) -> None:
        self.given = False
        self.attended: int | None = None

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, rule: Rule) -> Tensor:
        if keys.shape != values.shape or keys.shape[-1] != q.shape[-1]:
            shapes = ", ".join(str(list(x.shape)) for x in (q, keys, values))
            raise ValueError(f"queries, keys and values must be of one width, got {shapes}")
        rule.check_heads(q)
        self.attended = keys.shape[1]
        return torch.zeros_like(q)


class _ProbeCache(Cache):
    """A cache of witnesses: every layer that is written to hands on its tokens."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.witness = _Witness()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.witness.given = True
        tokens = NewTokens(self.witness, key_states, value_states)
        return tokens, tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def check_attention(model: PreTrainedModel) -> None:
    """Every kind of attention in the decoder of `model` can be served.

    What can not be called so, e.g. because its weights are elsewhere, passes. The model stays as it is.

    Raises:
        ValueError: one can not, with what it asks for, or they differ in KV heads.
    """
    register()
    seen: dict[Any, int | None] = {}
    proven: set[int | None] = set()
    config = supported_config(model)
    kinds = layer_kinds(config)
    for module in decoder_of(model).modules():
        index = getattr(module, "layer_idx", None)
        numbered = isinstance(index, int) and not isinstance(module, GradientCheckpointingLayer)
        if getattr(module, "config", None) is None or not (
            numbered or hasattr(module, "num_key_value_groups")
        ):
            continue
        where = index if isinstance(index, int) and 0 <= index < len(kinds) else None  # None: layers share it
        kind = type(module), None if where is None else kinds[where]
        if kind[1] in WITHOUT_ATTENTION:
            continue
        if kind not in seen:
            seen[kind] = _check(model, module, kind[1])
        if seen[kind] is not None or any(x.is_meta for x in module.parameters()):
            proven.add(where)
    # Of models that do not say that they are served, every layer has to show it; or one for all, where layers share it.
    if not (declares_interface(model) or None in proven or proven >= set(attention_layers(config))):
        raise no_interface(type(model).__name__)
    if len(heads := {number for number in seen.values() if number is not None}) > 1:
        raise ValueError(
            f"model {type(model).__name__} can not be served, as its layers must have as many KV heads each, got "
            f"{' and '.join(map(str, sorted(heads)))}"
        )
    if has_states(model):
        check_states(decoder_of(model), own_layers(model))


def _check(model: PreTrainedModel, attention: Module, kind: str | None) -> int | None:
    """How many KV heads it has, if it could be called."""
    cache = _ProbeCache()
    why: Exception | None = None
    twin: Any = copy.copy(attention)  # with the same weights, but another configuration
    twin.config = copy.copy(attention.config)
    try:
        twin.config._attn_implementation = {"": NAME}
    except (AttributeError, TypeError, ValueError) as error:  # a configuration of a kind of its own
        raise ValueError(
            f"model {type(model).__name__} does not let its attention be chosen by name: {error}"
        ) from error
    twin.training = False
    try:
        with torch.no_grad():
            type(attention).forward(twin, **_arguments(model, attention, cache, kind))
    except Exception as error:  # of whatever kind: what matters is how far the tokens came
        why = error
    witness = cache.witness
    if witness.given and witness.attended is None:
        asks = "it does not hand them on to attention" if why is None else str(why).partition(". Either")[0]
        raise ValueError(
            f"model {type(model).__name__} can not be served, as its attention {type(attention).__name__} is of a kind "
            f"that headkv does not know: {asks}"
        ) from why
    return witness.attended


def _arguments(model: PreTrainedModel, attention: Any, cache: Cache, kind: str | None) -> dict[str, Any]:
    """Those of its `forward` that are known, by name: of two tokens at the beginning of a text."""
    weight = next((x for x in attention.parameters() if not x.is_meta and x.is_floating_point()), None)
    where: dict[str, Any] = {"device": model.device, "dtype": model.dtype}
    if weight is not None:
        where = {"device": weight.device, "dtype": weight.dtype}
    positions = torch.arange(TOKENS, device=where["device"])
    width = getattr(getattr(attention, "q_proj", None), "in_features", attention.config.hidden_size)
    hidden = torch.zeros(1, TOKENS, width, **where)
    known: dict[str, Any] = {
        "hidden_states": hidden,
        "position_ids": positions[None],
        "cache_position": positions,
        "attention_mask": None,
        "past_key_values": cache,
        "cache": cache,  # its name since transformers 5.24
        "use_cache": True,
        # of attention that layers share, which is told for which it is
        "layer_idx": attention_layers(supported_config(model))[0],
    }
    names = inspect.signature(type(attention).forward).parameters
    rotary: Any = getattr(decoder_of(model), "rotary_emb", None)
    if "position_embeddings" in names and rotary is not None:
        more = (kind,) if "layer_type" in inspect.signature(rotary.forward).parameters else ()
        known["position_embeddings"] = rotary(hidden, positions[None], *more)
    return {name: known[name] for name in names if name in known}
