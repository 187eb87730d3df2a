"""Which models headkv can serve, and with what."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headkv import _checks
from headkv._config import WITHOUT_ATTENTION, CacheShape, attention_layers, kv_heads, layer_kinds
from headkv._wrappers import unwrapped
from headkv.attention.api import BACKENDS, Backend
from headkv.cache import checks
from headkv.cache.ragged import MIN_HEADROOM, STORAGES, Storage
from headkv.heads.storage import HeadStorage
from headkv.integrations.decoding import DecodeBudget
from headkv.integrations.planning import ROLLBACK, prefill_windows
from headkv.integrations.ranks import Ranks, shared
from headkv.integrations.states import can_hold, state_of
from headkv.prefill import Parts

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedConfig, PreTrainedModel

    from headkv.methods.base import Method, PromptMethod


@dataclass(frozen=True)
class CacheOptions:
    """How a `RaggedCache` is stored and attended to, whatever its method: see `RaggedCache.for_model`.

    Raises:
        TypeError, ValueError: naming the option that is off.
    """

    backend: Backend = "auto"
    headroom: int = MIN_HEADROOM
    rollback: int = ROLLBACK
    chunked_prefill: bool = False
    decode: DecodeBudget | None = None
    storage: Storage | HeadStorage = "model"
    residual_length: int = 0
    ranks: Ranks | None = None  # that have the model's heads

    def __post_init__(self) -> None:
        _checks.one_of("backend", self.backend, BACKENDS)
        _checks.whole("headroom", self.headroom)
        _checks.whole("rollback", self.rollback)
        _checks.flag("chunked_prefill", self.chunked_prefill)
        if not isinstance(self.storage, HeadStorage):
            _checks.one_of("storage", self.storage, STORAGES)
        kinds = self.storage.kinds if isinstance(self.storage, HeadStorage) else {self.storage}
        checks.residual(self.residual_length, next(iter(kinds - {"model"}), "model"))

    def storage_of(self, layer_idx: int) -> Storage | Sequence[Storage]:
        """Of the layer's heads, those of this process: one for all, or one for each."""
        if isinstance(self.storage, str):
            return self.storage
        names = self.storage.names[layer_idx]
        if self.ranks is None:
            return names
        return tuple(names[h] for h in self.ranks.own(torch.arange(len(names))))


def supported_model(model: Any) -> PreTrainedModel:
    """The transformers model inside `model`, which may be wrapped, if headkv can serve it.

    Raises:
        TypeError, ValueError: naming what is not supported.
    """
    from transformers import PreTrainedModel

    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        parts = inner.named_children() if isinstance(inner, torch.nn.Module) else ()
        inside = [f".{name}" for name, part in parts if isinstance(part, PreTrainedModel)]
        hint = f"; pass the one inside it, {' or '.join(inside)}" if inside else ""
        raise TypeError(f"model must be a transformers model, got {type(inner).__name__}{hint}")
    name = type(inner).__name__
    if getattr(inner.config, "is_encoder_decoder", False):
        raise ValueError(f"model {name} is an encoder-decoder; headkv supports decoders only")
    if not (declares_interface(inner) or inner._can_set_attn_implementation()):
        raise no_interface(name)
    config = inner.config.get_text_config(decoder=True)
    kinds = set(layer_kinds(config))
    if unknown := kinds - ATTENTION - WITHOUT_ATTENTION:
        allowed = "allowed: full and sliding attention, and what hybrids have beside it"
        raise ValueError(f"model {name} has layers of kind {', '.join(sorted(map(str, unknown)))}; {allowed}")
    if not attention_layers(config):
        raise ValueError(
            f"model {name} has no layer with attention: there are no keys and values to compress"
        )
    if kinds - PLAIN_ATTENTION:
        _check_hybrid(inner)
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "kv_sharing_modes", None):
        raise ValueError(f"model {name} shares keys and values between layers, which headkv does not support")
    return inner


