"""What queries to come are expected to look at (Expected Attention)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headkv import _checks
from headkv.prefill import Prefill


@dataclass(frozen=True)
class ExpectedAttentionScorer:
    """Attention of the average query to come, by mean and covariance of the prompt's: arXiv 2510.00636.

    Before they are turned by their positions, a head's queries are taken as normal with the mean and the covariance of
    the prompt's. Both are turned by the mean rotation of the next `future` positions. An entry's score is the softmax
    over `mean . k + k' C k / 2` (logits scaled), mean over the group, plus `epsilon`, times the norm of its value.

    Attributes:
        sinks: first entries, always kept; their queries are left out.
        window: last entries that are always kept and do not compete.
        future: positions to come.
        covariance: False leaves the covariance out.
        value_norm: multiply with the value's L2 norm.
        epsilon: at least 0; above 0, entries that nothing is expected to look at are ranked by their values.
    """

    sinks: int = 4
    window: int = 0
    future: int = 512
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        _checks.whole("sinks", self.sinks)
        _checks.whole("window", self.window)
        _checks.whole("future", self.future, 1)
        _checks.flag("covariance", self.covariance)
        _checks.flag("value_norm", self.value_norm)
        _checks.between("epsilon", self.epsilon, 0)

    @property
    def observed_queries(self) -> None:
        """All queries."""
        return None

    def score(self, prefill: Prefill) -> Tensor:
        """Scores `[H, n - window]` float32; sinks have more than any other entry.

        Raises:
            ValueError: not the queries of the whole prompt, or a model whose rotary embedding is not known.
        """
        heads, n, dim = prefill.keys.shape
        if prefill.queries.shape[1] != n:
            raise ValueError(f"queries must hold all {n} tokens for {self}, got {prefill.queries.shape[1]}")
        sinks = min(self.sinks, n - 1)
        rotary = prefill.parts.require("rotary", type(self).__name__)
        device = prefill.keys.device
        cos, sin = rotary(torch.arange(sinks, n, device=device))
        # One turn back: the same cosines, sines of the other sign.
        queries = turned(prefill.queries[:, sinks:].float(), cos, -sin).reshape(heads, -1, n - sinks, dim)
        mean, centred = queries.mean(2), queries - queries.mean(2, keepdim=True)
        cos, sin = rotary(torch.arange(n, n + self.future, device=device))
        ahead = mean_rotation(cos, sin, dim)
        keys, values = prefill.keys[:, sinks:].float(), prefill.values[:, sinks:].float()
        logits = torch.einsum("hgd,ed,hne->hgn", mean, ahead, keys) * prefill.scale
        if self.covariance:
            spread = torch.einsum("hgmd,hgme->hgde", centred, centred) / (n - sinks)
            spread = ahead @ spread @ ahead.T
            logits += torch.einsum("hnd,hgde,hne->hgn", keys, spread, keys) * (prefill.scale**2 / 2)
        weights = prefill.rule.softmax(prefill.rule.cap(logits)[:, :, None])[:, :, 0]
        scores = weights.mean(1) + self.epsilon
        if self.value_norm:
            scores = scores * values.norm(dim=-1)
        first = scores.max() + 1
        whole = torch.cat([first.expand(heads, sinks), scores], 1)
        return whole[:, : max(0, n - self.window)]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` `[..., m, D]` turned by `cos`, `sin` `[m, R]`, halves of its first R dimensions against each other."""
    part, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = part.chunk(2, -1)
    return torch.cat([part * cos + torch.cat([-high, low], -1) * sin, rest], -1)


def mean_rotation(cos: Tensor, sin: Tensor, dim: int) -> Tensor:
    """The mean over m positions of the matrices `[D, D]` that turn a column by `cos`, `sin` `[m, R]`."""
    identity = torch.eye(dim, device=cos.device)
    return turned(identity, cos.mean(0, keepdim=True), sin.mean(0, keepdim=True)).T
