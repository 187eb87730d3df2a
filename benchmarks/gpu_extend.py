"""Several new tokens over ragged rows on a GPU, beside torch's flash attention over equal rows of as many entries.

    PYTHONPATH=.:kernels python3 benchmarks/gpu_extend.py [--entries 26214] [--tokens 4 64 1024 16384] [--json FILE]

Shape of Llama-3.1-8B: 8 KV heads, 4 query heads each, D 128, bfloat16. A few tokens are a draft that is verified, some
hundred a second turn, thousands a chunk of a prompt. The rows' lengths are skewed (Dirichlet 1), as head-specific
budgets leave them, but hold the new tokens. Medians of CUDA graph replays; results are held against flash attention.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_attention import DIM, GROUP, HEADS, SCALE
from measure import add_json, finish, replay_microseconds
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from headkv.cache.layout import rows_of_slots, starts
from headkv_kernels import Rows, ragged_extend


def make_rows(lengths: Tensor) -> Rows:
    """Rows of noise without room between them; the last entry of each is the text's last token."""
    lengths = lengths.cuda()
    row, offset = rows_of_slots(lengths)
    pools = torch.randn(2, len(row), DIM, device="cuda").to(torch.bfloat16)
    positions = offset + (lengths.max() - lengths)[row]
    nothing = torch.zeros_like(lengths)
    return Rows(*pools, positions.int(), starts(lengths), lengths, nothing, nothing)


def ragged(rows: Rows, q: Tensor) -> Callable[[], Tensor]:
    """Ours."""
    tokens, seen = q.shape[2], int(rows.length.max())
    where = torch.arange(seen - tokens, seen, device="cuda")[None]
    return lambda: ragged_extend(q, rows, query_positions=where, scale=SCALE)


def dense(rows: Rows, q: Tensor) -> Callable[[], Tensor]:
    """torch's flash attention, over rows of equal length."""
    entries = int(rows.length[0])
    keys, values = (x.view(1, HEADS, entries, DIM) for x in (rows.keys, rows.values))
    return lambda: lower_right(q, keys, values)


def row_by_row(rows: Rows, q: Tensor) -> Tensor:
    """The same over rows of any length, one after another."""
    ends = rows.start + rows.length
    parts = [slice(int(a), int(b)) for a, b in zip(rows.start, ends, strict=True)]
    keys, values = ([x[None, None, part] for part in parts] for x in (rows.keys, rows.values))
    return torch.cat([lower_right(*row) for row in zip(q.split(GROUP, 1), keys, values, strict=True)], 1)


def lower_right(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The queries are those of the last entries."""
    mask: Any = causal_lower_right(q.shape[2], keys.shape[2])
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)


def measure(tokens: int, entries: int, replays: int) -> dict[str, str | float]:
    """One row of the table."""
    skewed = (torch.distributions.Dirichlet(torch.ones(HEADS)).sample() * entries * HEADS).long()
    lengths = skewed.clamp(min=tokens)
    equal = torch.full_like(lengths, int(lengths.sum()) // HEADS)
    q = torch.randn(1, HEADS * GROUP, tokens, DIM, device="cuda").to(torch.bfloat16)
    level, rows = make_rows(equal), make_rows(lengths)
    for these in (level, rows):
        got, want = ragged(these, q)().double(), row_by_row(these, q).double()
        off = float((got - want).norm() / want.norm())
        if not off < 1e-2:
            raise AssertionError(f"{tokens} tokens: {off} from flash attention")
    flash, ours, took = (
        replay_microseconds(call, replays) / 1e3
        for call in (dense(level, q), ragged(level, q), ragged(rows, q))
    )
    pairs = GROUP * float((lengths * tokens - tokens * (tokens - 1) // 2).sum())
    return {
        "new tokens": tokens,
        "entries a head": int(lengths.sum()) // HEADS,
        "flash, equal rows, ms": round(flash, 3),
        "headkv, equal rows, ms": round(ours, 3),
        "headkv, skewed rows, ms": round(took, 3),
        "faster than flash by": f"{flash / took:.1f} x",
        "TFLOP/s": round(4 * DIM * pairs / took / 1e9),
        "MB read": round(float(lengths.sum()) * DIM * 4 / 1e6),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=int, default=26214, help="kept entries a head (default: 26214)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 16, 64, 256, 1024, 4096, 16384])
    parser.add_argument("--replays", type=int, default=20)
    add_json(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_extend: needs a CUDA device; torch sees none")
    torch.manual_seed(0)
    title = (
        f"New tokens over kept entries, one layer, {torch.cuda.get_device_name()}, torch {torch.__version__}"
    )
    finish(options.json, {title: [measure(n, options.entries, options.replays) for n in options.tokens]}, [])


if __name__ == "__main__":
    main()
