"""Every decoder family of the installed transformers, tiny and random: equal to eager and to the masked oracle, or refused.

`make families` writes what came out to `book/data/families.json`, which the book shows; without it, what comes out must be
what the file says, for families that both have.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from masked_oracle import oracle_cache
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

import headkv
from headkv.scorers import SnapKVScorer

FILE = Path(__file__).resolve().parents[1] / "book" / "data" / "families.json"
KNOWN = json.loads(FILE.read_text("utf-8"))["families"] if FILE.exists() else {}
FAMILIES = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING))
# Whatever a family calls its sizes.
SHAPE: dict[str, Any] = {
    **dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4),
    **dict(num_key_value_heads=2, head_dim=16, max_position_embeddings=512, kv_channels=16, is_decoder=True),
    **dict(n_embd=64, n_layer=2, n_head=4, ffn_dim=96, d_model=64, n_layers=2, n_heads=4, d_kv=16),
    **dict(num_local_experts=4, num_experts_per_tok=2, n_routed_experts=4, num_experts=4, n_group=2, topk_group=1),
    **dict(moe_intermediate_size=32, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, v_head_dim=16),
    **dict(qk_nope_head_dim=16, qk_rope_head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2),
}  # fmt: skip
LARGEST = 20_000_000  # parameters; families whose sizes have other names stay as large as they are
METHOD = headkv.AdaKV(budget=12, scorer=SnapKVScorer(window=4, kernel_size=3))
IDS = torch.randint(3, 97, (1, 30), generator=torch.Generator().manual_seed(5))
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def build(family: str, **more: Any) -> Any:
    """A tiny model; skips where that can not be made of the shape above."""
    try:
        config = CONFIG_MAPPING[family](**SHAPE, **more)
        with torch.device("meta"):
            size = sum(p.numel() for p in MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).parameters())
        if size > LARGEST:
            pytest.skip(f"{size / 1e6:.0f} million parameters")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        generate(model)
    except Exception as error:
        pytest.skip(f"not of this shape: {str(error).splitlines()[0][:120] if str(error) else type(error)}")
    return model


def generate(model: Any, cache: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    given = {} if cache is None else {"past_key_values": cache}
    out = model.generate(IDS, **OPTIONS, **given)
    return out.sequences, torch.stack(out.logits)


def outcome(family: str) -> str:
    """ "served", or why not."""
    model = build(family)
    tokens, logits = generate(model)
    try:
        session = headkv.compress(model, headkv.FullCache())
        session.__enter__()
    except ValueError as error:
        return str(error)
    try:
        same_tokens, same_logits = generate(model)
    finally:
        session.__exit__(None, None, None)
    assert torch.equal(same_tokens, tokens)
    torch.testing.assert_close(same_logits, logits, rtol=2e-4, atol=2e-4)
    with headkv.compress(model, METHOD) as compressed:
        got = generate(model)
    assert int(compressed.cache.lengths().min()) < IDS.shape[1]
    try:
        want = generate(model, oracle_cache(model, METHOD))
    finally:
        model.set_attn_implementation("eager")
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=2e-4, atol=2e-4)
    return "served"


@pytest.fixture(scope="module")
def written() -> Any:
    found: dict[str, str] = {}
    yield found
    if folder := os.environ.get("FAMILIES_DATA"):
        said = {
            "command": "make families",
            "transformers": transformers.__version__,
            "families": dict(sorted(found.items())),
        }
        (Path(folder) / "families.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, written: dict[str, str]) -> None:
    written[family] = outcome(family)
    if family in KNOWN and "FAMILIES_DATA" not in os.environ:
        assert (written[family] == "served") == (KNOWN[family] == "served"), written[family]