# Kinds of layers that attend; the hybrid ones hold a state of the text besides.
PLAIN_ATTENTION = {None, "full_attention", "sliding_attention"}
ATTENTION = PLAIN_ATTENTION | {"hybrid", "hybrid_sliding"}


def declares_interface(model: PreTrainedModel) -> bool:
    """Whether the model's class says that attention functions of others serve it; hybrids' classes do not."""
    return bool(getattr(model, "_supports_attention_backend", False))


def no_interface(name: str) -> ValueError:
    """Of a model whose attention can not be chosen by name."""
    return ValueError(f"model {name} does not call its attention through transformers' attention interface")


def _check_hybrid(model: PreTrainedModel) -> None:
    """A hybrid whose states transformers' common cache holds, and carries on over several tokens at once.

    Raises:
        ValueError: it is none.
    """
    import transformers

    name, file = type(model).__name__, type(decoder_of(model)).__module__
    if not can_hold():
        raise ValueError(
            f"model {name} is a hybrid, whose states transformers {transformers.__version__} does not carry on over "
            "several tokens; use a newer release"
        )
    kinds = (x for x in vars(sys.modules[file]).values() if isinstance(x, type) and x.__module__ == file)
    own = [kind.__name__ for kind in kinds if issubclass(kind, transformers.Cache)]
    if own:
        raise ValueError(f"model {name} keeps its states in a cache of its own class, {own[0]}")


def own_layers(model: PreTrainedModel) -> list[Any]:
    """What transformers' own cache for a hybrid consists of, empty; None for each layer of other models."""
    from transformers import DynamicCache

    config = supported_config(model)
    kinds = layer_kinds(config)
    if set(kinds) <= PLAIN_ATTENTION:
        return [None] * len(kinds)
    return list(DynamicCache(config=config).layers[: len(kinds)])


def has_states(model: PreTrainedModel) -> bool:
    """Whether layers of `model` hold states of the text."""
    return any(state_of(layer) is not None for layer in own_layers(model))


def supported_config(model: Any) -> PreTrainedConfig:
    """The configuration of the decoder in `model`, if headkv can serve it; see `supported_model`."""
    return supported_model(model).config.get_text_config(decoder=True)


# Rotary embeddings whose angles follow from the position alone; others depend on how long a text is.
FIXED = {"default", "linear", "llama3", "yarn", "proportional"}


def decoder_of(model: PreTrainedModel) -> Module:
    """The part of `model` that hands a cache to the layers: the decoder without its head."""
    from transformers import PreTrainedModel

    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
    # Where transformers looks for a decoder by its name, the head of some models is found.
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model


def parts_of(model: PreTrainedModel) -> list[Parts]:
    """What each layer's attention has besides queries, keys and values; see `headkv.prefill.Parts`.

    In hybrids: of the layers that attend.
    """
    decoder, config = decoder_of(model), supported_config(model)
    kinds, parts = layer_kinds(config), dict.fromkeys(attention_layers(config), Parts())
    for module in decoder.modules():
        index, output = getattr(module, "layer_idx", None), _output_weight(module)
        if index in parts and output is not None and _attends(module, kinds[index]):
            parts[index] = Parts(output, _rotary(decoder, module, kinds[index]), module, model)
    return list(parts.values())


def _attends(module: Module, kind: str | None) -> bool:
    """Whether a part of a layer of this kind is its attention, and not what holds its state."""
    return kind in PLAIN_ATTENTION or hasattr(module, "num_key_value_groups")


