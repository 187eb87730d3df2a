"""Attention of streaming heads over a dense prompt: sinks and a window that slides, in O(n) and without n x n.

A query after the sinks sees two sets of keys that never meet: the sinks, and the window among the keys behind them.
Each is a softmax of its own, with its log-sum-exp (LSE); so is the one entry that stands for what lies between, and so
is a head's learned sink, whose value is 0. Their LSEs say how much each part weighs. A part is torch's flash attention
where that runs, and blocks of queries elsewhere.
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache, partial
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from headkv.attention.gradients import without_gradients
from headkv.logits import Rule

BLOCK = 256  # queries at a time, where there is no flash attention


class Part(NamedTuple):
    """Attention of m queries over some of the keys: `out` `[R, G, m, D]`, and `lse` `[R, G, m]`, -inf for none.

    Of `out` any dimension, of `lse` the last may be 1 where all are alike.
    """

    out: Tensor
    lse: Tensor


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    rule: Rule,
    *,
    sinks: int,
    recent: int,
    compensate: bool = False,
) -> Tensor:
    """Query i sees the keys {j < sinks} and {i - recent < j <= i}, as in `reference.extend` over windowed rows.

    DuoAttention (arXiv 2410.10819) learns its gates so. Its published code lets a one-shot prefill see everything, and
    a query of a later chunk all of that chunk besides.

    Args:
        q: `[R, G, n, D]`, the G query heads of R rows, of any floating dtype.
        keys, values: `[R, n, D]`; `n > sinks + recent`.
        positions: `[n]` int, increasing: where the tokens stand, for sliding windows.
        rule: how queries meet keys, of R times G query heads or as many as these repeat.
        compensate: one more entry stands for the keys between, as many as there are (RazorAttention, arXiv 2407.15891).

    Returns:
        `[R, G, n, D]` in the dtype of `q`. Sums are taken in float32, or float64 when the queries are. `backward` is
        refused: what torch gives of an LSE carries no gradient.
    """
    run = partial(_attend, positions=positions, sinks=sinks, recent=recent, compensate=compensate)
    return without_gradients(run, q, keys, values, rule=rule)


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    rule: Rule,
    *,
    sinks: int,
    recent: int,
    compensate: bool,
) -> Tensor:
    work = torch.promote_types(q.dtype, torch.float32)
    sliding = rule.sliding_window
    window = recent if sliding is None else min(recent, sliding)
    flash = rule.softcap is None and sliding is None and _flash_runs(q, keys, values)

    def part(queries: slice, seen: slice, window: int | None) -> Part:
        these = q[:, :, queries], keys[:, seen], values[:, seen]
        if flash:
            return _flash(*these, window, rule.scale)
        where = None if sliding is None else (positions[queries], positions[seen])
        return _blocks(*these, window, rule, where)

    first, rest = slice(0, sinks), slice(sinks, None)
    out = torch.empty_like(q)
    learned = []
    if rule.sink_logits is not None:
        learned = [Part(q.new_zeros((1, 1, 1, 1), dtype=work), rule.sinks(q.shape[:2])[..., None].to(work))]
    if sinks:
        out[:, :, first] = _merge([part(first, first, sinks), *learned]).to(q.dtype)
    parts = [part(rest, rest, window), *learned]
    if sinks:
        parts.append(part(rest, first, None))
    if compensate:
        parts.append(_dropped(q.to(work), keys.to(work), values.to(work), sinks, recent, rule))
    out[:, :, rest] = _merge(parts).to(q.dtype)
    return out


def _flash_runs(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    if q.device.type != "cuda" or torch.version.hip is not None or q.shape[-1] % 8:
        return False
    return can_use_flash_attention(SDPAParams(q, keys[:, None], values[:, None], None, 0.0, False, True))


@cache
def _varlen() -> ModuleType | None:
    """torch's public attention that knows windows, groups and LSEs; None in releases without one of them."""
    try:
        module = importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return None
    known = inspect.signature(module.varlen_attn).parameters
    return module if {"window_size", "enable_gqa", "return_aux"} <= known.keys() else None


