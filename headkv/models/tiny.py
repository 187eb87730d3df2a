"""Small random decoders of the supported families: their attention is real, their weights are noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from headkv import _checks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# family -> (configuration class, model class, what differs from the shared shape below)
_RECIPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "mistral-sliding": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 8}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
        },
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            # Every token goes to all experts: no rounding decides.
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
        },
    ),
}

FAMILIES: tuple[str, ...] = tuple(_RECIPES)

_MAMBA: dict[str, Any] = {
    **{"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_n_groups": 1},
    **{"mamba_expand": 2, "mamba_chunk_size": 8},
}
# The same of hybrids: layers without attention before, between and behind those with it, and layers that have both.
_HYBRIDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lfm2": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {
            "num_hidden_layers": 5,
            "layer_types": ["linear_attention", "full_attention"] * 2 + ["linear_attention"],
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16},
            **{"linear_value_head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2},
            **{"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
        },
    ),
    "jamba": (
        "JambaConfig",
        "JambaForCausalLM",
        {
            **{"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
            **{"num_experts_per_tok": 1, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        },
    ),
    "falcon_h1": (
        "FalconH1Config",
        "FalconH1ForCausalLM",
        {**_MAMBA, "num_hidden_layers": 2, "mamba_d_ssm": 128},
    ),
}

HYBRIDS: tuple[str, ...] = tuple(_HYBRIDS)

_SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    # Larger than usual, so that attention is far from uniform and an error in one entry shows in the logits.
    "initializer_range": 0.2,
}


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random decoder of `family`: 3 layers (or more), 4 query heads, 2 KV heads, head dim 16, vocabulary 97.

    The same arguments always give the same weights. The caller's random state is left as it was.

    Args:
        family: one of `FAMILIES` or `HYBRIDS`.
        seed: the seed of the weights.
        **overrides: configuration values to change, e.g. `num_hidden_layers=2`. A family whose layers differ
            in kind also needs its `layer_types` then.

    Returns:
        The model, float32, in evaluation mode, on the CPU.

    Raises:
        ValueError: `family` is none of them.
    """
    _checks.one_of("family", family, FAMILIES + HYBRIDS)
    import transformers

    config_name, model_name, special = {**_RECIPES, **_HYBRIDS}[family]
    config = getattr(transformers, config_name)(**{**_SHAPE, **special, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_name)(config)
    return model.to(torch.float32).eval()
