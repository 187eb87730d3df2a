"""What tests of generation share: every method, sized for tiny models, prompts with padding, a streamer that keeps."""

from __future__ import annotations

import torch
from transformers.generation.streamers import BaseStreamer

import headkv
from headkv.heads import HeadProfile
from headkv.scorers import SnapKVScorer

LAYERS, KV_HEADS, HEADS = 3, 2, 4
SCORER = SnapKVScorer(window=4, kernel_size=3)


def profile(kind: str, heads: str = "kv", seed: int = 0) -> HeadProfile:
    shape = (LAYERS, KV_HEADS if heads == "kv" else HEADS)
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return HeadProfile(model="tiny", kind=kind, heads=heads, scores=scores)


RAZOR = headkv.RazorAttention(
    echo=profile("echo", "query", 1),
    induction=profile("induction", "query", 2),
    sinks=1,
    min_recent=5,
    window_share=0.0,
)
METHODS = {
    "FullCache": headkv.FullCache(),
    "SnapKV": headkv.SnapKV(budget=20, scorer=SCORER),
    "PyramidKV": headkv.PyramidKV(budget=20, scorer=SCORER),
    "AdaKV": headkv.AdaKV(budget=0.5, scorer=SCORER),
    "AdaKV pyramid": headkv.AdaKV(budget=0.5, scorer=SCORER, pyramid=True),
    "HeadKV": headkv.HeadKV(budget=20, profile=profile("retrieval", "query"), scorer=SCORER),
    "DuoAttention": headkv.DuoAttention(profile=profile("gate"), sparsity=0.5, sinks=1, recent=5),
    "RazorAttention": RAZOR,
    "StreamingLLM": headkv.StreamingLLM(budget=7, sinks=2),
    "RandomHeads": headkv.RandomHeads(share=0.5, sinks=1, recent=5, seed=0),
}


def prompts(batch: int = 3, n: int = 60) -> dict[str, torch.Tensor]:
    """Random prompts of n, n - 6, n - 13 tokens, padded on the left; the first repeats itself, for prompt lookup."""
    ids = torch.randint(3, 97, (batch, n), generator=torch.Generator().manual_seed(7))
    ids[0, n // 2 :] = ids[0, : n - n // 2]
    mask = torch.ones_like(ids)
    for b, pad in enumerate((0, 6, 13)[:batch]):
        ids[b, :pad], mask[b, :pad] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


class Collect(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self):
        self.tokens: list[int] = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append(-1)
