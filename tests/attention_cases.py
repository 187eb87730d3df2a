"""One table of ragged attention cases, and the float64 truth that every backend is held against."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headkv.cache import RaggedLayer
from headkv.cache.ragged import Storage


@dataclass(frozen=True)
class Case:
    """`lengths[batch][head]` entries a row; `tokens` queries, the last ones of the text."""

    name: str
    lengths: tuple[tuple[int, ...], ...]
    group: int = 2
    dim: int = 64
    tokens: int = 1
    sinks: int = 0
    recent: int = 0
    windowed: tuple[int, ...] = ()  # rows that are windowed; empty: all, if recent > 0
    compensate: bool = False
    sliding_window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    gaps: bool = field(default=True)  # positions with gaps, as after an eviction
    sink_logits: tuple[float, ...] = ()  # of the query heads, again and again; empty: none has a sink
    sink_dtype: torch.dtype = torch.float32
    storage: Storage = "model"
    residual_length: int = 0

    def __str__(self) -> str:
        return self.name

    def error_over_codes(self, backend: str) -> float:
        """Of outputs around 1, before they are rounded to the dtype. In Rust queries and weights of 16-bit models are whole
        numbers of 16 bits, where the CPU multiplies such."""
        return 2e-4 if backend == "rust" and self.dtype != torch.float32 else 4e-6

    def within_codes(self, want: Tensor, backend: str) -> Tensor:
        """How far outputs over codes may be from `want`, float64."""
        largest = max(1.0, float(want.abs().max()))
        return torch.finfo(self.dtype).eps * want.abs() + self.error_over_codes(backend) * largest

    def build(self, device: str = "cpu") -> tuple[Tensor, RaggedLayer]:
        """Queries `[B, HQ, T, D]` and a layer whose unused slots hold NaN, those of codes as their scales."""
        generator = torch.Generator().manual_seed(sum(map(ord, self.name)))
        batch, heads, longest = len(self.lengths), len(self.lengths[0]), max(map(max, self.lengths))
        seen = max(longest * 2 if self.gaps else longest, self.tokens)
        rows, positions = [], []
        for lengths in self.lengths:
            rows.append([])
            positions.append([])
            for n in lengths:
                last = min(n, self.tokens)  # the new tokens are there in every row
                old = torch.randperm(seen - last, generator=generator)[: n - last].sort().values
                if not self.gaps:
                    old = torch.arange(seen - n, seen - last)
                positions[-1].append(torch.cat([old, torch.arange(seen - last, seen)]))
                rows[-1].append(
                    tuple(torch.randn(n, self.dim, generator=generator).to(self.dtype) for _ in range(2))
                )
        windowed = torch.zeros(batch * heads, dtype=torch.int64)
        windowed[list(self.windowed) or slice(None)] = 1
        windowed = windowed.view(batch, heads)
        layer = RaggedLayer.from_rows(
            rows, positions=positions, sinks=windowed * self.sinks, recent=windowed * self.recent, headroom=3
        )
        layer.seen = seen
        free = torch.ones(layer.keys.shape[0], dtype=torch.bool)
        for r in range(layer.rows):
            free[int(layer.start[r]) : int(layer.start[r] + layer.length[r])] = False
        layer.quantise(self.storage, self.residual_length)
        if self.storage == "model":
            layer.keys[free], layer.values[free] = float("nan"), float("nan")
        else:
            layer.scales[free] = float("nan")
        if self.compensate:
            layer.count = torch.where(layer.recent > 0, torch.arange(layer.rows) * 3, -1)
            sums = (
                torch.randn(2, layer.rows, self.dim, generator=generator)
                * layer.count.clamp(min=0)[:, None] ** 0.5
            )
            layer.key_sum, layer.value_sum = sums[0].clone(), sums[1].clone()
        q = torch.randn(batch, heads * self.group, self.tokens, self.dim, generator=generator).to(self.dtype)
        layer.to(device)
        return q.to(device), layer

    def options(self, q: Tensor) -> dict:
        """Keyword arguments of `ragged_decode` and `ragged_extend` of these queries."""
        options = {"scale": self.scale, "sliding_window": self.sliding_window, "softcap": self.softcap}
        if self.sink_logits:
            every = torch.tensor(list(itertools.islice(itertools.cycle(self.sink_logits), q.shape[1])))
            options["sink_logits"] = every.to(q.device, self.sink_dtype)
        return options


def truth(case: Case, q: Tensor, layer: RaggedLayer, eager: torch.dtype | None = None) -> Tensor:
    """What attention should be, `[B, HQ, T, D]` float64: each row spread over the whole text, a boolean mask, softmax.

    With `eager`, what PyTorch gives instead when keys, values and weights are of that dtype, as models compute it.
    """
    q, tokens = q.cpu().double(), case.tokens
    learned = case.options(q).get("sink_logits")
    out = torch.zeros_like(q)
    scale = case.scale if case.scale is not None else case.dim**-0.5
    for b in range(layer.batch_size):
        for h in range(layer.num_kv_heads):
            r = b * layer.num_kv_heads + h
            keys, values, positions = (t.cpu() for t in layer.row(b, h))
            dense_keys, dense_values = torch.zeros(2, layer.seen, case.dim, dtype=torch.float64)
            dense_keys[positions.long()], dense_values[positions.long()] = keys.double(), values.double()
            stored = torch.zeros(layer.seen, dtype=torch.bool)
            stored[positions.long()] = True
            sinks, recent = int(layer.sinks[r]), int(layer.recent[r])
            for t in range(tokens):
                here = layer.seen - tokens + t
                mask = stored.clone()
                mask[here + 1 :] = False
                past = mask.clone()
                if case.sliding_window is not None:
                    mask[: max(0, here - case.sliding_window + 1)] = False
                if recent:
                    entries = past.nonzero()[:, 0]
                    hidden = entries[sinks : max(sinks, entries.numel() - recent)]
                    mask[hidden] = False
                    past[mask] = False
                extra_keys, extra_values = dense_keys[mask], dense_values[mask]
                bonus = torch.zeros(extra_keys.shape[0], dtype=torch.float64)
                if layer.count is not None and layer.count[r] >= 0:
                    dropped = past & ~mask
                    number = int(layer.count[r]) + int(dropped.sum())
                    if number:
                        key = (layer.key_sum[r].cpu().double() + dense_keys[dropped].sum(0)) / number
                        value = (layer.value_sum[r].cpu().double() + dense_values[dropped].sum(0)) / number
                        extra_keys, extra_values = (
                            torch.cat([extra_keys, key[None]]),
                            torch.cat([extra_values, value[None]]),
                        )
                        bonus = torch.cat([bonus, torch.tensor([float(number)]).double().log()])
                if not extra_keys.shape[0]:
                    continue
                for g in range(case.group):
                    head, narrow = h * case.group + g, eager or torch.float64
                    query = q[b, head, t]
                    logits = extra_keys.to(narrow) @ query.to(narrow) * scale
                    if case.softcap is not None:
                        logits = case.softcap * torch.tanh(logits / case.softcap)
                    logits = logits + bonus.to(narrow)
                    if learned is not None:  # one more entry, whose value is 0
                        most = torch.finfo(narrow).max  # float32's greatest is infinite in fewer bits
                        logits = torch.cat([logits, learned[head : head + 1].to(narrow).clamp(max=most)])
                    weights = logits.softmax(0)[: extra_values.shape[0]]
                    out[b, head, t] = (weights @ extra_values.to(narrow)).double()
    return out


BF16, FP16 = torch.bfloat16, torch.float16
NONE, SINKS = float("-inf"), (0.5, -1.0, 3.0, 2.0, float("-inf"))
CASES = [
    Case("one entry", ((1,),)),
    Case("an empty row beside others", ((0, 1, 63),), gaps=False),
    Case("one huge row beside rows of one", ((1, 4097, 1, 1),)),
    Case("one huge row beside empty ones", ((0, 4097, 0),), gaps=False),
    Case("block edges", ((63, 64, 65, 128, 129),)),
    Case("batch with padding", ((5, 9), (17, 3), (1, 1))),
    Case("no groups", ((7, 30),), group=1),
    Case("groups of 3", ((7, 300),), group=3),
    Case("groups of 16", ((70, 3),), group=16),
    *(Case(f"D {dim}", ((33, 200),), dim=dim) for dim in (32, 40, 80, 96, 112, 128, 256)),
    *(Case(f"D {dim} bf16", ((33, 200),), dim=dim, dtype=BF16, group=4) for dim in (64, 80, 128)),
    *(Case(f"D {dim} fp16", ((33, 200),), dim=dim, dtype=FP16, group=4) for dim in (64, 112, 128)),
    Case("scale", ((90, 4),), scale=0.3),
    Case("softcap", ((90, 4),), softcap=2.0),
    Case("sliding window", ((90, 4),), sliding_window=17),
    Case("sliding window at its very edge", ((90, 40),), sliding_window=17, gaps=False),
    Case("sliding window of one", ((90, 4),), sliding_window=1),
    Case("sliding window and softcap", ((300, 40),), sliding_window=100, softcap=5.0),
    Case("windowed", ((90, 4, 30),), sinks=2, recent=8),
    Case("windowed without sinks", ((90, 4, 30),), sinks=0, recent=8),
    Case("window of one", ((90, 1),), sinks=0, recent=1),
    Case("some rows windowed", ((900, 40, 30), (7, 10, 500)), sinks=2, recent=8, windowed=(0, 4)),
    Case("windowed and sliding", ((90, 30),), sinks=4, recent=30, sliding_window=25),
    Case("compensation", ((90, 4, 30),), sinks=2, recent=8, compensate=True),
    Case("compensation, bf16", ((90, 4, 30),), sinks=2, recent=8, compensate=True, dtype=BF16),
    Case("compensation and softcap", ((90, 40),), sinks=2, recent=8, compensate=True, softcap=3.0),
    Case(
        "compensation on some rows",
        ((900, 40), (7, 300)),
        sinks=1,
        recent=16,
        windowed=(0, 3),
        compensate=True,
    ),
    Case("extend by 2", ((9, 30),), tokens=2),
    Case("extend by 7", ((9, 300), (40, 7)), tokens=7, group=3),
    Case("extend by 130, bf16", ((130, 600),), tokens=130, dtype=BF16),
    Case("extend an empty layer", ((5, 5),), tokens=5, gaps=False),
    Case("extend, windowed", ((90, 30),), tokens=11, sinks=2, recent=8),
    Case("extend, compensation", ((90, 30),), tokens=11, sinks=2, recent=8, compensate=True),
    Case("extend, sliding window", ((90, 30),), tokens=11, sliding_window=6),
    Case("extend, softcap", ((90, 30),), tokens=3, softcap=4.0, dim=80),
    Case("sinks", ((90, 4),), sink_logits=SINKS),
    Case("sinks that are none", ((90, 4),), sink_logits=(NONE,)),
    Case("sinks, an empty row beside others", ((0, 1, 63),), sink_logits=SINKS, gaps=False),
    Case("sinks, one huge row beside empty ones", ((0, 4097, 0, 1),), sink_logits=(7.0,), gaps=False),
    Case("large and small sinks", ((33, 200),), sink_logits=(60.0, -60.0, 1e30, -1e30), group=4),
    Case("sinks at the ends of float32", ((33, 200),), sink_logits=(3.4e38, -3.4e38)),
    Case("sinks, a batch, groups of 3, D 40", ((5, 9), (17, 3), (1, 1)), group=3, dim=40, sink_logits=SINKS),
    Case("sinks, no groups", ((7, 30, 2),), group=1, sink_logits=SINKS, sink_dtype=torch.float64),
    Case("sinks, D 64 bf16", ((33, 200),), group=8, dtype=BF16, sink_logits=SINKS, sink_dtype=BF16),
    Case("sinks, D 128 fp16", ((33, 200),), group=4, dim=128, dtype=FP16, sink_logits=SINKS, sink_dtype=FP16),
    Case("sinks, sliding window, softcap", ((300, 40),), sliding_window=100, softcap=5.0, sink_logits=SINKS),
    Case("sinks, windowed", ((90, 4, 30),), sinks=2, recent=8, sink_logits=SINKS),
    Case("sinks, compensation", ((90, 4, 30),), sinks=2, recent=8, compensate=True, sink_logits=SINKS),
    Case("sinks, extend", ((9, 300), (40, 7)), tokens=7, group=3, sink_logits=SINKS),
    Case("sinks, extend by 130, bf16", ((130, 600),), tokens=130, dtype=BF16, sink_logits=SINKS),
    Case("sinks, extend an empty layer", ((5, 5),), tokens=5, gaps=False, sink_logits=SINKS),
    Case(
        "sinks, extend, compensation",
        ((90, 30),),
        tokens=11,
        sinks=2,
        recent=8,
        compensate=True,
        sink_logits=SINKS,
    ),
    Case("sinks, extend, sliding", ((90, 30),), tokens=11, sliding_window=6, softcap=4.0, sink_logits=SINKS),
]
