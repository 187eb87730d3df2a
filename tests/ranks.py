"""What a model answers under every method: run by one process, and as a program by each of several ranks over gloo.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=… python tests/ranks.py FOLDER

FOLDER holds tiny models (`save_models`); each rank writes `rank-R.json` there.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from generation_cases import METHODS, SCORER, prompts

import headkv
from headkv.heads import HeadProfile
from headkv.methods.base import Keep
from headkv.models.tiny import tiny_model
from headkv.scorers import DefensiveScorer, ExpectedAttentionScorer, KeyNormScorer, KVzipScorer, RandomScorer

LAYERS, KV_HEADS, HEADS = 3, 4, 8
SHAPE = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
ODD = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 144}
FAMILIES = ("llama", "qwen3", "gemma2", "gpt_oss")


def profile(kind: str, seed: int, heads: str = "kv") -> HeadProfile:
    shape = (LAYERS, KV_HEADS if heads == "kv" else HEADS)
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return HeadProfile(model="tiny", kind=kind, heads=heads, scores=scores)


@dataclass(frozen=True)
class LoudestHead:
    """A method of a user's own that compares heads and knows nothing of ranks: the head of the largest keys keeps all."""

    observed_queries = 0

    def plan(self, prefill: Any) -> Keep:
        mask = torch.zeros(prefill.keys.shape[:2], dtype=torch.bool)
        mask[:, -5:] = True
        mask[int(prefill.keys.norm(dim=-1).sum(1).argmax())] = True
        return Keep(mask)


class OwnWay:
    """A method over the whole prompt that says nothing of heads."""

    whole_prompt, observed_queries = True, 0

    def plan_prompt(self, prompt: Any) -> list[Keep]:
        return [Keep.all(prompt.layer(i)) for i in range(prompt.num_layers)]


ADAPTIVE = headkv.AdaKV(budget=0.5, scorer=SCORER).allocator()
RAZOR = {"sinks": 1, "min_recent": 5, "window_share": 0.0}
CASES: dict[str, Any] = {
    **{name: method for name, method in METHODS.items() if not hasattr(method, "profiles")},
    "HeadKV": headkv.HeadKV(20, profile("retrieval", 0, "query"), scorer=SCORER),
    "DuoAttention": headkv.DuoAttention(profile("gate", 0), 0.5, 1, 5),
    "DuoAttention streaming": headkv.DuoAttention(profile("gate", 0), 0.5, 1, 5, streaming_prefill=True),
    "RazorAttention": headkv.RazorAttention(
        profile("echo", 1, "query"), profile("induction", 2, "query"), **RAZOR
    ),
    "AdaKV over all layers": headkv.AdaKV(budget=0.3, scorer=SCORER, scope="model"),
    "AdaKV without safeguard": headkv.AdaKV(budget=0.1, scorer=SCORER, safeguard=0.0),
    "Adaptive, no window": headkv.ScoredMethod(
        2, KeyNormScorer(window=0), headkv.AdaKV(2, safeguard=0.0).allocator()
    ),
    "Adaptive, no window, all layers": headkv.ScoredMethod(
        2, KeyNormScorer(window=0), headkv.AdaKV(2, safeguard=0.0).allocator(), "model"
    ),
    "DefensiveKV": headkv.DefensiveKV(0.3, DefensiveScorer(window=4, mass=0.2)),
    "DefensiveKV over all layers": headkv.DefensiveKV(
        0.3, DefensiveScorer(window=4, mass=0.2), scope="model"
    ),
    "CriticalKV": headkv.CriticalKV(0.3, SCORER),
    "CriticalKV adaptive": headkv.CriticalKV(0.3, SCORER, adaptive=True),
    "KVzip": headkv.KVzip(0.3, KVzipScorer(request=(5, 6), chunk=16, lead=2, sinks=1, window=4)),
    "KVzip with a profile": headkv.KVzip(0.3, KVzipScorer(window=4), 0.6, profile=profile("gate", 3)),
    "chance": headkv.ScoredMethod(0.3, RandomScorer(window=4), ADAPTIVE),
    "Expected Attention": headkv.ScoredMethod(
        0.3, ExpectedAttentionScorer(sinks=2, window=4, future=8), ADAPTIVE
    ),
    "a user's own": LoudestHead(),
}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "beams": ({}, {"num_beams": 2}),
    "prefill in chunks": ({}, {"prefill_chunk_size": 16}),
    "prompt lookup": ({}, {"prompt_lookup_num_tokens": 3}),
    "bounded while decoding": ({"decode_budget": 40, "every": 4}, {"max_new_tokens": 24}),
}


def save_models(folder: Path) -> None:
    """The models that ranks load, and one whose heads two ranks can not share."""
    for family in FAMILIES:
        tiny_model(family, **SHAPE).save_pretrained(folder / family)
    tiny_model("llama", **ODD).save_pretrained(folder / "odd")


def answer(model: Any, method: Any, options: dict[str, Any], **ask: Any) -> dict[str, Any]:
    """Tokens, what each head stores of them, and the cache's bytes, of this process."""
    given = (
        prompts() if not ask.keys() & {"prompt_lookup_num_tokens"} else {"input_ids": prompts(1)["input_ids"]}
    )
    ask = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **ask}
    with headkv.compress(model, method, **options) as session, torch.no_grad():
        tokens = model.generate(**given, **ask)[:, given["input_ids"].shape[1] :]
    return {
        "tokens": tokens.tolist(),
        "lengths": session.cache.lengths().tolist(),
        "nbytes": session.cache.nbytes,
    }


def answers(load: Any) -> dict[str, Any]:
    """Of all cases; `load` gives the model of a family."""
    model, found = load("llama"), {}
    for name, method in CASES.items():
        found[name] = answer(model, method, {})
    for name, (options, ask) in WAYS.items():
        found[name] = answer(model, CASES["AdaKV"], options, **ask)
    for family in FAMILIES[1:]:
        found[family] = answer(load(family), CASES["AdaKV"], {})
    return found


def refusals(load: Any, folder: Path) -> dict[str, str]:
    """What can not be done on several ranks, and the error."""
    model = load("llama")
    cache = headkv.RaggedCache.for_model(model, headkv.FullCache())
    with torch.no_grad():
        model(prompts()["input_ids"], past_key_values=cache)
    calls = {
        "odd": lambda: headkv.compress(load("odd"), CASES["AdaKV"]).__enter__(),
        "own way": lambda: headkv.RaggedCache.for_model(model, OwnWay()),
        "save": lambda: cache.save(folder / "never"),
        "reorder": lambda: headkv.models.reorder_heads(model, torch.arange(KV_HEADS).expand(LAYERS, -1)),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
        except (ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def main(folder: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = {"distributed_config": DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"]))}

    def load(family: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder / family, **config).eval()
        model.config._name_or_path = ""  # the profiles are of no folder
        return model

    found: dict[str, Any] = {"answers": answers(load), "refused": refusals(load, folder)}
    cache = headkv.RaggedCache.for_model(model := load("llama"), CASES["AdaKV"])
    with torch.no_grad():
        model(prompts()["input_ids"], past_key_values=cache)
    found["report"] = cache.rank_loads().layers.tolist()
    rank = torch.distributed.get_rank()
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
