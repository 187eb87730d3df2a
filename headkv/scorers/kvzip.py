"""What the model looks at when it has to repeat the text (KVzip): no question is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headkv import _checks
from headkv.logits import greatest_weights
from headkv.prefill import Prompt


@dataclass(frozen=True)
class KVzipScorer:
    """The most attention that any token of the text, read again, pays to an entry: KVzip, arXiv 2505.23416.

    The text is read again in chunks, each behind a request to repeat it, over the whole cache. Of each chunk only its
    own entries are scored, so that the cost is linear: about a second prefill, with attention of n x n in place of half
    of that. An entry's score is the greatest softmax weight over the chunk, the sinks and what is read, of all
    queries that read and of all query heads of the group. The softmax is float32 (the published code's is in the
    model's dtype, where maxima tie at 1.0).

    Attributes:
        request: token ids before the text that is read again, e.g. of "Repeat the text above."
        chunk: tokens that are read at a time.
        lead: last tokens of the chunk before, which stand behind the request: they say where to go on.
        sinks: first entries, always kept.
        window: last entries, always kept.
    """

    request: Sequence[int] = ()
    chunk: int = 2000
    lead: int = 8
    sinks: int = 4
    window: int = 32
    by_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "request", tuple(self.request))
        for token in self.request:
            _checks.whole("request", token)
        _checks.whole("chunk", self.chunk, 1)
        _checks.whole("lead", self.lead)
        _checks.whole("sinks", self.sinks)
        _checks.whole("window", self.window)

    @property
    def observed_queries(self) -> int:
        """No queries of the prompt."""
        return 0

    def score_prompt(self, prompt: Prompt) -> list[Tensor]:
        """Scores `[H, n - window]` float32 of every layer, each in [0, 1]; sinks have more than any other entry."""
        ids, n = prompt.input_ids, prompt.length
        scores: list[list[Tensor]] = [[] for _ in range(prompt.num_layers)]
        for begin in range(0, n, self.chunk):
            end = min(begin + self.chunk, n)

            def watch(
                layer_idx: int, queries: Tensor, keys: Tensor, begin: int = begin, end: int = end
            ) -> None:
                layer = prompt.layer(layer_idx)
                stored = torch.arange(n, device=keys.device)
                stored = torch.cat([stored[: min(self.sinks, begin)], stored[begin:end]])
                both = torch.cat([layer.keys[:, stored], keys], 1)
                where = torch.cat([stored, n + torch.arange(keys.shape[1], device=keys.device)])
                found = greatest_weights(queries, both, where, layer.rule)
                scores[layer_idx].append(found[:, len(stored) - (end - begin) : len(stored)])

            lead = ids[max(0, begin - self.lead) : begin]
            request = torch.tensor(self.request, dtype=ids.dtype, device=ids.device)
            prompt.read(torch.cat([request, lead, ids[begin:end]]), watch)
        whole = [torch.cat(parts, 1) for parts in scores]
        for layer in whole:
            layer[:, : self.sinks] = 2.0
        return [layer[:, : max(0, n - self.window)] for layer in whole]
