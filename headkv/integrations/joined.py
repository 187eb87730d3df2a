"""Projections of the same input as one product, in compiled decode steps: one launch instead of two or three.

Inside a block the weights of such projections are parts of one storage. Parameters stay the objects that they were, by
the same names, with the same values; nothing is held twice. A compiled layer multiplies by the whole; all else goes
through the modules as they are. Afterwards each weight has a storage of its own again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Part(nn.Module):
    """A linear layer that multiplies by the whole of which its weight is a part, and returns its own share.

    By itself that is wasteful. In a compiled layer its siblings ask for the same product, which `Once` computes once.
    """

    def __init__(self, linear: nn.Linear, whole: Tensor, bias: Tensor | None, begin: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._whole, self._begin = (whole, bias), begin  # in a tuple, that it is no buffer and no parameter

    def forward(self, inputs: Tensor) -> Tensor:
        """`[..., K]` -> `[..., N]`."""
        return F.linear(inputs, *self._whole)[..., self._begin : self._begin + self.weight.shape[0]]

    def holds(self) -> bool:
        """Whether the weight still is that part: nobody moved the model, say."""
        own, whole = self.weight.data, self._whole[0]
        begin = whole.data_ptr() + self._begin * whole.stride(0) * whole.element_size()
        return own.device == whole.device and own.dtype == whole.dtype and own.data_ptr() == begin


@dataclass
class Group:
    """Projections of one module that are joined."""

    parent: nn.Module
    linears: dict[str, nn.Linear]
    parts: dict[str, Part]


# The groups of a model inside a block, and how often its weights have moved.
_GROUPS: WeakKeyDictionary[nn.Module, Sequence[Group]] = WeakKeyDictionary()
_MOVES: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def times_moved(model: nn.Module) -> int:
    """How often weights of the model got other addresses by this; a CUDA graph of before must not be replayed."""
    return _MOVES.get(model, 0)


@contextmanager
def joined_weights(model: nn.Module) -> Iterator[int]:
    """Inside, projections of the same input are one product where layers run compiled (`compiled_layers`).

    Joined are q, k and v, or gate and up, that are plain `torch.nn.Linear`, alike in dtype, device and bias. Left as
    they are: quantised weights, adapters, weights that are tied, offloaded or share a storage, modules with hooks.
    Weights get other addresses when the block begins and when it ends: CUDA graphs of one's own that read them must be
    recorded again. (`DecodeGraph` does so by itself.)

    Yields:
        How many groups are joined.

    Raises:
        RuntimeError: inside another block with this model.
        torch.OutOfMemoryError: joining needs, for a moment, as much as the largest group takes. Nothing is joined then.
    """
    if model in _GROUPS:
        raise RuntimeError("model has its weights joined already: leave that block first")
    _GROUPS[model] = groups = []
    try:
        for parent, linears in _alike(model):
            groups.append(_join(parent, linears))
        _moved(model)
        yield len(groups)
    finally:
        del _GROUPS[model]
        try:
            while groups:
                _part(groups.pop())
        finally:
            _moved(model)


@contextmanager
def joined_products(model: nn.Module) -> Iterator[bool]:
    """Inside, the modules of groups are `Part`s: for layers that are compiled with `Once`. Yields whether any is."""
    groups = [group for group in _GROUPS.get(model, ()) if all(part.holds() for part in group.parts.values())]
    try:
        for group in groups:
            group.parent._modules.update(group.parts)
        yield bool(groups)
    finally:
        for group in groups:
            group.parent._modules.update(group.linears)


def _moved(model: nn.Module) -> None:
    """Counts, and returns memory that no longer fits what is asked for."""
    _MOVES[model] = times_moved(model) + 1
    if any(parameter.is_cuda for parameter in model.parameters()):
        torch.cuda.empty_cache()


def _alike(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, nn.Linear]]]:
    """Modules, each with the projections of it that can be joined."""
    owners = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    for parent in list(model.modules()):
        for names in SIBLINGS:
            linears: dict[str, Any] = {name: parent._modules.get(name) for name in names}
            if all(_plain(linear, owners) for linear in linears.values()):
                kinds = {
                    (w.dtype, w.device, w.shape[1], linear.bias is None, w.requires_grad)
                    for linear in linears.values()
                    for w in [linear.weight]
                }
                if len(kinds) == 1 and len({*map(id, linears.values())}) == len(names):
                    yield parent, linears


def _plain(linear: nn.Module | None, owners: Counter[int]) -> bool:
    """Whether a module is a linear layer and nothing else, and its weights are nobody else's."""
    if type(linear) is not nn.Linear or "forward" in vars(linear):
        return False
    if (
        linear._forward_hooks
        or linear._forward_pre_hooks
        or linear._backward_hooks
        or linear._backward_pre_hooks
    ):
        return False
    own: list[Tensor] = [weight for weight in (linear.weight, linear.bias) if weight is not None]
    return all(
        type(weight) is nn.Parameter
        and type(weight.data) is Tensor
        and owners[id(weight)] == 1
        and not weight.is_meta
        and not weight.is_inference()
        and weight.is_contiguous()
        and weight.untyped_storage().nbytes() == weight.nbytes
        for weight in own
    )


def _join(parent: nn.Module, linears: dict[str, nn.Linear]) -> Group:
    weight = _one([linear.weight for linear in linears.values()])
    biases = [linear.bias for linear in linears.values() if linear.bias is not None]
    bias = _one(biases) if biases else None
    parts, begin = {}, 0
    for name, linear in linears.items():
        parts[name] = Part(linear, weight, bias, begin).train(linear.training)
        begin += linear.weight.shape[0]
    return Group(parent, linears, parts)


def _one(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor of all; each parameter is a view of it."""
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.cat(list(parameters))
        shares = whole.split([len(parameter) for parameter in parameters])
        for parameter, share in zip(parameters, shares, strict=True):
            parameter.data = share
    return whole


def _part(group: Group) -> None:
    """Gives each parameter a storage of its own, unless it has got another one meanwhile."""
    with torch.inference_mode(False), torch.no_grad():
        for part in group.parts.values():
            whole, bias = part._whole
            for parameter, joined in ((part.weight, whole), (part.bias, bias)):
                if (
                    joined is not None
                    and parameter.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()
                ):
                    parameter.data = parameter.data.clone()
