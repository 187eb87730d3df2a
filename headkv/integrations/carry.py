"""Whether a hybrid's states are in its cache, and go on where several tokens come at once: its modules are asked.

Later turns, prompts in chunks and texts read again rely on it. Some models of some releases of transformers begin their
recurrence anew then, and say nothing: single tokens alone go on from what was read.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from headkv.integrations.states import State, fresh, state_of, tensors

if TYPE_CHECKING:
    from torch.nn import Module

TOKENS, AT_ONCE = 6, 3
# What modules call the cache.
NAMES = ("cache_params", "past_key_values", "cache")


def check_states(decoder: Module, layers: Sequence[Any]) -> None:
    """States of a decoder are held by its cache; `layers` are those of one, and stay as they are.

    Raises:
        ValueError: no module is seen to write one.
    """
    if not _mixers(decoder, layers):
        raise ValueError(f"{type(decoder).__name__} is a hybrid that does not keep its states in the cache")


def check_carries(decoder: Module, layers: Sequence[Any]) -> None:
    """States of a decoder go on over several tokens; `layers` are those of a cache for it, and stay as they are.

    Raises:
        ValueError: they do not, or nobody can say.
    """
    lost = [type(mixer.module).__name__ for mixer in _mixers(decoder, layers) if not mixer.carries()]
    if lost:
        raise ValueError(
            f"{type(decoder).__name__} forgets a state of the text where several tokens come at once "
            f"({', '.join(lost)}, in this release of transformers): give it the whole text as one prompt, then "
            "single tokens; later turns, chunks, and what reads behind a prompt are not served"
        )


def _mixers(decoder: Module, layers: Sequence[Any]) -> list[Mixer]:
    """Of each kind of module that is seen to write a state of the cache, one."""
    found: dict[type, Mixer] = {}
    for module in decoder.modules():
        index, known = getattr(module, "layer_idx", None), inspect.signature(type(module).forward).parameters
        name = next((name for name in NAMES if name in known), None)
        if (
            not isinstance(index, int)
            or not 0 <= index < len(layers)
            or name is None
            or type(module) in found
        ):
            continue
        state = state_of(layers[index])
        if state is not None and not isinstance(module, GradientCheckpointingLayer):
            mixer = Mixer(module, name, index, state, decoder)
            if mixer.writes():
                found[type(module)] = mixer
    return list(found.values())


@dataclass(frozen=True, eq=False)
class Mixer:
    """A module that may write a state.

    Args:
        module: called as its layer calls it.
        name: of the cache in that call.
        index: of the layer.
        state: one of its kind.
        decoder: the whole.
    """

    module: Any
    name: str
    index: int
    state: State
    decoder: Any

    def writes(self) -> bool:
        """Whether a state is there after a call; not where more must be given, as to attention."""
        try:
            return bool(self.read(self.module, TOKENS))
        except Exception:  # of whatever kind
            return False

    def carries(self) -> bool:
        """Whether several tokens after others give what they give when all come at once, but for rounding."""
        try:
            plain = self._weight().dtype == torch.float32
            precise = self.module if plain else copy.deepcopy(self.module).float()
            readings = [self.read(precise, chunk) for chunk in (TOKENS, 1, AT_ONCE)]
        except Exception:  # of whatever kind: nobody can say
            return False
        return all(_equal(*found) for found in zip(*readings, strict=True))

    @torch.no_grad()
    def read(self, module: Any, chunk: int) -> list[Tensor]:
        """The last outputs of some tokens, and the states afterwards; nothing where none was written."""
        noise = torch.randn(
            1, TOKENS, self.decoder.config.hidden_size, generator=torch.Generator().manual_seed(0)
        )
        weight = self._weight(module)
        hidden = noise.to(self.decoder.device if weight.is_meta else weight.device, weight.dtype)
        states = [fresh(self.state) for _ in range(self.index + 1)]
        cache = Cache(layers=list(states))
        parts = [module(hidden_states=part, **{self.name: cache}) for part in hidden.split(chunk, 1)]
        if not any(states[self.index].has_previous_state.values()):
            return []
        outputs = [(part,) if isinstance(part, Tensor) else part for part in parts]
        last = torch.cat([torch.cat([x.flatten(2) for x in part], -1) for part in outputs], 1)[:, -AT_ONCE:]
        return [last, *tensors(states[self.index]).values()]

    def _weight(self, module: Any = None) -> Tensor:
        parts: Iterator[Tensor] = (module or self.module).parameters()
        return next(x for x in parts if x.is_floating_point())


def _equal(whole: Tensor, single: Tensor, several: Tensor) -> bool:
    """Whether `several` is `whole` but for rounding, as `single` shows that."""
    off, rounding = (float((x - whole).norm()) for x in (several, single))
    return off <= max(4 * rounding, 1e-3 * float(whole.norm()))
