"""Which models headkv can serve, and with what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headkv._config import kv_heads
from headkv.integrations.planning import prefill_windows

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedConfig, PreTrainedModel

    from headkv.methods.base import Method, PromptMethod


def supported_config(model: Any) -> PreTrainedConfig:
    """The configuration of the decoder in `model`, if headkv can serve it.

    Raises:
        TypeError, ValueError: naming what is not supported.
    """
    if not hasattr(model, "config") or not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model {name} is an encoder-decoder; headkv supports decoders only")
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"model {name} does not call its attention through transformers' attention interface"
        )
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ValueError(
            f"model {name} has layers of kind {', '.join(sorted(kinds))}; allowed: full and sliding attention"
        )
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "kv_sharing_modes", None):
        raise ValueError(f"model {name} shares keys and values between layers, which headkv does not support")
    return config


def decoder_of(model: PreTrainedModel) -> Module:
    """The part of `model` that hands a cache to the layers: the decoder without its head."""
    decoder: Module = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    return decoder


def check_chunks(method: Method | PromptMethod, config: PreTrainedConfig) -> None:
    """A method that must know a prompt's length before it is read says so here, not at the first chunk."""
    shape = {"layer_idx": 0, "num_layers": config.num_hidden_layers, "num_kv_heads": kv_heads(config)}
    prefill_windows(method, [None], **shape, sliding_window=None)
