"""Few entries in 16 bits, or more in 8 or 4: which answers better from as many bytes?

    python benchmarks/equal_bytes.py [--simulate]

The tuned SmolLM2 in bfloat16 reads texts in which words and numbers are hidden, once for all. Each method compresses
them without knowing the questions, to a share of the entries in bfloat16, and to as many more in each other storage of
the cache as have the same bytes; the full cache is stored in all. "int4 and 32" holds the 32 newest entries of each
row in bfloat16 besides (`residual_length`), and so many fewer in 4 bits. "First third" are the heads that the ablation
profile ranks first, stored in other bits than the rest (`headkv.HeadStorage`). An answer is right if every token of it
is the most likely one. KL is that of the full bfloat16 cache's next-token distribution to the compressed one's, in
nats, mean over tokens of questions and answers. Bytes are those of entries: keys, values, scales, positions, and newest
ones.

`--simulate` asks the same of other bits, which headkv does not store: keys and values of a text are rounded as it would
and kept in bfloat16, those of a question are not rounded; bytes are counted, not measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import isclose
from statistics import mean
from typing import Any, NamedTuple

import torch
from measure import Row, add_json, finish
from torch import Tensor

import headkv
from headkv.cache.mixed import stored_in
from headkv.cache.quantised import BITS, quantised, restored, rotated
from headkv.cache.ragged import STORAGES, Storage
from headkv.data import needle_texts
from headkv.data.needles import Needle
from headkv.evaluation.reading import Reading
from headkv.evaluation.roster import roster
from headkv.integrations.hook import NAME
from headkv.methods.selection import select
from headkv.models.attention import chosen_attention

METHODS = ("AdaKV", "HeadKV", "KVzip")
FULL = "full cache"
Bits = tuple[int, int]  # of keys and of values
BFLOAT16, INT4 = (16, 16), BITS["int4"]


class Stored(NamedTuple):
    """Bits in the third of the heads that the ablation profile ranks first, and in the others; as which of the cache's
    storages, None where that is simulated, with how many newest entries besides."""

    first: Bits
    others: Bits
    storages: tuple[Storage, Storage] | None = None
    residual_length: int = 0

    @classmethod
    def of(cls, first: Storage, others: Storage, residual_length: int = 0) -> Stored:
        """In two of the cache's storages, or one."""
        return cls(BITS.get(first, BFLOAT16), BITS.get(others, BFLOAT16), (first, others), residual_length)


STORED = {"bfloat16": Stored.of("model", "model")} | {
    name: Stored.of(name, name) for name in STORAGES if name in BITS
}
BY_HEAD = {
    "first third bfloat16, others int4": Stored.of("model", "int4"),
    "first third int8, others int4": Stored.of("int8", "int4"),
    "first third int4, others int8": Stored.of("int4", "int8"),
}
SIMULATED = {
    "K4 V4": Stored(INT4, INT4),
    "K4 V8": Stored((4, 8), (4, 8)),
    "K8 V3": Stored((8, 3), (8, 3)),
    "K3 V3": Stored((3, 3), (3, 3)),
    "first third int4, others K3 V3": Stored(INT4, (3, 3)),
}


def entry_bytes(bits: Bits, dim: int) -> float:
    """What one entry of one KV head takes: numbers, a scale for those that are codes, half a position each."""
    return sum(dim * one / 8 + (2 if one < 16 else 0) + 2 for one in bits)


def rounded(x: Tensor, bits: int) -> Tensor:
    """`x` `[m, D]` as it would be read from codes of so many bits: those of 3 are the odd numbers from -7 to 7."""
    if bits > 3:
        return restored(*quantised(x, bits)).to(x.dtype)
    turned = rotated(x.float())
    scale = (turned.abs().amax(-1, keepdim=True) / 8).to(x.dtype).float().clamp(min=1e-30)
    codes = 2 * (turned / scale * 0.5 + 3.5).round().clamp(0, 7) - 7
    return rotated(codes * scale).to(x.dtype)


def store(
    cache: headkv.RaggedCache, how: Stored, profile: headkv.HeadProfile, bits: list[list[Bits]]
) -> None:
    """Store what a cache of bfloat16 entries holds in another way, or round each head of each layer to its bits."""
    if how.storages is not None:
        every = headkv.HeadStorage.by_profile(profile, *how.storages).names
        for layer, names in zip(cache.attending, every, strict=True):
            layer.restore(stored_in(layer.filled(), names, how.residual_length))
        return
    for layer, of_heads in zip(cache.attending, bits, strict=True):
        rows = layer.filled()
        for begin, length, sides in zip(rows.start, rows.length, of_heads, strict=True):
            here = slice(int(begin), int(begin + length))
            for pool, one in zip((rows.keys, rows.values), sides, strict=True):
                if one < 16:
                    pool[here] = rounded(pool[here], one)


def compressed(
    reading: Reading, make: Any, share: float, sizes: Tensor, wanted: float
) -> tuple[headkv.RaggedCache, float]:
    """A method's cache whose entries take about `wanted` bytes, and theirs; `sizes` `[layers, H]`: of one of a head."""
    for _ in range(4):
        share = min(share, 1.0)
        cache = reading.compressed(make(share, reading.cache.seen + 1))
        found = float((cache.lengths()[:, 0] * sizes).sum())
        if isclose(found, wanted, rel_tol=1e-6):
            break  # the next would be the same
        share *= wanted / found
    return cache, found


