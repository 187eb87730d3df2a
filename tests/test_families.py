"""Every decoder family of the installed transformers, tiny and random: equal to eager and to the masked oracle, or refused.

`make families` runs it with several releases of transformers and writes what came out to `book/data/families.json`, which
the README and the book show; without it, what comes out must be what the file says of this release, if it knows it.
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
from packaging.version import Version
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

import headkv
from headkv.scorers import SnapKVScorer

FILE = Path(__file__).resolve().parents[1] / "book" / "data" / "families.json"
VERSION = transformers.__version__


def said(folder: Path) -> dict[str, Any]:
    """What the file there says, without this release and other patches of it."""
    path = folder / "families.json"
    versions = json.loads(path.read_text("utf-8"))["versions"] if path.exists() else {}
    return {version: found for version, found in versions.items() if minor(version) != minor(VERSION)}


def minor(version: str) -> tuple[int, ...]:
    return Version(version).release[:2]


EVERY = json.loads(FILE.read_text("utf-8"))["versions"]
KNOWN = next((found for version, found in EVERY.items() if minor(version) == minor(VERSION)), {})
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
# What hybrids need besides, or can not do with (None): so few layers of each kind, or states so small.
LINEAR, CONV = ({"layer_types": [kind, "full_attention"]} for kind in ("linear_attention", "conv"))
MAMBA2 = dict(mamba_n_heads=4, mamba_d_head=32, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8)
DELTA = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16
)
ZAMBA = dict(layers_block_type=["linear_attention", "hybrid"] * 2, num_hidden_layers=4, attention_head_dim=32)
INDEXER = dict(
    indexer_n_heads=2, indexer_kv_heads=2, indexer_head_dim=16, indexer_budget=16, indexer_compress_ratio=2
)
MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["bailing_hybrid", "kimi_linear"], {**LINEAR, "num_key_value_heads": 4}),
    **dict.fromkeys(["lfm2", "lfm2_moe", "lfm3"], CONV),
    **dict.fromkeys(["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"], {**LINEAR, **DELTA}),
    "bamba": {**MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 128},
    "granitemoehybrid": {**MAMBA2, **LINEAR},
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4),
    **dict.fromkeys(["zamba", "zamba2"], ZAMBA),
    "zaya": dict(num_experts_per_tok=1, layer_types=["hybrid", "hybrid_sliding"], sliding_window=16),
    "recurrent_gemma": dict(num_hidden_layers=3, attention_window_size=16, lru_width=64),
    "mamba2": dict(expand=2, num_heads=4, head_dim=32, n_groups=1),
    "qwen4_exp_text": {**LINEAR, **DELTA, **INDEXER},
}
LARGEST = 20_000_000  # parameters; families whose sizes have other names stay as large as they are
METHOD = headkv.AdaKV(budget=12, scorer=SnapKVScorer(window=4, kernel_size=3))
IDS = torch.randint(3, 97, (1, 30), generator=torch.Generator().manual_seed(5))
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def build(family: str) -> Any:
    """A tiny model; skips where that can not be made of the shape above."""
    try:
        shape = {**SHAPE, **MORE.get(family, {})}
        config = CONFIG_MAPPING[family](**{name: x for name, x in shape.items() if x is not None})
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


def generate(model: Any, cache: Any = None, again: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    given = {} if cache is None else {"past_key_values": cache}
    ids = torch.cat([IDS, IDS], 1) if again else IDS  # a second turn
    out = model.generate(ids, **OPTIONS, **given)
    return out.sequences, torch.stack(out.logits)


def outcome(family: str) -> str:
    """ "served", "served: " with what is left out, or why not."""
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
    result = "served"
    with headkv.compress(model, METHOD) as compressed:
        got = [generate(model)]
        assert int(compressed.cache.lengths().min()) < IDS.shape[1]
        try:
            got.append(generate(model, compressed.cache, again=True))
        except ValueError as error:
            result = f"served: {error}"
    try:
        oracle = oracle_cache(model, METHOD)
        for turn, (tokens, logits) in enumerate(got):
            same_tokens, same_logits = generate(model, oracle, again=bool(turn))
            assert torch.equal(tokens, same_tokens)
            torch.testing.assert_close(logits, same_logits, rtol=2e-4, atol=2e-4)
    finally:
        model.set_attn_implementation("eager")
    return result


@pytest.fixture(scope="module")
def written() -> Any:
    found: dict[str, str] = {}
    yield found
    if folder := os.environ.get("FAMILIES_DATA"):
        versions = {**said(Path(folder)), VERSION: dict(sorted(found.items()))}
        ordered = {version: versions[version] for version in sorted(versions, key=Version)}
        text = json.dumps({"command": "make families", "versions": ordered}, indent=1)
        (Path(folder) / "families.json").write_text(text + "\n", encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, written: dict[str, str]) -> None:
    written[family] = outcome(family)
    if family in KNOWN and "FAMILIES_DATA" not in os.environ:
        assert written[family][:7] == KNOWN[family][:7], written[family]
