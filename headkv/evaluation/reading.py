"""A prompt that is read once and then compressed in many ways."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headkv import _checks
from headkv.integrations.cache import RaggedCache
from headkv.integrations.hook import NAME
from headkv.methods.base import Keep
from headkv.models.attention import chosen_attention, kept_attention
from headkv.models.decoding import greedy
from headkv.prefill import ALL, Prefill
from headkv.scorers import SnapKVScorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headkv.methods.base import Method


@dataclass(frozen=True)
class _Witness:
    """A method that keeps everything, and remembers what it was shown."""

    seen: list[Prefill] = field(default_factory=list)

    observed_queries = ALL

    def plan(self, prefill: Prefill) -> Keep:
        self.seen.append(prefill)
        return Keep.all(prefill)


class Reading:
    """What a model's layers held after it read a prompt; any method may then choose from it.

    The prefill attends densely whatever a method keeps afterwards, so that reading once serves every budget.
    The prompt's *last* token is held back: `answer` feeds it to the compressed cache. Had the dense prefill
    read it too, the first word of the answer would have been made from the full cache.

    Args:
        model: a transformers decoder that headkv supports.
        input_ids: `[1, n]` int64, without padding, at least two tokens.

    Raises:
        ValueError: `input_ids` is no single sequence of two tokens or more.
    """

    def __init__(self, model: PreTrainedModel, input_ids: Tensor) -> None:
        if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
            raise ValueError(
                f"input_ids must have shape [1, n] with n at least 2, got {list(input_ids.shape)}"
            )
        self.model, self.last = model, input_ids[:, -1:]
        witness = _Witness()
        with kept_attention(model), torch.inference_mode():
            self.cache = RaggedCache.for_model(model, witness)
            model(input_ids[:, :-1], past_key_values=self.cache, logits_to_keep=1)
        self.layers: tuple[Prefill, ...] = tuple(witness.seen)
        self._full = self.cache.snapshot()

    def window_attention(self, window: int = 32, *, reduce: str = "mean") -> Tensor:
        """How the last `window` tokens attend to each token before them: SnapKV's scores before pooling.

        Args:
            window: how many of the last queries observe, at least 1.
            reduce: query heads of a group to one: "mean", "max" or "sum".

        Returns:
            `[layers, H, n - 1 - window]` float32: the mean weight over the window (SnapKV, arXiv 2404.14469,
            section 4).
        """
        scorer = SnapKVScorer(window, kernel_size=1, reduce=reduce)
        return torch.stack([scorer.score(layer) for layer in self.layers]).cpu()

    def kept(self, method: Method) -> Tensor:
        """Which entries `method` keeps, `[layers, H, n - 1]` bool.

        Raises:
            ValueError: `method` has rows with a window, which keep by age and not by choice.
        """
        wanted, masks = method.observed_queries, []
        for layer in self.layers:
            first = 0 if wanted is None else max(0, layer.queries.shape[1] - wanted)
            keep = method.plan(replace(layer, queries=layer.queries[:, first:]))
            if keep.recent is not None and bool((keep.recent > 0).any()):
                raise ValueError(f"method must not have windowed rows, got {method}")
            masks.append(keep.mask)
        return torch.stack(masks)

    @torch.inference_mode()
    def answer(self, method: Method, max_new_tokens: int = 4) -> Tensor:
        """Compress by `method`, then decode greedily: `[max_new_tokens]` int64.

        Raises:
            ValueError: windowed rows (see `kept`), or layers with a sliding window, which drop by age.
        """
        _checks.whole("max_new_tokens", max_new_tokens, 1)
        if any(layer.sliding_window is not None for layer in self.layers):
            raise ValueError("model must not have layers with a sliding window, to be compressed once more")
        self.cache.restore(self._full)
        for layer, mask in zip(self.cache.layers, self.kept(method), strict=True):
            layer.filled().evict(mask[None])
        with chosen_attention(self.model, NAME):
            return torch.tensor(list(greedy(self.model, self.last, self.cache, max_new_tokens)))