def _flash(q: Tensor, keys: Tensor, values: Tensor, window: int | None, scale: float) -> Part:
    """`q` `[R, G, m, D]` over `keys`, `values` `[R, k, D]`: all, or (then k = m) a window that ends at the query.

    `F.scaled_dot_product_attention` knows neither windows nor LSEs.
    """
    left, right = (-1, -1) if window is None else (window - 1, 0)
    (rows, _, m, _), k, varlen = q.shape, keys.shape[1], _varlen()
    if varlen is None:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(q.transpose(1, 2), keys[:, :, None], values[:, :, None]),
            *(None, None, m, k, 0.0, False, False),
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )
        return Part(out.transpose(1, 2), lse)
    ends = torch.arange(rows + 1, dtype=torch.int32, device=q.device)
    out, lse = varlen.varlen_attn(
        *(q.transpose(1, 2).flatten(0, 1), keys.flatten(0, 1)[:, None], values.flatten(0, 1)[:, None]),
        *(ends * m, ends * k, m, k),
        return_aux=varlen.AuxRequest(lse=True),
        scale=scale,
        window_size=(left, right),
        enable_gqa=True,
    )
    return Part(out.unflatten(0, (rows, m)).transpose(1, 2), lse.unflatten(1, (rows, m)).transpose(0, 1))


def _blocks(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int | None,
    rule: Rule,
    where: tuple[Tensor, Tensor] | None,
) -> Part:
    """The same as `_flash`, in a loop; with `where`, positions `[m]` and `[k]`, the sliding window hides keys, too."""
    m, device = q.shape[2], q.device
    fused = device.type == "cpu" and rule.softcap is None and where is None
    parts = []
    for begin in range(0, m, BLOCK):
        end = min(begin + BLOCK, m)
        first, last = (0, keys.shape[1]) if window is None else (max(0, begin - window + 1), end)
        hidden = None  # [block, seen]
        if window is not None:
            age = torch.arange(begin, end, device=device)[:, None] - torch.arange(first, last, device=device)
            hidden = (age < 0) | (age >= window)
        if where is not None:
            old = rule.hides(where[0][begin:end, None], where[1][first:last])
            hidden = old if hidden is None else hidden | old
        block = q[:, :, begin:end], keys[:, first:last], values[:, first:last]
        parts.append(_fused(*block, hidden, rule.scale) if fused else _plain(*block, hidden, rule))
    return Part(torch.cat([part.out for part in parts], 2), torch.cat([part.lse for part in parts], 2))


def _fused(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None, scale: float) -> Part:
    """One block by what `F.scaled_dot_product_attention` is on a CPU, which knows LSEs; no query may see nothing."""
    keys, values = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (keys, values))
    mask = None if hidden is None else q.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return Part(*run(q, keys, values, 0.0, False, attn_mask=mask, scale=scale))


def _plain(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None, rule: Rule) -> Part:
    """One block by hand."""
    work = torch.promote_types(q.dtype, torch.float32)
    together = q.flatten(1, 2).to(work)  # [R, G * block, D]
    logits = rule.logits(together, keys.to(work)).unflatten(1, q.shape[1:3])
    if hidden is not None:
        logits.masked_fill_(hidden, float("-inf"))
    lse = logits.logsumexp(-1)
    least = torch.finfo(work).min  # a query that sees none has weights of 0
    weights = (logits - lse.clamp(min=least)[..., None]).exp_()
    return Part((weights.flatten(1, 2) @ values.to(work)).unflatten(1, q.shape[1:3]), lse)


def _dropped(q: Tensor, keys: Tensor, values: Tensor, sinks: int, recent: int, rule: Rule) -> Part:
    """For each query after the sinks the mean key and value of what it does not see, weighed by their number."""
    number = torch.arange(1, q.shape[2] - sinks - recent + 1, device=q.device, dtype=q.dtype)
    mean_keys, mean_values = (
        _running_sum(x[:, sinks : x.shape[1] - recent])[:, None] / number[:, None] for x in (keys, values)
    )
    logits = rule.cap((q[:, :, sinks + recent :] * mean_keys).sum(-1) * rule.scale)
    lse = logits + number.log()
    return Part(F.pad(mean_values, (0, 0, recent, 0)), F.pad(lse, (recent, 0), value=float("-inf")))


def _running_sum(x: Tensor) -> Tensor:
    """`x.cumsum(1)` of `[R, m, D]` in two levels: on a GPU torch goes along such a dimension one step at a time."""
    m = x.shape[1]
    blocks = F.pad(x, (0, 0, 0, -m % BLOCK)).unflatten(1, (-1, BLOCK)).cumsum(2)
    before = F.pad(blocks[:, :-1, -1].cumsum(1), (0, 0, 1, 0))
    return (blocks + before[:, :, None]).flatten(1, 2)[:, :m]


def _merge(parts: list[Part]) -> Tensor:
    """The softmax over all keys of all parts, `[R, G, m, D]`; every query sees some of the first."""
    out, lse = parts[0]
    for part in parts[1:]:
        work = torch.promote_types(out.dtype, part.out.dtype)
        share = torch.sigmoid(part.lse - lse)[..., None]
        out = torch.lerp(out.to(work), part.out.to(work).expand_as(out), share.to(work))
        lse = torch.logaddexp(lse, part.lse)
    return out
