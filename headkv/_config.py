"""What a model's configuration says, in one place."""

from __future__ import annotations

from typing import Any


def kv_heads(config: Any) -> int:
    """KV heads a layer of a decoder; the configuration of a model without groups does not say it."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
