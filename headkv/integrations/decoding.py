"""Long generations: rows that outgrow their budget are planned again by the last queries, head by head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from headkv import _checks
from headkv.allocators.rounding import largest_remainder
from headkv.cache.mixed import Store
from headkv.integrations.planning import Observation
from headkv.logits import Rule
from headkv.methods.selection import select
from headkv.prefill import Prefill
from headkv.scorers import SnapKVScorer

if TYPE_CHECKING:
    from headkv.integrations.ranks import Ranks

EVERY = 128


@dataclass(frozen=True)
class DecodeBudget:
    """How many entries rows keep while the text grows.

    A row's budget is its part of the whole: rows that kept much of the prompt keep much of what follows. Every `every`
    tokens, each row that has outgrown its budget keeps the last `scorer.window` entries and, of the others, those that
    the last queries look at most, as SnapKV does for a prompt (arXiv 2404.14469). So a row never stores more than its
    budget and what came since: the bytes are bounded, however long the text gets. Windowed rows are bounded by
    themselves and are left alone.

    Attributes:
        entries: a KV head, on average over the rows that are not windowed.
        every: tokens from one plan to the next.
        scorer: which entries stay.

    Raises:
        TypeError, ValueError: naming the argument that is off.
    """

    entries: int
    every: int = EVERY
    scorer: SnapKVScorer = SnapKVScorer()

    def __post_init__(self) -> None:
        _checks.whole("decode_budget", self.entries, self.scorer.window + 1)
        _checks.whole("every", self.every, 1)

    @classmethod
    def of(cls, decode_budget: int | None, every: int | None) -> DecodeBudget | None:
        """What `compress` is told; None: the text may grow.

        Raises:
            TypeError, ValueError: naming the argument that is off.
        """
        if decode_budget is None:
            if every is not None:
                raise ValueError(f"every must be None without a decode_budget, got {every!r}")
            return None
        return cls(decode_budget) if every is None else cls(decode_budget, every)

    def split(self, layers: Sequence[Store], ranks: Ranks | None = None) -> list[Tensor]:
        """Budgets `[B, H]` int64 of every layer, in proportion to what its rows store now; 0: windowed, not planned.

        Of each sequence, the rows that are planned have `entries` on average, and each at least the window and one.
        Where `ranks` share the heads that is so of all heads together, and the answer is for this rank's.
        """
        stored = torch.stack([layer.lengths().cpu() for layer in layers])  # [layers, B, H]
        planned = torch.stack([(layer.recent == 0).view(layer.lengths().shape).cpu() for layer in layers])
        if ranks is not None:
            device = layers[0].device  # which the ranks can talk over
            stored, planned = (ranks.gather(x.to(device), 2).cpu() for x in (stored, planned))
        least, budgets = self.scorer.window + 1, torch.zeros_like(stored)
        for b in range(stored.shape[1]):
            rows = stored[:, b][planned[:, b]].double()
            if len(rows):
                total = len(rows) * (self.entries - least)
                caps = torch.full_like(rows, total, dtype=torch.int64)
                budgets[:, b][planned[:, b]] = least + largest_remainder(
                    rows / rows.sum() * total, total, caps
                )
        return list(budgets if ranks is None else ranks.own(budgets, 2))


@dataclass(frozen=True, eq=False)
class Growth:
    """What one layer knows of its growth since the prompt.

    Attributes:
        latest: the last queries.
        budgets: `[B, H]` int64 on the CPU, see `DecodeBudget.split`; None until more tokens come.
        planned: tokens that were seen when the rows were planned last.
    """

    latest: Observation | None = None
    budgets: Tensor | None = None
    planned: int = 0

    def observe(self, q: Tensor, valid: Tensor | None, rule: Rule, budget: DecodeBudget) -> Growth:
        """The same once the queries `[B, HQ, T, D]` have come."""
        q = q.detach()
        if self.latest is None:
            return replace(self, latest=Observation.of(q, valid, budget.scorer.window, rule))
        return replace(self, latest=self.latest.extend(q, valid))

    def crop(self, tokens: int) -> Growth:
        """The same without the last `tokens` tokens."""
        if self.latest is None or tokens == 0:
            return self
        kept = max(0, self.latest.queries.shape[2] - tokens)
        valid = None if self.latest.valid is None else self.latest.valid[:, :kept]
        return replace(
            self, latest=replace(self.latest, queries=self.latest.queries[:, :, :kept], valid=valid)
        )

    def reorder(self, index: Tensor) -> Growth:
        """The same for batch entries `index`."""
        return replace(
            self,
            latest=None if self.latest is None else self.latest.reorder(index),
            budgets=None if self.budgets is None else self.budgets[index.cpu()],
        )

    def observed(self) -> int:
        """Queries that are known of every sequence."""
        if self.latest is None:
            return 0
        valid = self.latest.valid
        return self.latest.queries.shape[2] if valid is None else int(valid.sum(1).min())

    def keep(self, layer: Store, budget: DecodeBudget, layer_idx: int, num_layers: int) -> Tensor | None:
        """What the rows of `layer` keep, `[B, H, L]` bool for `RaggedLayer.evict`; None: all are within budget."""
        assert self.latest is not None and self.budgets is not None
        lengths, rule, window = layer.lengths().cpu(), self.latest.rule, budget.scorer.window
        over = (self.budgets > 0) & (lengths > self.budgets)
        if not bool(over.any()):
            return None
        keep = torch.ones(*lengths.shape, int(lengths.max()), dtype=torch.bool, device=layer.device)
        group = self.latest.queries.shape[1] // layer.num_kv_heads
        for b, h in over.nonzero().tolist():
            queries = self.latest.of_sequence(b)[h * group : (h + 1) * group]
            keys, values = (x[None].to(queries.dtype) for x in layer.row(b, h)[:2])
            # By itself, and of what is stored alone: its last entries are the last tokens all the same.
            own = rule.of_heads([h], layer.num_kv_heads)
            alone = Prefill(
                *(queries, keys, values, layer_idx, num_layers, rule.scale),
                softcap=rule.softcap,
                sink_logits=own.sink_logits,
            )
            scores, most = budget.scorer.score(alone), self.budgets[b, h : h + 1] - window
            keep[b, h, : scores.shape[1]] = select(scores, most, source=type(budget.scorer).__name__)[0]
        return keep


class Growing(Protocol):
    """A layer of a cache that grows."""

    layer_idx: int
    num_layers: int
    growth: Growth

    def filled(self) -> Store:
        """The layer's store."""


def bound(layers: Sequence[Growing], budget: DecodeBudget, ranks: Ranks | None = None) -> None:
    """Plan the rows of all layers again, if that is due: to be called before more tokens come, on all `ranks`."""
    rows = [layer.filled() for layer in layers]
    if any(layer.growth.budgets is None for layer in layers):
        for layer, budgets in zip(layers, budget.split(rows, ranks), strict=True):
            layer.growth = replace(layer.growth, budgets=budgets, planned=layer.filled().seen)
    since = rows[0].seen - layers[0].growth.planned
    if since < budget.every or min(layer.growth.observed() for layer in layers) < budget.scorer.window:
        return
    kept = [x.growth.keep(x.filled(), budget, x.layer_idx, x.num_layers) for x in layers]  # all of them first
    for layer, row, keep in zip(layers, rows, kept, strict=True):
        if keep is not None:
            row.evict(keep, headroom=budget.every)
        layer.growth = replace(layer.growth, planned=row.seen)
