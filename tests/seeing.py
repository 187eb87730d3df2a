"""Gemma 3 with a vision tower, small and random: a decoder that is a part of its model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

VISION = dict(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)


def seeing_model(text: dict[str, Any], **tokens: int) -> Any:
    """The model with this `text_config`; `tokens` are the ids that stand for images, as the configuration names them."""
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, **tokens)
    return Gemma3ForConditionalGeneration(config).eval()
