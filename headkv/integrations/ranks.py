"""Tensor parallelism: each process has some of a model's KV heads, and what compares heads is decided by all of them.

transformers' `tp_plan` (or torch's `parallelize_module`) gives every rank an equal run of the heads of every layer, and
its cache holds those alone. A budget that heads share then needs the scores of all of them: they meet by one all-gather
of `[H, n]` numbers a layer, every rank splits the budget alike, and keeps its own rows' part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headkv._config import kv_heads
from headkv.allocators import Allocator
from headkv.methods.base import Keep, Windows
from headkv.methods.scored import Scored, ScoredMethod
from headkv.methods.selection import at_least_one
from headkv.prefill import Parts, Prefill
from headkv.scorers import Scorer
from headkv.scorers.base import PromptScorer

if TYPE_CHECKING:
    from headkv.methods.base import Method, PromptMethod


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes that share the heads of a model.

    Attributes:
        rank: this process, from 0: it has the `rank`-th run of every layer's heads.
        size: how many there are.
        heads: KV heads of a layer, those of all ranks together.
        group: torch's process group of them.
    """

    rank: int
    size: int
    heads: int
    group: Any = None

    @classmethod
    def of(cls, parts: Sequence[Parts], config: Any, name: str) -> Ranks | None:
        """Those of a model whose layers have these `parts`; None where one process has all heads.

        Raises:
            ValueError: KV heads that can not be shared out evenly, or layers that are shared out in different ways.
        """
        heads = kv_heads(config)
        found = [_shared_by(part.output, heads) for part in parts]
        if not any(found):
            return None
        ranks = found[0]
        if ranks is None or any(x is None or x.group != ranks.group for x in found):
            raise ValueError(f"model {name} must have all layers' heads on the same ranks, or none of them")
        if heads % ranks.size:
            divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise ValueError(
                f"model {name} has {heads} KV heads, which {ranks.size} ranks can not share evenly; "
                f"tp_size must be one of {divisors}"
            )
        return ranks

    def gather(self, own: Tensor, dim: int = 0) -> Tensor:
        """`own` of all ranks, one behind the other along `dim`: on every rank the same."""
        own = own.contiguous()
        every = [torch.empty_like(own) for _ in range(self.size)]
        torch.distributed.all_gather(every, own, group=self.group)
        return torch.cat(every, dim)

    def own(self, every: Tensor, dim: int = 0) -> Tensor:
        """This rank's run of `every` along `dim`, which holds something for each head."""
        return every.chunk(self.size, dim)[self.rank]

    def whole(self, prefill: Prefill) -> Prefill:
        """A layer with the heads of all ranks; its module, which has this rank's weights only, is left out."""
        parts, sinks = prefill.parts, prefill.sink_logits
        output = None if parts.output is None else self.gather(parts.output, 1)
        return replace(
            prefill,
            queries=self.gather(prefill.queries),
            keys=self.gather(prefill.keys),
            values=self.gather(prefill.values),
            sink_logits=None if sinks is None else self.gather(sinks),
            parts=Parts(output, parts.rotary),
        )

    def blank(self, prefill: Prefill) -> Prefill:
        """A layer of the shape of `whole`, made without the other ranks: entries of other heads are not theirs."""
        keys, values, queries = (
            x[:1].expand(x.shape[0] * self.size, *x.shape[1:])
            for x in (prefill.keys, prefill.values, prefill.queries)
        )
        return replace(prefill, queries=queries, keys=keys, values=values, sink_logits=None, parts=Parts())


def own_part(parts: Parts) -> Parts:
    """The same with what this process has of the output projection."""
    output: Any = parts.output
    return replace(parts, output=output.to_local()) if hasattr(output, "to_local") else parts


def _shared_by(weight: Tensor | None, heads: int) -> Ranks | None:
    """Who has the other columns of an output projection `[hidden, HQ * D]`: the ranks that have the other heads."""
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(weight, DTensor):
        return None
    for dim, placement in enumerate(weight.placements):
        mesh = weight.device_mesh
        if isinstance(placement, Shard) and placement.dim == 1 and mesh.size(dim) > 1:
            return Ranks(mesh.get_local_rank(dim), mesh.size(dim), heads, mesh.get_group(dim))
    return None


def shared(method: Method | PromptMethod, ranks: Ranks | None) -> Method | PromptMethod:
    """What stands for `method` on one of several ranks: together they keep what one process would.

    A method made of a scorer and an allocator gathers scores. Scorers that rank each head by itself say `by_head =
    True`; for others the layer's keys, values and observed queries are gathered. So they are for any other `Method`,
    except those that say `by_shape = True`, as they look at nothing but the shape.

    Raises:
        ValueError: a method that decides over the whole prompt in a way of its own.
    """
    if ranks is None:
        return method
    composed = method if isinstance(method, ScoredMethod) else getattr(method, "composed", None)
    own_way = isinstance(method, Scored) and type(method).plan is not Scored.plan
    if isinstance(composed, ScoredMethod) and not own_way:
        return _shared_scored(composed, ranks, type(method).__name__)
    if getattr(method, "whole_prompt", False):
        raise _unknown(type(method).__name__, ranks)
    return SharedMethod(method, ranks)


