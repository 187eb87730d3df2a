"""Twice the entries in 8 bits, or half as many in 16: which answers better from as many bytes?

    python benchmarks/equal_bytes.py

The tuned SmolLM2 in bfloat16 reads texts in which words and numbers are hidden, once for all. Each method compresses
them without knowing the questions, to a share of the entries in bfloat16, and to as many more in int8 as have the same
bytes; the full cache is stored in both. An answer is right if every token of it is the most likely one. KL is that of
the full bfloat16 cache's next-token distribution to the compressed one's, in nats, mean over tokens of questions and
answers. Bytes are those of entries: keys, values, scales, positions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch
from measure import Row, add_json, finish
from torch import Tensor

import headkv
from headkv.data import needle_texts
from headkv.data.needles import Needle
from headkv.evaluation.reading import Reading
from headkv.evaluation.roster import roster
from headkv.integrations.hook import NAME
from headkv.models.attention import chosen_attention

METHODS = ("AdaKV", "HeadKV", "KVzip")
FULL = "full cache"


def entry_bytes(storage: str, dim: int, dtype: torch.dtype) -> int:
    """What one entry of one KV head takes."""
    one = dim * dtype.itemsize if storage == "model" else dim + dtype.itemsize
    return 2 * one + torch.int32.itemsize


def logits_of(reading: Reading, cache: headkv.RaggedCache, needle: Needle) -> Tensor:
    """Of every token of a question and its answer but the last, `[m, vocabulary]` float32."""
    asked = torch.cat([needle.question_ids, needle.answer_ids[:, :-1]], 1)
    with chosen_attention(reading.model, NAME):
        logits: Tensor = reading.model(asked, past_key_values=cache).logits
    return logits[0].float()


@torch.inference_mode()
def measure(texts: int, tokens: int, shares: Sequence[float]) -> list[Row]:
    """Every method at every share, in both storages."""
    model, tokenizer = headkv.load_smollm2(tuned=True)
    model = model.to(torch.bfloat16)
    make = roster(METHODS, model, tokenizer)  # those that read a text again do it once
    dim = model.config.head_dim
    wide, narrow = (entry_bytes(kind, dim, torch.bfloat16) for kind in ("model", "int8"))
    cells = [(FULL, 1.0, "model"), (FULL, 1.0, "int8")]
    for name in METHODS:
        for share in shares:
            cells += [(name, share, "model"), (name, share * wide / narrow, "int8")]
    found: dict[tuple[str, float, str], list[tuple[float, bool, int]]] = {cell: [] for cell in cells}
    hidden = needle_texts(
        tokenizer, texts=texts, lengths=[tokens], kinds=("words", "numbers"), split="validation"
    )
    for text in hidden:
        first = text.needles[0].question_ids[:, :1]
        reading = Reading(model, torch.cat([text.context_ids, first], 1))
        truth: list[Tensor] = []
        for cell in cells:
            name, share, storage = cell
            method: Any = headkv.FullCache()
            if name != FULL:
                method = make[name](share, text.context_ids.shape[1])
            cache = reading.compressed(method)
            size = int(cache.lengths().sum()) * (wide if storage == "model" else narrow)
            if storage == "int8":
                for layer in cache.attending:
                    layer.filled().quantise()
            saved = cache.snapshot()
            for number, needle in enumerate(text.needles):
                cache.restore(saved)
                logits = logits_of(reading, cache, needle)
                if cell == cells[0]:
                    truth.append(logits.log_softmax(-1))
                log, wanted = logits.log_softmax(-1), truth[number]
                kl = float((wanted.exp() * (wanted - log)).sum(-1).mean())
                answer = needle.answer_ids[0]
                right = bool((logits[-answer.numel() :].argmax(-1) == answer).all())
                found[cell].append((kl, right, size))
        print(f"text {len(found[cells[0]]) // len(text.needles)} of {texts}", flush=True)
    return [
        {
            "entries chosen by": name,
            "stored in": "bfloat16" if storage == "model" else "int8",
            "entries": f"{share:.1%}",
            "MB": round(mean(size for *_, size in one) / 1e6, 2),
            "right": f"{mean(right for _, right, _ in one):.2f}",
            "KL": f"{mean(kl for kl, *_ in one):.4f}",
        }
        for (name, share, storage), one in found.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=800, help="of a text")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.05, 0.1, 0.2], help="of entries, in 16 bits"
    )
    add_json(parser)
    options = parser.parse_args(arguments)
    rows = measure(options.texts, options.tokens, options.shares)
    finish(options.json, {f"{options.texts} texts of {options.tokens} tokens": rows}, [])


if __name__ == "__main__":
    main()