def _output_weight(attention: Module) -> Tensor | None:
    for name in ("o_proj", "out_proj", "dense"):
        weight = getattr(getattr(attention, name, None), "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point():
            return None if weight.is_meta else weight.detach()  # offloaded: it is nowhere between two calls
    return None


def _rotary(
    decoder: Module, attention: Module, kind: str | None
) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """Cosines and sines by position, where they follow from the position alone and turn halves against each other."""
    rotary: Any = getattr(decoder, "rotary_emb", None)
    types = getattr(rotary, "rope_type", "default")
    own = vars(sys.modules[type(attention).__module__])
    rotate_half, halves = own.get("rotate_half"), False
    if rotate_half is None and "_apply_rotary_emb" in own:  # GPT-OSS: a cosine for two dimensions
        rotate_half, halves = partial(own["_apply_rotary_emb"], cos=torch.zeros(2), sin=torch.ones(2)), True
    if rotary is None or rotate_half is None:
        return None
    if rotate_half(torch.arange(4.0)).tolist() != [-2.0, -3.0, 0.0, 1.0]:
        return None
    if not {types} <= FIXED if isinstance(types, str) else not set(types.values()) <= FIXED:
        return None
    more = (kind,) if "layer_type" in inspect.signature(rotary.forward).parameters else ()

    def at(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = rotary(torch.zeros(1, device=positions.device), positions[None], *more)
        cos, sin = (torch.cat([x, x], -1) if halves else x for x in (cos, sin))
        return cos[0].float(), sin[0].float()

    return at


def attentions_to_hear(model: PreTrainedModel, method: Method | PromptMethod) -> list[Module]:
    """The attention modules whose input `method` wants to see; see `headkv.prefill.Prefill.hidden`."""
    if not getattr(method, "observes_hidden", False):
        return []
    return [parts.module for parts in parts_of(model) if parts.module is not None]


def ranks_of(model: PreTrainedModel) -> Ranks | None:
    """The processes that share the heads of `model`; None where this one has all.

    Raises:
        ValueError: they can not share them evenly, or in a way that does not show.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    name, config, parts = type(model).__name__, supported_config(model), parts_of(model)
    width = config.num_attention_heads * CacheShape.of(config).head_dim
    if (getattr(model, "_tp_size", None) or 1) > 1 and any(
        part.output is None or part.output.shape[1] != width for part in parts
    ):
        raise ValueError(
            f"model {name} is shared out over ranks in a way that headkv does not know: it looks for an output "
            "projection that is a DTensor, as transformers makes it from 5.16 on"
        )
    return Ranks.of(parts, config, name)


def is_whole_prompt(method: Method | PromptMethod) -> bool:
    """Whether `method` decides once the whole prompt is read."""
    return bool(getattr(method, "whole_prompt", False))


def check_method(method: Method | PromptMethod, model: PreTrainedModel, chunked_prefill: bool) -> None:
    """A method that can serve this model.

    Raises:
        TypeError, ValueError: naming what does not fit.
    """
    moment = "plan_prompt" if is_whole_prompt(method) else "plan"
    if isinstance(method, type) or not callable(getattr(method, moment, None)):
        raise TypeError(f"method must be a headkv method such as headkv.AdaKV(budget=0.2), got {method!r}")
    for profile in getattr(method, "profiles", ()):
        profile.check_model(model)
    shared(method, ranks_of(model))
    if chunked_prefill:
        check_chunks(method, supported_config(model))


def check_storage(storage: Storage | HeadStorage, model: PreTrainedModel) -> None:
    """A storage that takes the keys and values of this model.

    Raises:
        ValueError: 4 bits, and an odd head_dim; or storages of other heads than the model's.
    """
    head_dim, config = CacheShape.of(model).head_dim, supported_config(model)
    if isinstance(storage, str):
        return checks.storage(storage, STORAGES, head_dim)
    for kind in storage.kinds:
        checks.storage(kind, STORAGES, head_dim)
    want = len(attention_layers(config)), kv_heads(config)
    if (got := (len(storage.names), len(storage.names[0]))) != want:
        allowed = f"one for each of the model's {want[0]} layers of {want[1]} KV heads"
        raise ValueError(f"storage must name {allowed}, got {got[0]} layers of {got[1]}")


def check_chunks(method: Method | PromptMethod, config: PreTrainedConfig) -> None:
    """A method that must know a prompt's length before it is read says so here, not at the first chunk."""
    layers = len(attention_layers(config))
    shape = {"layer_idx": 0, "num_layers": layers, "num_kv_heads": kv_heads(config)}
    prefill_windows(method, [None], **shape, sliding_window=None)
