"""The presses of kvpress that mask, on a small model, and kvpress's own masked run of each, written to a file.

Run as a script, in an environment of kvpress's own, where headkv need not be; see `make test-kvpress`. Presses that would
download what they need get it from a seed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

# D / 2 queries share a fake key at most in one step: a group of 4, D = 64. More, and kvpress's masks may leak.
SHAPE = {
    "vocab_size": 257, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096, "initializer_range": 0.1,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TOKENS, STEPS = 700, 12


def text() -> torch.Tensor:
    """The prompt and what is fed after it, `[1, TOKENS + STEPS]`."""
    return torch.randint(3, 257, (1, TOKENS + STEPS), generator=torch.Generator().manual_seed(1))


class Letters:
    """A tokenizer for presses that make up a question: a letter a token."""

    chat_template = None

    @classmethod
    def from_pretrained(cls, name: str) -> Letters:
        return cls()

    def encode(
        self, words: str, return_tensors: str = "pt", add_special_tokens: bool = False
    ) -> torch.Tensor:
        return torch.tensor([[3 + ord(letter) % 250 for letter in words]])


def surrogate(kvpress: Any) -> Any:
    """KVzap with a seeded layer in place of the trained one."""
    from kvpress.presses.kvzap_press import KVzapConfig, KVzapModel

    class Seeded(kvpress.KVzapPress):
        def post_init_from_model(self, model: Any) -> None:
            torch.manual_seed(2)
            self.kvzap_model = KVzapModel(KVzapConfig(input_dim=256, output_dim=2, n_modules=3))

    return Seeded()


def presses() -> dict[str, Any]:
    """By name, each ready to use; called anew for every run."""
    import kvpress
    import numpy as np
    from kvpress.presses import kvzip_press
    from kvpress.presses.fastkvzip_press import FastKVzipGate

    kvzip_press.AutoTokenizer = Letters
    duo = kvpress.DuoAttentionPress(0.5)
    duo.load_attention_pattern = lambda model: (16, 64, np.random.default_rng(3).random((3, 2)))
    lukv = kvpress.LUKVPress(compression_ratio=0.5)
    lukv._load_budget_curves = lambda model: 0.3 + 0.4 * np.random.default_rng(5).random((99, 3, 2))
    fast = kvpress.FastKVzipPress(0.5)
    torch.manual_seed(4)
    fast.gates = [FastKVzipGate(i, 256, 2, 4, torch.float32) for i in range(3)]
    return {
        "AdaKV(SnapKV)": kvpress.AdaKVPress(kvpress.SnapKVPress(0.5)),
        "AdaKV(ExpectedAttention)": kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(0.7)),
        "AdaKV(KVzap)": kvpress.AdaKVPress(with_ratio(surrogate(kvpress), 0.6)),
        "CriticalAdaKV(SnapKV)": kvpress.CriticalAdaKVPress(kvpress.SnapKVPress(0.5)),
        "LUKV(ExpectedAttention)": lukv,
        "DuoAttention": duo,
        "DMS(Knorm)": kvpress.DMSPress(kvpress.KnormPress(), threshold=-12.5),
        "DMS(KVzap)": kvpress.DMSPress(surrogate(kvpress), threshold=0.0),
        "KVzip": kvpress.KVzipPress(0.5, chunk_size=256),
        "KVzip+": kvpress.KVzipPress(0.5, kvzip_plus_normalization=True),
        "KVgrad": kvpress.KVgradPress(0.5),
        "FastKVzip": fast,
        "KVCompose": kvpress.KVComposePress(compression_ratio=0.5, structured=False),
        "SnapKV": kvpress.SnapKVPress(0.5),
        "ThinK": kvpress.ThinKPress(0.5),
        "Decoding(AdaKV(Knorm))": kvpress.DecodingPress(kvpress.AdaKVPress(kvpress.KnormPress())),
    }


def with_ratio(press: Any, ratio: float) -> Any:
    press.compression_ratio = ratio
    return press


def middle(times: list[float]) -> float:
    """Seconds of a step: the median, without the first."""
    return sorted(times[1:])[len(times) // 2]


def masked_run(model: Any, press: Any) -> dict[str, Any]:
    """What kvpress itself does: which entries it masks, the logits of the steps after it, bytes and seconds."""
    from transformers import DynamicCache

    ids, cache = text(), DynamicCache()
    attentions = [layer.self_attn for layer in model.model.layers]
    for attention in attentions:
        attention.masked_key_indices = None
    logits, times = [], []
    with torch.no_grad():
        with press(model):
            # Older transformers tell the attention by themselves where the tokens stand; a press asks.
            model.model(input_ids=ids[:, :TOKENS], past_key_values=cache, cache_position=torch.arange(TOKENS))
        masked = [attention.masked_key_indices for attention in attentions]
        length = cache.get_seq_length()
        for i in range(TOKENS, TOKENS + STEPS):
            begin = time.perf_counter()
            where = {"position_ids": torch.tensor([[i]])}
            logits.append(model(ids[:, i : i + 1], past_key_values=cache, **where).logits[0, 0])
            times.append(time.perf_counter() - begin)
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    indices = [None if m is None else torch.stack([x.cpu() for x in m]) for m in masked]
    return {"masked": indices, "logits": torch.stack(logits), "length": length, "bytes": stored,
            "seconds": middle(times)}  # fmt: skip


def main(folder: str) -> None:
    """Make the model in `folder`, and run every press over it."""
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    model.save_pretrained(Path(folder) / "model")
    done: dict[str, Any] = {}
    for name, press in presses().items():
        try:
            done[name] = masked_run(model, press)
        except Exception as error:  # of kvpress: said in the table
            done[name] = {"error": f"{type(error).__name__}: {error}"}
    done["transformers"] = transformers.__version__
    torch.save(done, Path(folder) / "masked.pt")


if __name__ == "__main__":
    main(sys.argv[1])
