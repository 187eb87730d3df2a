"""Attention of several new tokens over ragged rows: one program for each block of queries and part of a row.

All that a query may see is a matter of entry numbers: since positions increase along a row, a binary search
finds how many entries are not after the query and how many are too old for a sliding window. Most entries are
seen by all queries of a block; masks are computed for the others only. Where there are too few queries to fill the
GPU, rows are cut into parts, long ones into more of them, and a second launch puts the parts' results together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from headkv_kernels.arguments import Rule, Strided
from headkv_kernels.parts import VARYING, merge_rows, parts_of, plan_parts
from headkv_kernels.quantised import load_scales, load_sum, load_vectors, rotated
from headkv_kernels.residual import newest_from, ring_slots
from headkv_kernels.rows import FUSED, Rows, check_positions, check_queries, device_traits, guard, padded
from headkv_kernels.softmax import (
    LOG2E,
    add_block,
    add_entry,
    base_two,
    load_entries,
    sink_of,
    spans,
    start_softmax,
)

MOST_CUTS = 65_535


@dataclass(frozen=True)
class ExtendConfig:
    """How the work is cut. The default suits all sizes; results differ by rounding only.

    Attributes:
        queries: of a program, those of all heads of a group counted; a power of two, at least 16.
        block: entries read at a time, a power of two, at least 16.
        stages: blocks that are in flight, plus one.
        warps: of 32 threads, a program.
        cuts: how often rows are cut in all, up to 65,535; 0 with compensation entries. Long rows are cut more often.
    """

    queries: int
    block: int
    stages: int
    warps: int
    cuts: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (("queries", 16, 1024), ("block", 16, 1024), ("warps", 1, 32)):
            number = getattr(self, name)
            if number not in (1 << bit for bit in range(11)) or not least <= number <= most:
                raise ValueError(f"{name} must be a power of two from {least} to {most}, got {number!r}")
        for name, least, most in (("stages", 1, 64), ("cuts", 0, MOST_CUTS)):
            number = getattr(self, name)
            if not isinstance(number, int) or not least <= number <= most:
                raise ValueError(f"{name} must be a whole number from {least} to {most}, got {number!r}")

    @classmethod
    def default(cls, q: Tensor, rows: Rows) -> ExtendConfig:
        """What fits into the registers, and cuts enough to fill the GPU; for queries `[B, HQ, T, D]`."""
        batch, heads, tokens, _ = q.shape
        group = padded(batch * heads // rows.number, 1)
        wide, compensate, dim = rows.operand(q) == tl.float32, rows.count is not None, rows.dim_pad
        # What a program holds must fit in its registers; float32 is multiplied without tensor cores.
        held = dim * (4 if wide else 1) * (2 if compensate else 1)
        block = 64 if held <= 128 else 32 if held <= 256 else 16
        stages = 3 if held <= 128 else 2
        queries, warps = block, 8 if compensate or dim > 128 or rows.scales is not None else 4
        if held <= 128 and tokens * group >= 128:
            queries, warps = 128, 8
        queries = max(16, group, min(queries, padded(tokens, 1) * group))
        return cls(
            queries, block, stages, warps, 0 if compensate else cls._cuts(rows, tokens, queries, group)
        )

    @staticmethod
    def _cuts(rows: Rows, tokens: int, queries: int, group: int) -> int:
        """A part's outputs are written and read once more, so that it must have entries enough; how many there are
        only the device knows, but not more than slots."""
        units, blocks = device_traits(rows.keys.device)[0], triton.cdiv(tokens, queries // group)
        slots, busy = rows.keys.shape[0], rows.number * blocks
        # A program for each multiprocessor, or two small ones.
        parts = min(units * (2 if queries < 64 else 1) // blocks, slots // (4 * queries))
        # Where there are few a multiprocessor, a long row's programs would end last.
        if busy < 3 * units and slots >= 64 * queries * rows.number:
            parts = max(parts, 2 * rows.number)
        return min(max(0, parts - rows.number), MOST_CUTS)


def ragged_extend(
    q: Tensor,
    rows: Rows,
    *,
    query_positions: Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    config: ExtendConfig | None = None,
) -> Tensor:
    """T new tokens a sequence, already stored, causal by position. `q` `[B, HQ, T, D]` -> `[B, HQ, T, D]`.

    Args:
        query_positions: `[B, T]` int: a query sees the entries whose position is not after its own.
        scale, softcap, sliding_window, sink_logits: as in `ragged_decode`.
        config: default: `ExtendConfig.default(q, rows)`.

    Raises:
        ValueError, TypeError: before anything is launched.
    """
    group = check_queries(q, rows, 4, scale, sliding_window, softcap, sink_logits)
    batch, _, tokens, dim = q.shape
    check_positions(query_positions, (batch, tokens), rows)
    config = config or ExtendConfig.default(q, rows)
    heads_pad, dim_pad, parts = padded(group, 1), rows.dim_pad, rows.number + config.cuts
    if config.queries < heads_pad or (config.cuts and rows.count is not None):
        raise ValueError(
            f"config must have at least {heads_pad} queries and, with compensation entries, no cuts, got {config}"
        )
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    result, lse = out, None
    if config.cuts:
        result = torch.empty(parts, group, tokens, dim, device=q.device)
        lse = torch.empty(result.shape[:-1], device=q.device)
    blocks = triton.cdiv(tokens, config.queries // heads_pad)
    table = rows.table(rows.number // batch)
    with guard(q):
        extend_rows[(blocks * parts,)](
            *(Strided.of(q), query_positions, *query_positions.stride(), tokens, blocks, config.cuts),
            *(table, rows.pools, Rule(scale, softcap, sliding_window, sink_logits), result, lse),
            G=group,
            HEADS=heads_pad,
            M=config.queries,
            D=dim,
            D_PAD=dim_pad,
            BLOCK=config.block,
            STAGES=config.stages,
            OPERAND=rows.operand(q),
            PAD=padded(rows.number),
            num_warps=config.warps,
            **FUSED,
        )
        if lse is not None:
            queries, some = group * tokens, max(1, 512 // dim_pad)
            merge_rows[(rows.number * triton.cdiv(queries, some),)](
                *(result, lse, out, table, config.cuts, queries),
                D=dim,
                D_PAD=dim_pad,
                QUERIES=some,
                AT_ONCE=min(16, padded(parts // rows.number, 2)),
                PAD=padded(rows.number),
                ROTATED=rows.scales is not None,
                num_warps=4,
                **FUSED,
            )
    return out


@triton.jit
def entries_until(positions, entries, position):
    """How many entries of a row are not after `position` `[M]`: binary search from the highest bit down."""
    step = 1
    while 2 * step <= entries:
        step *= 2
    found = tl.zeros_like(position)
    while step > 0:
        there = found + step
        inside = there <= entries
        here = tl.load(positions + there - 1, mask=inside, other=0)
        found = tl.where(inside & (here <= position), there, found)
        step //= 2
    return found


@triton.jit(do_not_specialize=VARYING)
def extend_rows(
    q, query_positions, p_batch, p_token, tokens, blocks, cuts, rows, pools, rule, out, lse,
    G: tl.constexpr, HEADS: tl.constexpr, M: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, OPERAND: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """A block of `M // HEADS` queries, for all heads of the row's group, over a part of the row's entries."""
    part, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    # 0 and 1, but not as constants: with those the compiler keeps blocks of both loops at once in shared memory.
    row, place, parts = part, cuts, cuts + 1
    if lse is not None:
        plan = plan_parts(rows, cuts, PAD)
        row = tl.minimum(tl.sum((plan.ends <= part).to(tl.int32)), rows.number - 1)
        first_part, last_part = parts_of(plan, row)
        place, parts = part - first_part, last_part - first_part
    batch, head = row // rows.heads, row % rows.heads
    m, d, n = tl.arange(0, M), tl.arange(0, D_PAD), tl.arange(0, BLOCK)
    # The last queries see most, so they come first.
    token, g = (blocks - 1 - block) * (M // HEADS) + m // HEADS, m % HEADS
    real = (token < tokens) & (g < G)
    query = batch.to(tl.int64) * q.batch + (head * G + g) * q.head + token.to(tl.int64) * q.token  # [M]
    query = tl.load(q.data + query[:, None] + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    if pools.scale is not None:
        query = rotated(query.to(tl.float32), D)
    query = query.to(OPERAND)

    base, entries = tl.load(rows.start + row), tl.load(rows.length + row)
    where = query_positions + batch * p_batch + token * p_token
    position = tl.load(where, mask=token < tokens, other=-1).to(tl.int64)
    end = entries_until(pools.position + base, entries, position)  # [M]: entries that are eligible
    first = tl.zeros_like(end)
    if rule.sliding_window is not None:
        first = entries_until(pools.position + base, entries, position - rule.sliding_window)
    row_sinks, row_recent = tl.load(rows.sinks + row), tl.load(rows.recent + row)
    front, back = spans(first, end, row_sinks, row_recent)
    newest = entries  # from there on entries are seen as they came
    if rows.residual is not None:
        newest = newest_from(entries, tl.minimum(tl.load(rows.residual + row), rows.ring_size), row_recent)

    # What any query of the block sees, again as two spans; with compensation all is read, hidden or not.
    block_end = tl.max(end)
    block_first = tl.min(tl.where(token < tokens, first, entries))
    block_back = tl.min(tl.where(token < tokens, back, entries))
    block_front = tl.max(tl.where(row_recent > 0, tl.minimum(row_sinks, end), 0)) - block_first
    if rows.dropped is not None:
        block_front, block_back = tl.zeros_like(block_end), tl.zeros_like(block_end)
        hidden_logit, hidden_value = tl.zeros([M], tl.float32), tl.zeros([M, D_PAD], tl.float32)
    block_front = tl.maximum(block_front, 0)
    block_back = tl.maximum(block_back, block_first + block_front)  # an entry comes once
    jump = (block_back - block_front).to(tl.int32)

    # Both spans together are cut into blocks. Every query sees all of those from `inside` to `outside`.
    shown = (block_end - jump).to(tl.int32)
    inside = tl.cdiv(tl.max(tl.where(token < tokens, back, 0)).to(tl.int32) - jump, BLOCK)
    outside = tl.minimum(tl.min(tl.where(token < tokens, end, entries)), newest).to(tl.int32) - jump
    outside = tl.maximum(outside // BLOCK, inside)
    edges = inside + tl.cdiv(shown, BLOCK) - outside
    share = tl.cdiv(edges + outside - inside, parts)
    begin, stop = place * share, tl.minimum((place + 1) * share, edges + outside - inside)

    # A logit in units of ln 2 is a product times `factor`, which is one operation together with what follows it.
    factor = 1.0 if rule.softcap is not None else rule.scale * LOG2E
    top, total, acc = start_softmax(M, D_PAD)
    if rule.sink_logits is not None:  # once a row: in its first part
        top, total = sink_of(rule.sink_logits + head * G + g, g < tl.where(place == 0, G, 0)), total + 1.0
    for i in tl.range(begin, tl.minimum(stop, edges), num_stages=STAGES):
        at = tl.where(i < inside, i, i - inside + outside) * BLOCK + n
        entry = tl.where(at < block_front, block_first + at, jump + at)
        here = entry < block_end
        k = load_vectors(pools.key, base + entry, here, D, D_PAD, OPERAND)
        v = load_vectors(pools.value, base + entry, here, D, D_PAD, OPERAND)
        if rows.residual is not None:
            came = here & (entry >= newest)
            at = ring_slots(rows, row, entry)
            k = tl.where(came[:, None], load_entries(rows.residual_key, at, came, D, D_PAD, OPERAND), k)
            v = tl.where(came[:, None], load_entries(rows.residual_value, at, came, D, D_PAD, OPERAND), v)
        j = entry[None, :]
        eligible = (j >= first[:, None]) & (j < end[:, None])
        hidden = (j >= (first + front)[:, None]) & (j < back[:, None])
        logits = tl.dot(query, tl.trans(k), input_precision="ieee")
        value_scales = None
        if pools.scale is not None:
            key_scales, value_scales = load_scales(pools, base + entry, here)
            if rows.residual is not None:
                key_scales = tl.where(came, 1.0, key_scales)
                value_scales = tl.where(came, 1.0, value_scales)
            logits *= key_scales[None, :]
        if rows.dropped is not None:
            hidden_logit += tl.sum(tl.where(hidden, logits * rule.scale, 0.0), 1)
            summed = hidden.to(OPERAND)
            if pools.scale is not None:
                summed = tl.where(hidden, tl.expand_dims(value_scales, 0), 0.0).to(OPERAND)
            hidden_value = tl.dot(summed, v, hidden_value, input_precision="ieee")
        if rule.softcap is not None:
            logits = base_two(logits * rule.scale, rule)
        logits = tl.where(eligible & (hidden == 0), logits, -float("inf"))
        top, total, acc = add_block(logits, v, top, total, acc, factor, value_scales)
    for i in tl.range(tl.maximum(begin, edges), stop, num_stages=STAGES):
        entry = base + jump + (i - edges + inside) * BLOCK + n
        k = load_vectors(pools.key, entry, n >= 0, D, D_PAD, OPERAND)
        v = load_vectors(pools.value, entry, n >= 0, D, D_PAD, OPERAND)
        logits = tl.dot(query, tl.trans(k), input_precision="ieee")
        value_scales = None
        if pools.scale is not None:
            key_scales, value_scales = load_scales(pools, entry, n >= 0)
            logits *= key_scales[None, :]
        if rule.softcap is not None:
            logits = base_two(logits * rule.scale, rule)
        top, total, acc = add_block(logits, v, top, total, acc, factor, value_scales)
    if rows.dropped is not None:
        dropped = tl.load(rows.dropped + row)
        if dropped >= 0:
            unseen = (dropped + back - front).to(tl.float32)  # [M]
            some = tl.maximum(unseen, 1.0)
            key = load_sum(rows.key_sum, row, pools, D, D_PAD)
            value = load_sum(rows.value_sum, row, pools, D, D_PAD)
            logit = (hidden_logit + tl.sum(query.to(tl.float32) * key[None, :], 1) * rule.scale) / some
            logit = tl.where(unseen > 0, base_two(logit, rule) + tl.log2(some), -float("inf"))
            top, total, acc = add_entry(
                logit, (hidden_value + value[None, :]) / some[:, None], top, total, acc
            )

    total = tl.where(total > 0, total, 1.0)
    result = acc / total[:, None]
    if pools.scale is not None:  # noqa: SIM102 (known to the compiler)
        if lse is None:  # else `merge_rows` rotates
            result = rotated(result, D)
    result = result.to(out.dtype.element_ty)
    target = ((part if lse is not None else row) * G + g).to(tl.int64) * tokens + token
    tl.store(out + target[:, None] * D + d[None, :], result, mask=real[:, None] & (d < D)[None, :])
    if lse is not None:
        tl.store(lse + target, top + tl.log2(total), mask=real)