def _shared_scored(method: ScoredMethod, ranks: Ranks, name: str) -> ScoredMethod:
    scorer: Any = method.scorer
    if not getattr(scorer, "by_head", False):
        if isinstance(scorer, PromptScorer):
            raise _unknown(f"{name} with {type(scorer).__name__}", ranks)
        scorer = SharedScorer(scorer, ranks)
    allocator = SharedAllocator(method.allocator, ranks, least=scorer.window == 0)
    return replace(method, scorer=scorer, allocator=allocator)


def _unknown(name: str, ranks: Ranks) -> ValueError:
    return ValueError(
        f"method {name} decides over the whole prompt, and headkv does not know how over the heads of {ranks.size} "
        "ranks; use one process, or a scorer that ranks each head by itself and says so by `by_head = True`"
    )


@dataclass(frozen=True, eq=False)
class SharedScorer:
    """A scorer that compares heads, on one of several ranks: it sees all of them."""

    scorer: Any
    ranks: Ranks

    @property
    def window(self) -> int:
        """As the scorer's."""
        return int(self.scorer.window)

    @property
    def observed_queries(self) -> int | None:
        """As the scorer's."""
        scorer: Scorer = self.scorer
        return scorer.observed_queries

    @property
    def observes_hidden(self) -> bool:
        """As the scorer's."""
        return bool(getattr(self.scorer, "observes_hidden", False))

    def for_budget(self, budget: int) -> SharedScorer:
        """The same, told how many entries a KV head keeps, if the scorer wants to know."""
        tell = getattr(self.scorer, "for_budget", None)
        return self if tell is None else replace(self, scorer=tell(budget))

    def score(self, prefill: Prefill) -> Tensor:
        """Scores `[H, n - window]` of this rank's heads."""
        return self.ranks.own(self.scorer.score(self.ranks.whole(prefill)))


@dataclass(frozen=True, eq=False)
class SharedAllocator:
    """An allocator on one of several ranks: it splits the budget of all heads, by the scores of all of them.

    Attributes:
        allocator: splits it.
        ranks: that have the heads.
        least: whether a row that gets nothing is given one entry, which other rows, of any rank, give up.
    """

    allocator: Allocator
    ranks: Ranks
    least: bool

    @property
    def needs_scores(self) -> bool:
        """As the allocator."""
        return bool(getattr(self.allocator, "needs_scores", True))

    def allocate(self, scores: Tensor, budget: int, *, layer_idx: int, num_layers: int) -> Tensor:
        """Budgets of this rank's rows: `scores` are those of one layer, or of all layers in turn."""
        own = scores.unflatten(0, (-1, self.ranks.heads // self.ranks.size))  # [layers, heads, m]
        if self.needs_scores:
            every = self.ranks.gather(own, 1)
        else:
            every = torch.zeros(1, device=scores.device).expand(len(own), self.ranks.heads, scores.shape[1])
        budgets = self.allocator.allocate(
            every.flatten(0, 1), budget, layer_idx=layer_idx, num_layers=num_layers
        ).cpu()
        if self.least:
            budgets = at_least_one(budgets, scores.shape[1])
        return self.ranks.own(budgets.view(len(own), -1), 1).flatten()


@dataclass(frozen=True, eq=False)
class SharedMethod:
    """Any other method that decides layer by layer, on one of several ranks."""

    method: Any
    ranks: Ranks

    @property
    def observed_queries(self) -> int | None:
        """As the method's."""
        method: Method = self.method
        return method.observed_queries

    @property
    def observes_hidden(self) -> bool:
        """As the method's."""
        return bool(getattr(self.method, "observes_hidden", False))

    def plan(self, prefill: Prefill) -> Keep:
        """What the method keeps in this rank's heads."""
        by_shape = getattr(self.method, "by_shape", False)
        keep = self.method.plan(self.ranks.blank(prefill) if by_shape else self.ranks.whole(prefill))
        return Keep(*map(self._own, (keep.mask, keep.sinks, keep.recent, keep.compensate)))

    def prefill_windows(
        self, *, layer_idx: int, num_layers: int, num_kv_heads: int, length: int | None
    ) -> Windows | None:
        """Those of this rank's heads, if the method says that heads stream."""
        ask = getattr(self.method, "prefill_windows", None)
        if ask is None:
            return None
        where = {"layer_idx": layer_idx, "num_layers": num_layers, "length": length}
        windows: Windows | None = ask(**where, num_kv_heads=num_kv_heads * self.ranks.size)
        if windows is None:
            return None
        return Windows(*map(self._own, (windows.sinks, windows.recent, windows.compensate)))

    def _own(self, of_heads: Tensor | None) -> Any:
        return None if of_heads is None else self.ranks.own(of_heads)
