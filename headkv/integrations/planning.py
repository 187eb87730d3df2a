"""From a batch as a model sees it to what a method sees: one sequence, no padding, the queries it wants to observe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from headkv.logits import Rule
from headkv.methods.base import Keep
from headkv.prefill import Parts, Prefill

if TYPE_CHECKING:
    from headkv.methods.base import Method, PromptMethod, Windows


# Hidden entries that windowed rows still store: more than assisted generation drafts by default.
ROLLBACK = 32
_NO_PARTS = Parts()


@dataclass(frozen=True)
class Observation:
    """The last queries of a prefill, `[B, HQ, w, D]`, with `valid` `[B, w]` bool or None and how they were used.

    `wanted` is how many valid queries a sequence the method needs (None: all of them). `hidden` `[B, n, hidden]` is
    what the attention was given of all the prompt, or None.
    """

    queries: Tensor
    valid: Tensor | None
    wanted: int | None
    rule: Rule
    hidden: Tensor | None = None

    @classmethod
    def of(
        cls, q: Tensor, valid: Tensor | None, wanted: int | None, rule: Rule, hidden: Tensor | None = None
    ) -> Observation:
        """Observe the queries `[B, HQ, n, D]` of a prefill."""
        return cls(q, valid, wanted, rule, hidden)._trimmed()

    def extend(self, q: Tensor, valid: Tensor | None, hidden: Tensor | None = None) -> Observation:
        """The same after another chunk of the prompt."""
        both = valid is not None or self.valid is not None
        old, new = (
            x if x is not None else s.new_ones((s.shape[0], s.shape[2]), dtype=torch.bool)
            for x, s in ((self.valid, self.queries), (valid, q))
        )
        whole = None if self.hidden is None or hidden is None else torch.cat([self.hidden, hidden], 1)
        longer = replace(self, queries=torch.cat([self.queries, q], 2), hidden=whole)
        return replace(longer, valid=torch.cat([old, new], 1) if both else None)._trimmed()

    def reorder(self, index: Tensor) -> Observation:
        """The same for batch entries `index`."""
        valid = None if self.valid is None else self.valid[index]
        hidden = None if self.hidden is None else self.hidden[index]
        return replace(self, queries=self.queries[index], valid=valid, hidden=hidden)

    def _trimmed(self) -> Observation:
        """Without the queries that no sequence of the batch needs; a copy, so that the whole prompt's are freed."""
        tokens = self.queries.shape[2]
        if self.wanted is None or self.wanted >= tokens:
            return self
        if self.valid is None or self.wanted == 0:
            last = self.wanted
        else:  # reach back until every sequence has enough valid ones
            enough = self.valid.flip(1).cumsum(1) >= self.wanted
            reach = torch.where(enough.any(1), enough.int().argmax(1) + 1, tokens)
            last = int(reach.max())
        begin = tokens - last
        valid = None if self.valid is None else self.valid[:, begin:]
        return replace(self, queries=self.queries[:, :, begin:].clone(), valid=valid)

    def of_sequence(self, batch: int) -> Tensor:
        """The valid queries of one sequence, `[HQ, w, D]`, at most `wanted` of them."""
        queries = self.queries[batch]
        if self.valid is not None:
            queries = queries.index_select(1, self.valid[batch].nonzero()[:, 0])
        begin = 0 if self.wanted is None else max(0, queries.shape[1] - self.wanted)
        return queries[:, begin:]


def all_padding(row: int) -> ValueError:
    """A sequence without a token."""
    return ValueError(
        f"attention_mask must leave every sequence at least one token, but row {row} is all padding"
    )


def within(recent: Tensor, sliding_window: int) -> Tensor:
    """Windows of rows in a layer that has one itself: ordinary rows drop what leaves that, too."""
    return torch.where(recent > 0, recent.clamp(max=sliding_window), sliding_window)


def prefill_windows(
    method: Method | PromptMethod,
    lengths: Sequence[int | None],
    *,
    layer_idx: int,
    num_layers: int,
    num_kv_heads: int,
    sliding_window: int | None,
) -> dict[str, Tensor] | None:
    """Ask `method`, if it can be asked, which heads stream while prompts of these lengths are read.

    Returns:
        `sinks`, `recent` `[B, H]` int64 and `compensate` `[B, H]` bool, on the CPU: arguments of `dense.prefill` and
        `RaggedLayer.set_windows`. None when every head sees all.

    As in `keep_entries`, rows of a layer with a sliding window drop what leaves that window.
    """
    ask = getattr(method, "prefill_windows", None)
    if ask is None:
        return None
    where = {"layer_idx": layer_idx, "num_layers": num_layers, "num_kv_heads": num_kv_heads}
    answers: list[Windows | None] = [ask(**where, length=length) for length in lengths]
    windows = [answer for answer in answers if answer is not None]
    if not windows:
        return None
    got = [None if answer is None else list(answer.recent.shape) for answer in answers]
    if any(shape != [num_kv_heads] for shape in got):
        raise ValueError(
            f"prefill_windows of {method} must answer recent [{num_kv_heads}], or all None, got {got}"
        )
    no_head = torch.zeros(num_kv_heads, dtype=torch.bool, device="cpu")
    sinks = torch.stack([w.sinks.cpu() for w in windows]).long()
    recent = torch.stack([w.recent.cpu() for w in windows]).long()
    compensate = torch.stack([no_head if w.compensate is None else w.compensate.cpu() for w in windows])
    if sliding_window is not None:
        compensate &= False  # a sliding layer forgets by itself
        recent = within(recent, sliding_window)
    return {"sinks": sinks, "recent": recent, "compensate": compensate}


