"""What a KV cache costs: bytes a token = 2 x layers x KV heads x head dim x bytes a number."""

from __future__ import annotations

from typing import Any

import traitlets as t

from headkv.widgets import checks
from headkv.widgets.base import Picture, bundle

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "int4": 0.5}
CARDS = tuple(int(gb * 1e9) for gb in (16, 24, 80, 141))  # memory of cards that are sold
PRESETS: tuple[dict[str, Any], ...] = (
    {
        "name": "SmolLM2-135M",
        "layers": 30,
        "kv_heads": 3,
        "head_dim": 64,
        "dtype": "float32",
        "weight_bytes": 4 * 134_515_008,
    },
    {
        "name": "Llama-3.1-8B",
        "layers": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "dtype": "bfloat16",
        "weight_bytes": 2 * 8_030_261_248,
    },
)


class CacheBill(Picture):
    """A calculator of a cache's bytes, with the bill as the context grows, against the weights.

    Args:
        layers, kv_heads, head_dim: the model's sizes (default: SmolLM2-135M).
        dtype: "float32", "bfloat16", "float16", "int8" or "int4" (two numbers a byte).
        context: tokens in the cache, 128 to 1,048,576 on the slider.
        share: share of the cache kept, in (0, 1].
        weight_bytes: bytes of the model's weights, 0 to leave them out.
        batch: texts at once, each with a cache of its own; a power of two, 1 to 256.
        card_bytes: a card's memory, to see what fits; 0 for none.
        title: a line above the picture.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example:
        >>> CacheBill().bytes_per_token
        46080
        >>> CacheBill(layers=32, kv_heads=8, head_dim=128, dtype="bfloat16").bytes_per_token
        131072
    """

    _esm = bundle("cache_bill.js")

    layers = t.Int().tag(sync=True)
    kv_heads = t.Int().tag(sync=True)
    head_dim = t.Int().tag(sync=True)
    dtype = t.Enum(tuple(DTYPES)).tag(sync=True)
    context = t.Int().tag(sync=True)
    share = t.Float().tag(sync=True)
    weight_bytes = t.Int().tag(sync=True)
    batch = t.Int().tag(sync=True)
    card_bytes = t.Int().tag(sync=True)
    cards = t.List(t.Int()).tag(sync=True)
    presets = t.List(t.Dict(), default_value=list(PRESETS)).tag(sync=True)
    title = t.Unicode().tag(sync=True)

    def __init__(
        self,
        *,
        layers: int = 30,
        kv_heads: int = 3,
        head_dim: int = 64,
        dtype: str = "float32",
        context: int = 4096,
        share: float = 1.0,
        weight_bytes: int | None = None,
        batch: int = 1,
        card_bytes: int = 0,
        title: str | None = None,
    ) -> None:
        sizes = {
            "layers": checks.whole("layers", layers, 1),
            "kv_heads": checks.whole("kv_heads", kv_heads, 1),
            "head_dim": checks.whole("head_dim", head_dim, 1),
            "dtype": checks.one_of("dtype", dtype, tuple(DTYPES)),
        }
        known = (p["weight_bytes"] for p in PRESETS if all(p[key] == value for key, value in sizes.items()))
        if weight_bytes is None:
            weight_bytes = next(known, 0)
        if checks.whole("batch", batch, 1, 256) & (batch - 1):
            raise ValueError(f"batch must be a power of two, 1 to 256, got {batch}")
        memory = checks.whole("card_bytes", card_bytes, 0)
        super().__init__(
            batch=batch,
            card_bytes=memory,
            cards=sorted({*CARDS, memory} - {0}),
            **sizes,
            context=checks.whole("context", context, 1),
            share=checks.share("share", share, zero=False),
            weight_bytes=checks.whole("weight_bytes", weight_bytes, 0),
            title=title or "",
        )

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token adds to the full cache."""
        numbers = 2 * self.layers * self.kv_heads * self.head_dim
        return int(numbers * DTYPES[self.dtype])

    @property
    def tokens_that_fit(self) -> int:
        """Tokens, of all texts together, whose kept cache fits on the card beside the weights; 0 without a card."""
        return int(max(0, self.card_bytes - self.weight_bytes) / (self.bytes_per_token * self.share))

    def describe(self) -> str:
        full = self.bytes_per_token * self.context * self.batch
        texts = "" if self.batch == 1 else f" in each of {self.batch} texts"
        return (
            f"CacheBill: 2 x {self.layers} layers x {self.kv_heads} KV heads x {self.head_dim} numbers x "
            f"{DTYPES[self.dtype]} bytes = {self.bytes_per_token:,} bytes a token; {full:,} bytes for "
            f"{self.context:,} tokens{texts}."
        )
