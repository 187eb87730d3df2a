"""A model's layers as torch.compile makes them, for as long as a `with` block lasts.

Decode steps use it: their shapes stay the same. What lies between projections and attention is fused, and with one
sequence the projections themselves become kernels that read a weight faster than a matrix product of one row does.
Attention stays ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel

OPTIONS = {
    "coordinate_descent_tuning": True
}  # of the inductor: kernels tuned, products of one row by kernels as well
VARIANTS = 64  # of one function's code: models, batch sizes, kinds of layers


def decoder_layers(model: PreTrainedModel) -> Sequence[Module]:
    """The blocks that a decoder stacks.

    Raises:
        ValueError: none was found.
    """
    from transformers.modeling_layers import (
        GradientCheckpointingLayer,
    )  # what transformers derives all of them from

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"compile_layers must be False for {type(model).__name__}: it has no layers of transformers"
        )
    return layers


@contextmanager
def compiled_layers(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `model` runs its layers compiled, which they are when first called, all layers of a kind at once."""
    layers: Sequence[Any] = decoder_layers(model)
    former = [layer._compiled_call_impl for layer in layers]
    # A layer's own number must not make its code another one.
    config = {"allow_unspec_int_on_nn_module": True, "recompile_limit": VARIANTS}
    try:
        for layer in layers:
            layer.compile(options=OPTIONS)
        with torch._dynamo.config.patch(config):
            yield
    finally:
        for layer, call in zip(layers, former, strict=True):
            layer._compiled_call_impl = call
