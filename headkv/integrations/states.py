"""What layers of hybrid models hold beside, or in place of, keys and values: states of the text, of one size for any.

They are transformers' own (`LinearAttentionLayer`: of a convolution, of a recurrence, or both), and nothing of them is
ever evicted. A state can not forget its last tokens, so it is copied wherever the text may be taken back.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

if TYPE_CHECKING:
    from torch import LongTensor

State = LinearAttentionLayer
_PARTS = ("conv_states", "recurrent_states")


def can_hold() -> bool:
    """Whether the states of the installed transformers go on with several tokens at once, as later turns bring them."""
    return hasattr(LinearAttentionLayer, "activate_past_recording")


def state_of(layer: Any) -> State | None:
    """The state of a cache's layer: the layer itself, what it has beside keys and values, or none."""
    held = layer if isinstance(layer, LinearAttentionCacheLayerMixin) else getattr(layer, "state", None)
    return cast("State | None", held)


def fresh(state: State) -> State:
    """An empty one of the same kind."""
    return LinearAttentionLayer(number_of_states=state.number_of_states)


def copied(state: State) -> State:
    """One to go on with by itself."""
    twin = copy.copy(state)
    for name, held in vars(state).items():
        if isinstance(held, dict):
            clones = {k: x.detach().clone() if isinstance(x, Tensor) else x for k, x in held.items()}
            vars(twin)[name] = clones
    return twin


def selected(state: State, batch: int) -> State:
    """A copy for one sequence of the batch."""
    twin = copied(state)
    twin.reorder_cache(cast("LongTensor", torch.tensor([batch])))
    return twin


def joined(states: Sequence[State]) -> State:
    """The sequences of several as one batch."""
    parts = [tensors(state) for state in states]
    return filled(states[0], {name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def tensors(state: State) -> dict[str, Tensor]:
    """What a state holds, by name and number: `{"conv_states.0": [B, channels, kernel], …}`."""
    held = {f"{name}.{k}": x for name in _PARTS for k, x in getattr(state, name).items()}
    return {name: x.detach() for name, x in held.items() if x is not None}


def state_bytes(state: State) -> int:
    """Bytes that it holds from the allocator."""
    held = (x.untyped_storage() for x in tensors(state).values())
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


def of_layer(held: dict[str, Tensor], layer: int, device: torch.device) -> dict[str, Tensor]:
    """Of all layers' tensors, named `"{layer}.{name}"`, those of one, by name, on its device."""
    prefix = f"{layer}."
    return {name.removeprefix(prefix): x.to(device) for name, x in held.items() if name.startswith(prefix)}


def filled(like: State, held: dict[str, Tensor]) -> State:
    """A state that holds copies of these `tensors`."""
    state = fresh(like)
    for key, x in held.items():
        name, _, number = key.partition(".")
        part: dict[str, Any] = {name: x}
        state.lazy_initialization(**part, state_idx=int(number))
        getattr(state, name)[int(number)].copy_(x)
        state.has_previous_state[int(number)] = True
    return state


class Beside:
    """Of a cache's layer that attends: the state that it has beside keys and values, where the model has both.

    Models of some releases of transformers ask the layer itself for the state's parts.
    """

    state: State | None = None

    @property
    def conv_states(self) -> Any:
        """Of the state, by number."""
        return getattr(self.state, "conv_states")  # noqa: B009  (an AttributeError where there is no state)

    @property
    def recurrent_states(self) -> Any:
        """Of the state, by number."""
        return getattr(self.state, "recurrent_states")  # noqa: B009

    @property
    def record_past(self) -> bool:
        """Whether the state keeps more than it needs."""
        return bool(getattr(self.state, "record_past", False))


class StatefulCache(Cache):
    """A cache some of whose layers hold a state beside keys and values, at `layer.state`.

    What a model asks of states goes to them. To all else such layers are those that attend.
    """

    @property
    def states(self) -> dict[int, State]:
        """By layer, what a hybrid's hold of the text beside keys and values, or in place of them; transformers' own."""
        return {i: state for i, layer in enumerate(self.layers) if (state := state_of(layer)) is not None}

    def hold(self, states: dict[int, State]) -> None:
        """Hold these, by layer, in place of its own `states`."""
        for i, state in states.items():
            if state_of(layer := self.layers[i]) is layer:
                self.layers[i] = state
            else:
                cast("Beside", layer).state = state

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these batch entries (int indices, or a bool mask)."""
        chosen = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self.reorder_cache(cast("LongTensor", chosen))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch entry."""
        # None before a prompt.
        sizes = [layer.batch_size for layer in self.layers if hasattr(layer, "batch_size")]
        if sizes:
            self.batch_select_indices(torch.arange(sizes[0]).repeat_interleave(repeats))

    @property
    def _states(self) -> Cache:
        return Cache(layers=[layer if (state := state_of(layer)) is None else state for layer in self.layers])

    def get_conv_state(self, *args: Any, **kwargs: Any) -> Any:
        """Of a layer, as transformers has it."""
        return self._states.get_conv_state(*args, **kwargs)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Any:
        """Of a layer, as transformers has it."""
        return self._states.update_conv_state(*args, **kwargs)

    def get_recurrent_state(self, *args: Any, **kwargs: Any) -> Any:
        """Of a layer, as transformers has it."""
        return self._states.get_recurrent_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Any:
        """Of a layer, as transformers has it."""
        return self._states.update_recurrent_state(*args, **kwargs)

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        """Of a layer, or the last that has a state, as transformers has it."""
        return self._states.has_previous_state(*args, **kwargs)
