"""What a model's configuration says, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


def kv_heads(config: Any) -> int:
    """KV heads a layer of a decoder; the configuration of a model without groups does not say it."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def model_name(model: Any) -> str:
    """The name or folder that a transformers model, or its configuration, was loaded by; empty where it was made."""
    return str(getattr(getattr(model, "config", model), "_name_or_path", "") or "")


def class_or_name(model: Any) -> str:
    """How a profile calls the model that it was measured on."""
    return model_name(model) or type(model).__name__


# Kinds of layers, as transformers calls them, that store no keys and values: they hold a state of the text, or nothing.
WITHOUT_ATTENTION = frozenset({"linear_attention", "conv", "moe", "mlp"})


def layer_kinds(config: Any) -> list[str | None]:
    """What transformers calls each layer of a decoder; None where its configuration does not say."""
    layers = int(config.num_hidden_layers)
    said = (getattr(config, name, None) for name in ("layer_types", "layers_block_type"))
    return list(next((kinds for kinds in said if kinds), [None] * layers))[:layers]


def attention_layers(config: Any) -> list[int]:
    """Which layers of a decoder attend; all of them but in hybrids.

    >>> from types import SimpleNamespace
    >>> attention_layers(SimpleNamespace(num_hidden_layers=3, layer_types=["conv", "conv", "full_attention"]))
    [2]
    """
    return [i for i, kind in enumerate(layer_kinds(config)) if kind not in WITHOUT_ATTENTION]


@dataclass(frozen=True)
class CacheShape:
    """What decides how large a decoder's cache is.

    Attributes:
        num_layers: layers that attend.
        num_kv_heads: KV heads a layer.
        head_dim: width of a key and of a value.
        dtype: of keys and values.
        windows: the sliding window of each of them, None for a layer that sees all.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, model: Any) -> CacheShape:
        """Of a transformers decoder, or of its configuration, which may not say a dtype: float32 then."""
        config = getattr(model, "config", model).get_text_config()
        kinds, layers = layer_kinds(config), attention_layers(config)
        window = getattr(config, "sliding_window", None)
        dtype = getattr(model, "dtype", None) or getattr(config, "dtype", None)
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            len(layers),
            kv_heads(config),
            int(dim),
            getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32,
            tuple(None if kinds[i] in ("full_attention", "hybrid") else window for i in layers),
        )
