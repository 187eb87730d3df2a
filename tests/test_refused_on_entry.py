"""Models whose attention headkv can not serve are refused on entry, by what it asks for; others are left as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation_cases import prompts
from test_masks import seeing
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import headkv
from headkv.models.tiny import FAMILIES, tiny_model

SHAPE = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_local_experts=4,
    num_experts_per_tok=2, n_routed_experts=4, moe_intermediate_size=32,
)  # fmt: skip
LATENT = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_group=2, topk_group=1,
    first_k_dense_replace=1, head_dim=8,
)  # fmt: skip
# family -> what differs from the shape, what the error names
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "deepseek_v3": (LATENT, "DeepseekV3ForCausalLM can not be served"),
    "deepseek_v2": (LATENT, "DeepseekV2ForCausalLM can not be served"),
    "diffllama": ({}, "DiffLlamaForCausalLM can not be served"),
    "jetmoe": (dict(kv_channels=16, num_key_value_heads=2), "JetMoeForCausalLM can not be served"),
    "doge": ({}, "DogeForCausalLM can not be served"),
    "mimo_v2_flash": (
        dict(v_head_dim=16, num_key_value_heads=2),
        "must have as many KV heads each, got 2 and 4",
    ),
}


def model_of(family: str, **more: Any) -> Any:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this release of transformers has no {family}")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**SHAPE, **more})).eval()


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("family", REFUSED)
def test_refused(family: str, train: bool) -> None:
    more, message = REFUSED[family]
    model = model_of(family, **more).train(train)
    before = model.config._attn_implementation
    for enter in (headkv.compress, headkv.RaggedCache.for_model):
        with pytest.raises(ValueError, match=message):
            enter(model, headkv.FullCache())
    assert model.config._attn_implementation == before and not model._forward_pre_hooks


@pytest.mark.parametrize(
    "family", ["gpt_oss", "mixtral", "olmo2", "granite", "cohere", "stablelm", "starcoder2", "glm"]
)
def test_refused_on_entry_or_served(family: str) -> None:
    """Never an error in the first `generate`, nor another text."""
    model = model_of(family)
    call = {**prompts(2, 20), "max_new_tokens": 3, "do_sample": False}
    want = model.generate(**call)
    try:
        block = headkv.compress(model, headkv.FullCache())
    except ValueError as error:
        assert str(error).startswith(f"model {type(model).__name__} ")
        return
    with block:
        assert torch.equal(model.generate(**call), want)


@pytest.mark.parametrize("family", [*FAMILIES, "seeing"])
def test_what_is_asked_is_left_alone(family: str) -> None:
    """No weight, mode, hook or configuration changes; hooks of the attention's user do not see the question."""
    model = seeing(["sliding", "full", "full"]) if family == "seeing" else tiny_model(family)
    model.train()
    seen: list[str] = []
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_pre_hook(lambda module, args: seen.append("call"))
    config, weights = model.config.to_dict(), [x.clone() for x in model.parameters()]
    own = {name: vars(module).keys() for name, module in model.named_modules()}
    headkv.compress(model, headkv.FullCache())
    assert not seen and model.training and all(module.training for module in model.modules())
    assert model.config.to_dict() == config
    assert all(map(torch.equal, model.parameters(), weights))
    assert {name: vars(module).keys() for name, module in model.named_modules()} == own