def prefill_of(
    observed: Observation,
    keys: Tensor,
    values: Tensor,
    text: Tensor | None,
    batch: int,
    *,
    layer_idx: int,
    num_layers: int,
    parts: Parts = _NO_PARTS,
) -> Prefill:
    """One sequence of a batch as a method sees it.

    Args:
        observed: the queries.
        keys, values: `[B, H, n, D]`.
        text: `[m]` int64, where the sequence's tokens stand; None: everywhere.
        batch: which sequence.
        layer_idx, num_layers: the layer.
        parts: of its attention.
    """
    if text is not None and text.numel() == 0:
        raise all_padding(batch)
    rule = observed.rule
    hidden = None if observed.hidden is None else observed.hidden[batch]
    return Prefill(
        queries=observed.of_sequence(batch),
        keys=keys[batch] if text is None else keys[batch].index_select(1, text),
        values=values[batch] if text is None else values[batch].index_select(1, text),
        layer_idx=layer_idx,
        num_layers=num_layers,
        scale=rule.scale,
        sliding_window=rule.sliding_window,
        softcap=rule.softcap,
        sink_logits=None if rule.sink_logits is None else rule.sink_logits.detach(),
        parts=parts,
        hidden=hidden if hidden is None or text is None else hidden.index_select(0, text),
    )


def keep_entries(
    method: Method,
    observed: Observation,
    keys: Tensor,
    values: Tensor,
    valid: Tensor | None,
    *,
    layer_idx: int,
    num_layers: int,
    rollback: int = ROLLBACK,
    parts: Parts = _NO_PARTS,
) -> Stored:
    """Ask `method` what each row of a batch keeps of `keys`, `values` `[B, H, n, D]`."""
    texts, chosen = texts_of(valid, keys.shape[0]), []
    for b, text in enumerate(texts):
        where: dict[str, Any] = {"layer_idx": layer_idx, "num_layers": num_layers, "parts": parts}
        chosen.append(method.plan(prefill_of(observed, keys, values, text, b, **where)))
    return storage_of(
        chosen, texts, keys, valid, sliding_window=observed.rule.sliding_window, rollback=rollback
    )


def texts_of(valid: Tensor | None, batch_size: int) -> list[Tensor | None]:
    """Where the tokens of each sequence stand, `[m]` int64 each; None: everywhere."""
    return [None if valid is None else valid[b].nonzero()[:, 0] for b in range(batch_size)]


class Stored(TypedDict):
    """What rows store of a prompt: arguments of `RaggedLayer.from_dense`."""

    keep: Tensor  # [B, H, n] bool
    sinks: Tensor  # [B, H] int64
    recent: Tensor  # [B, H] int64
    compensate: Tensor | None  # [B, H] bool


def storage_of(
    chosen: Sequence[Keep],
    texts: Sequence[Tensor | None],
    keys: Tensor,
    valid: Tensor | None,
    *,
    sliding_window: int | None,
    rollback: int = ROLLBACK,
) -> Stored:
    """What a method answered for each sequence of a batch, put together for one layer.

    Args:
        chosen: one `Keep` a sequence.
        texts: where its tokens stand, see `texts_of`.
        keys: `[B, H, n, D]`.
        valid: `[B, n]` bool, or None.
        sliding_window: of the layer. What no later query can see is not stored then, and rows drop what leaves it.
        rollback: hidden entries that windowed rows store besides.
    """
    batch_size, num_kv_heads, n, _ = keys.shape
    window = sliding_window
    keep = torch.zeros(batch_size, num_kv_heads, n, dtype=torch.bool, device=keys.device)
    sinks = torch.zeros(batch_size, num_kv_heads, dtype=torch.int64, device=keys.device)
    recent = torch.zeros_like(sinks)
    compensate: Tensor | None = None
    for b, (answer, text) in enumerate(zip(chosen, texts, strict=True)):
        mask = answer.mask.to(keys.device)
        if text is None:
            keep[b] = mask
        else:
            keep[b].index_copy_(1, text, mask)
        if answer.sinks is not None and answer.recent is not None:
            sinks[b], recent[b] = answer.sinks, answer.recent
        if answer.compensate is not None and window is None:  # a sliding layer forgets by itself
            compensate = torch.zeros_like(sinks, dtype=torch.bool) if compensate is None else compensate
            compensate[b] = answer.compensate
    age = torch.arange(n - 1, -1, -1, device=keys.device)
    keep |= (recent[..., None] > 0) & (age < recent[..., None] + rollback)
    if window is not None:
        in_reach = keep & ((age < window - 1 + rollback) | (keep.cumsum(2) <= sinks[..., None]))
        newest = age == (0 if valid is None else valid.flip(1).int().argmax(1)[:, None, None])
        keep = torch.where(in_reach.any(2, keepdim=True), in_reach, newest)
        recent = within(recent, window)
    return {"keep": keep, "sinks": sinks, "recent": recent, "compensate": compensate}
