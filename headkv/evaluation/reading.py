"""A prompt that is read once and then compressed in many ways."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headkv import _checks
from headkv.cache.mixed import Store
from headkv.integrations.cache import RaggedCache
from headkv.integrations.hook import NAME
from headkv.integrations.states import copied
from headkv.methods.base import Keep
from headkv.models.attention import chosen_attention, kept_attention
from headkv.models.decoding import greedy
from headkv.prefill import ALL, Prefill, Prompt
from headkv.scorers import SnapKVScorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headkv.methods.base import Method, PromptMethod


@dataclass(frozen=True)
class _Witness:
    """A method that has the whole prompt kept, with all queries."""

    observed_queries = ALL
    whole_prompt = True

    def plan_prompt(self, prompt: Prompt) -> list[Keep]:
        return [Keep.all(prompt.layer(i)) for i in range(prompt.num_layers)]


@dataclass(frozen=True, eq=False)
class _Spread:
    """A prompt whose layers are all there, dense, so that none is made again for the next method."""

    prompt: Prompt
    layers: tuple[Prefill, ...]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.prompt, name)

    def layer(self, layer_idx: int) -> Prefill:
        return self.layers[layer_idx]


class Reading:
    """What a model's layers held after it read a prompt; any method may then choose from it.

    The prefill attends densely whatever a method keeps afterwards, so that reading once serves every method and budget
    (but for heads that stream while they read). The prompt's *last* token is held back: `answer` feeds it to the
    compressed cache. Had the dense prefill read it too, the first word of the answer would have been made from the full
    cache.

    Args:
        model: a transformers decoder that headkv supports.
        input_ids: `[1, n]` int64, without padding, at least two tokens.

    Raises:
        ValueError: `input_ids` is no single sequence of two tokens or more.
    """

    def __init__(self, model: PreTrainedModel, input_ids: Tensor) -> None:
        self._check(input_ids)
        self.model, self.last = model, input_ids[:, -1:]
        with kept_attention(model), torch.inference_mode():
            self.cache = RaggedCache.for_model(model, _Witness(), chunked_prefill=True)
            model(input_ids[:, :-1], past_key_values=self.cache, logits_to_keep=1)
        self._spread()

    def _spread(self) -> None:
        """What methods are shown: made once for all of them."""
        prompt = self.cache.prompts()[0]
        #: What each layer held: queries `[HQ, n - 1, D]`, keys and values `[H, n - 1, D]`.
        self.layers = tuple(prompt.layer(i) for i in range(prompt.num_layers))
        self.prompt: Prompt = _Spread(prompt, self.layers)
        self._observed: dict[int | None, tuple[Prefill, ...]] = {None: self.layers}

    @staticmethod
    def _check(input_ids: Tensor) -> None:
        if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
            raise ValueError(
                f"input_ids must have shape [1, n] with n at least 2, got {list(input_ids.shape)}"
            )

    @torch.inference_mode()
    def followed_by(self, input_ids: Tensor) -> Reading:
        """The reading of a longer prompt: this one, then `input_ids` `[1, m]`, whose last token is held back.

        Only the new tokens pass the model; this reading stays as it is.

        Raises:
            ValueError: `input_ids` is no single sequence of two tokens or more.
        """
        self._check(input_ids)
        longer = copy.copy(self)
        longer.cache = copy.deepcopy(self.cache)
        tokens, longer.last = torch.cat([self.last, input_ids[:, :-1]], 1), input_ids[:, -1:]
        with chosen_attention(self.model, NAME):
            self.model(tokens, past_key_values=longer.cache, logits_to_keep=1)
        longer._spread()
        return longer

    def ending(self, last: Tensor) -> Reading:
        """The same reading with another token held back, `[1, 1]` int64; it shares all else."""
        other = copy.copy(self)
        other.last = last
        return other

    def observed(self, wanted: int | None) -> tuple[Prefill, ...]:
        """The layers with the last `wanted` queries alone; None: all of them."""
        if wanted not in self._observed:
            firsts = [max(0, layer.queries.shape[1] - (wanted or 0)) for layer in self.layers]
            self._observed[wanted] = tuple(
                replace(layer, queries=layer.queries[:, first:])
                for layer, first in zip(self.layers, firsts, strict=True)
            )
        return self._observed[wanted]

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

    @torch.inference_mode()
    def plan(self, method: Method | PromptMethod) -> Sequence[Keep]:
        """What `method` keeps of each layer."""
        asked: Any = method
        if getattr(method, "whole_prompt", False):
            with chosen_attention(self.model, NAME):  # it may read more
                answer: Sequence[Keep] = asked.plan_prompt(self.prompt)
            return answer
        return [asked.plan(layer) for layer in self.observed(method.observed_queries)]

    def kept(self, method: Method | PromptMethod) -> Tensor:
        """Which entries `method` keeps, `[layers, H, n - 1]` bool.

        Raises:
            ValueError: `method` has rows with a window, which keep by age and not by choice.
        """
        keeps = self.plan(method)
        if any(keep.recent is not None and bool((keep.recent > 0).any()) for keep in keeps):
            raise ValueError(f"method must not have windowed rows, got {method}")
        return torch.stack([keep.mask for keep in keeps])

    @torch.inference_mode()
    def compressed(self, method: Method | PromptMethod, keeps: Sequence[Keep] | None = None) -> RaggedCache:
        """A cache that holds what `method` keeps of the prompt; set the model's attention to "headkv" to use it.

        Args:
            method: the method.
            keeps: its answer, if it was asked before.
        """
        keeps = self.plan(method) if keeps is None else keeps
        with kept_attention(self.model):
            cache = RaggedCache.for_model(self.model, method, rollback=0)
        for i, (layer, keep) in enumerate(zip(cache.attending, keeps, strict=True)):
            layer.restore(self.stored(i, [keep]))
        cache.hold({i: copied(state) for i, state in self.cache.states.items()})
        return cache

    def stored(self, layer_idx: int, keeps: Sequence[Keep]) -> Store:
        """What a layer stores of the prompt, if this is what it keeps; each of several answers is a sequence."""
        layer, waiting = self.layers[layer_idx], self.cache.attending[layer_idx]
        keys, values = (x.expand(len(keeps), -1, -1, -1) for x in (layer.keys, layer.values))
        return waiting.compressed(keeps, rollback=0, dense=(keys, values, None))

    @torch.inference_mode()
    def answer(self, method: Method | PromptMethod, max_new_tokens: int = 4) -> Tensor:
        """Compress by `method`, then decode greedily: `[max_new_tokens]` int64."""
        _checks.whole("max_new_tokens", max_new_tokens, 1)
        cache = self.compressed(method)
        with chosen_attention(self.model, NAME):
            return torch.tensor(list(greedy(self.model, self.last, cache, max_new_tokens)))
