"""Presses of the kvpress library in headkv: theirs rank entries, or hide them; ours really evicts them.

Nothing of kvpress is imported here: whoever has a press has imported it. That import wraps the attention
functions of transformers for kvpress's own masks; nothing here uses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from headkv import _checks
from headkv.integrations.calls import unheard
from headkv.integrations.press import PressCall
from headkv.integrations.support import decoder_of, parts_of
from headkv.methods.base import Keep
from headkv.prefill import Prefill, Prompt


@dataclass(frozen=True, eq=False)
class KVPressScorer:
    """A kvpress `ScorerPress` as a `Scorer`: `headkv.SnapKV(0.2, scorer=KVPressScorer(KnormPress()))`.

    A press sees what its hook would see: the layer's attention module (a copy that shares its weights), what
    that was given, keys, values, rotary angles. Weights of attention are formed only for presses that need
    them (observed attention): say for how many last queries. The press's own `compression_ratio` evicts
    nothing here: the method's budget does.

    Attributes:
        press: the press; its `post_init_from_model` is called once a prompt, then its `score`.
        window: last entries that are always kept and do not compete.
        observed_queries: last queries whose attention weights, `[1, HQ, queries, n]`, the press is given;
            None for all of them (n x n for all heads of a layer at once), 0 for none.
    """

    press: Any
    window: int = 0
    observed_queries: int | None = 0

    def __post_init__(self) -> None:
        _checks.has("press", self.press, "score", "compression_ratio")
        _checks.whole("window", self.window)
        if self.observed_queries is not None:
            _checks.whole("observed_queries", self.observed_queries)

    @property
    def observes_hidden(self) -> bool:
        """True: presses may rank by what the attention was given."""
        return True

    def score(self, prefill: Prefill) -> Tensor:
        """Scores `[H, n - window]` float32.

        Raises:
            NotImplementedError: the press needs a part of the model, and no model made this prefill.
            ValueError: the press refuses its input, or gives scores that are not `[1, H, n]`.
        """
        heads, n, _ = prefill.keys.shape
        name = type(self.press).__name__
        call = _begun(self.press, prefill, self.observed_queries)
        with _said_by(name, self.observed_queries):
            scores = self.press.score(
                call.module, call.hidden, call.keys, call.values, call.attentions, call.kwargs
            )
        if tuple(scores.shape) != (1, heads, n):
            raise ValueError(f"scores of {name} must have shape [1, {heads}, {n}], got {list(scores.shape)}")
        return scores[0, :, : max(0, n - self.window)].float()


@dataclass(frozen=True, eq=False)
class RealizedPress:
    """A press that masks when a layer has read the prompt, as a `Method`: see `realize`."""

    press: Any
    observed_queries: int | None = 0
    observes_hidden = True

    def plan(self, prefill: Prefill) -> Keep:
        """Keep what the press does not mask.

        Raises:
            NotImplementedError, ValueError: as `KVPressScorer.score`; or the press changes the tensors itself.
        """
        name, call = type(self.press).__name__, _begun(self.press, prefill, self.observed_queries)
        layer = SimpleNamespace(keys=call.keys.clone(), values=call.values.clone())
        call.kwargs["past_key_values"] = SimpleNamespace(layers={call.module.layer_idx: layer})
        with _said_by(name, self.observed_queries):
            self.press.forward_hook(call.module, [], call.kwargs, [None, call.attentions])
        if not (_same(layer.keys, call.keys) and _same(layer.values, call.values)):
            raise ValueError(
                f"press must only mask entries, but {name} removes or changes them itself; where it is a "
                "ScorerPress, its scores serve any method through KVPressScorer"
            )
        return _keep(call.module.masked_key_indices, prefill.num_kv_heads, prefill.length)


@dataclass(frozen=True, eq=False)
class RealizedAtExit:
    """A press that masks when its `with` block ends, as a `PromptMethod`: see `realize`."""

    press: Any
    observed_queries = 0
    whole_prompt = True

    def plan_prompt(self, prompt: Prompt) -> list[Keep]:
        """Keep what the press does not mask, having read the prompt once more inside its block.

        Raises:
            ValueError: no model made this prompt, or the press masks nothing and changes the cache itself.
        """
        name, ids, first = type(self.press).__name__, prompt.input_ids, prompt.layer(0)
        model = first.parts.model
        if model is None:
            raise ValueError(f"{name} needs the model, which this prompt does not have: use headkv.compress")
        decoder, modules = decoder_of(model), [parts.module for parts in parts_of(model)]
        cache, n = DynamicCache(), prompt.length
        positions = torch.arange(n, device=ids.device)
        with torch.no_grad(), unheard(model), _left_as_it_was([decoder, *modules]):
            for module in modules:
                module.masked_key_indices = None
            with self.press(model):
                decoder(input_ids=ids[None], past_key_values=cache, use_cache=True, cache_position=positions)
            masked = [module.masked_key_indices for module in modules]
        if any(cache.get_seq_length(i) != n for i in range(len(modules))):
            raise ValueError(f"press must only mask entries, but {name} removes or adds some itself")
        return [_keep(indices, first.num_kv_heads, n) for indices in masked]


def realize(press: Any, *, observed_queries: int | None = 0) -> RealizedPress | RealizedAtExit:
    """A press that only masks, as a method of headkv: what it masks is really gone.

    kvpress leaves the whole cache in memory and gives masked entries a key that no query should see; here the press
    decides as it always does, and the ragged cache stores only what it leaves visible: `headkv.compress(model,
    realize(AdaKVPress(SnapKVPress(0.5))))`. Masks set by the hooks of the layers are realised layer by layer while the
    prompt is read. Masks set when the press's `with` block ends (KVzip and its kin) are realised once all of it is,
    and for them the prompt is read a second time, inside that block.

    A head whose entries are all masked keeps its newest one, as no row is ever empty.

    Args:
        press: whatever sets `masked_key_indices` once the prompt is read; `compression_ratio` is its own, the share
            removed.
        observed_queries: last queries whose attention weights the press is given, as in `KVPressScorer`.

    Raises:
        TypeError: not a press.
        ValueError: a press that evicts while decoding, which a method for prompts can not do.
    """
    _checks.has("press", press, "forward_hook")
    name = type(press).__name__
    if getattr(press, "decoding", False):
        raise ValueError(f"decoding of {name} must be False: a method decides about the prompt, got True")
    if hasattr(press, "compression_interval") or hasattr(press, "decoding_press"):
        raise ValueError(f"press must mask once the prompt is read, but {name} does so while decoding")
    if callable(press) and type(press).__call__.__qualname__ != "BasePress.__call__":
        return RealizedAtExit(press)
    if observed_queries is not None:
        _checks.whole("observed_queries", observed_queries)
    return RealizedPress(press, observed_queries)


def _begun(press: Any, prefill: Prefill, observed_queries: int | None) -> PressCall:
    """What the press is called with; at the first layer it is shown the model, as when its own block is entered."""
    model = prefill.parts.model
    if prefill.layer_idx == 0 and model is not None and hasattr(press, "post_init_from_model"):
        press.post_init_from_model(model)
    return PressCall.of(press, prefill, observed_queries)


@contextmanager
def _said_by(press: str, observed_queries: int | None) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        got = f"observed_queries={observed_queries}"
        raise ValueError(f"{press} refused its input ({error}), with {got}") from error


def _same(given: Tensor, now: Tensor) -> bool:
    return given.shape == now.shape and torch.equal(given, now)


def _keep(masked: Any, heads: int, n: int) -> Keep:
    """All but `masked`: batch, head and position of each entry, or None."""
    mask = torch.ones(heads, n, dtype=torch.bool)
    if masked is not None:
        _, head, position = (index.cpu() for index in masked)
        mask[head, position] = False
    mask[~mask.any(1), -1] = True
    return Keep(mask)


@contextmanager
def _left_as_it_was(modules: list[Any]) -> Iterator[None]:
    """Inside, a press may set attributes and parts of these modules; on exit they are gone or what they were."""
    former = [(dict(vars(module)), dict(module._modules)) for module in modules]
    try:
        yield
    finally:
        for module, (attributes, parts) in zip(modules, former, strict=True):
            vars(module).clear()
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(parts)