def logits_of(reading: Reading, cache: headkv.RaggedCache, needle: Needle) -> Tensor:
    """Of every token of a question and its answer but the last, `[m, vocabulary]` float32."""
    asked = torch.cat([needle.question_ids, needle.answer_ids[:, :-1]], 1)
    with chosen_attention(reading.model, NAME):
        logits: Tensor = reading.model(asked, past_key_values=cache).logits
    return logits[0].float()


@torch.inference_mode()
def measure(texts: int, tokens: int, shares: Sequence[float], stored: dict[str, Stored]) -> list[Row]:
    """Every method at every share of the entries in bfloat16, and in the other storages at as many bytes."""
    model, tokenizer = headkv.load_smollm2(tuned=True)
    model = model.to(torch.bfloat16)
    make: dict[str, Any] = dict(roster(METHODS, model, tokenizer))  # those that read a text again do it once
    make[FULL] = lambda share, length: headkv.FullCache()
    profile = headkv.HeadProfile.for_model(model, "ablation")
    worth = profile.scores
    first = select(worth.view(1, -1), torch.tensor([worth.numel() // 3])).view_as(worth)
    dim = model.config.head_dim
    bits = {name: [[pair[not x] for x in row] for row in first.tolist()] for name, pair in stored.items()}
    sizes = {
        name: torch.tensor([[entry_bytes(x, dim) for x in row] for row in rows])
        for name, rows in bits.items()
    }
    rings = {name: how.residual_length * worth.numel() * 2 * 2 * dim for name, how in stored.items()}
    cells = [(FULL, 1.0, name) for name in stored]
    cells += [(method, share, name) for method in METHODS for share in shares for name in stored]
    found: dict[tuple[str, float, str], list[tuple[float, bool, float, float]]] = {cell: [] for cell in cells}
    hidden = needle_texts(
        tokenizer, texts=texts, lengths=[tokens], kinds=("words", "numbers"), split="validation"
    )
    for text in hidden:
        first_token = text.needles[0].question_ids[:, :1]
        reading = Reading(model, torch.cat([text.context_ids, first_token], 1))
        truth: list[Tensor] = []
        everything = reading.cache.seen * worth.numel()
        for cell in cells:
            method, share, name = cell
            size = sizes[name]
            wanted = everything * share * entry_bytes(BFLOAT16, dim) - rings[name]
            if method == FULL:
                wanted = everything * float(size.mean())
            if wanted <= 0:
                continue  # the newest entries alone are more
            guess = wanted / everything / float(size.mean())
            cache, held = compressed(reading, make[method], guess, size, wanted)
            held += rings[name]
            entries = float(cache.lengths().sum()) / everything
            store(cache, stored[name], profile, bits[name])
            saved = cache.snapshot()
            for number, needle in enumerate(text.needles):
                cache.restore(saved)
                logits = logits_of(reading, cache, needle)
                if cell == cells[0]:
                    truth.append(logits.log_softmax(-1))
                log, expected = logits.log_softmax(-1), truth[number]
                kl = float((expected.exp() * (expected - log)).sum(-1).mean())
                answer = needle.answer_ids[0]
                right = bool((logits[-answer.numel() :].argmax(-1) == answer).all())
                found[cell].append((kl, right, held, entries))
        print(f"text {len(found[cells[0]]) // len(text.needles)} of {texts}", flush=True)
    return [
        {
            "entries chosen by": method,
            "stored in": name,
            "entries": f"{mean(entries for *_, entries in one):.1%}",
            "MB": round(mean(held for _, _, held, _ in one) / 1e6, 2),
            "right": f"{mean(right for _, right, *_ in one):.2f}",
            "KL": f"{mean(kl for kl, *_ in one):.4f}",
        }
        for (method, share, name), one in found.items()
        if one
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
    parser.add_argument("--residual-lengths", type=int, nargs="+", default=[32], help="of int4's rows")
    parser.add_argument("--only", nargs="+", metavar="STORED", help="of what is printed, bfloat16 besides")
    parser.add_argument("--by-head", action="store_true", help="bits by head, too")
    parser.add_argument("--simulate", action="store_true", help="other bits, too")
    add_json(parser)
    options = parser.parse_args(arguments)
    stored = STORED | {f"int4 and {n}": Stored.of("int4", "int4", n) for n in options.residual_lengths}
    stored |= (BY_HEAD if options.by_head else {}) | (SIMULATED if options.simulate else {})
    if unknown := set(options.only or ()) - stored.keys():
        parser.error(f"--only must be of {', '.join(stored)}, got {', '.join(unknown)}")
    if options.only:
        stored = {name: how for name, how in stored.items() if name in ("bfloat16", *options.only)}
    rows = measure(options.texts, options.tokens, options.shares, stored)
    finish(options.json, {f"{options.texts} texts of {options.tokens} tokens": rows}, [])


if __name__ == "__main__":
    main()
