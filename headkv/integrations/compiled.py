"""A model's layers as torch.compile makes them, for as long as a `with` block lasts.

Decode steps use it: their shapes stay the same. What lies between projections and attention is fused, and with one
sequence the projections themselves become kernels that read a weight faster than a matrix product of one row does.
Attention stays ours.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from headkv.integrations.joined import joined_products

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel

# Of torch's compiler: launches are tuned, and products of one row become kernels that are tuned, too.
OPTIONS = {"coordinate_descent_tuning": True}
# Of its front end: a layer's own number must not make its code another one; nor must models, batch sizes and kinds of
# layers, up to so many, make it give up.
CONFIG = {"allow_unspec_int_on_nn_module": True, "recompile_limit": 64}
# What a block changes and puts back belongs to the model, so that blocks on two threads take turns.
_TURN = threading.RLock()


def can_compile() -> bool:
    """Whether this release of torch knows all that is asked of it."""
    return all(hasattr(torch._dynamo.config, name) for name in CONFIG)


def decoder_layers(model: PreTrainedModel) -> Sequence[Module]:
    """The blocks that a decoder stacks, which can be compiled.

    Raises:
        ValueError: none was found, or this release of torch can not do it.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # what transformers derives them from

    if not can_compile():
        raise ValueError(f"compile_layers must be False with torch {torch.__version__}: it needs a newer one")
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"compile_layers must be False for {type(model).__name__}: it has no layers of transformers"
        )
    return layers


@contextmanager
def compiled_layers(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `model` runs its layers compiled, which they are when first called, all layers of a kind at once.

    Within a block of `joined_weights`, q, k and v are one product in them, and so are gate and up.
    """
    layers: Sequence[Any] = decoder_layers(model)
    with _TURN, joined_products(model) as joined:
        options: dict[str, Any] = dict(OPTIONS)
        if joined:
            from headkv.integrations.once import ONCE  # loads the compiler

            options["post_grad_custom_pre_pass"] = ONCE
        former = [layer._compiled_call_impl for layer in layers]
        try:
            for layer in layers:
                layer.compile(options=options)
            with torch._dynamo.config.patch(CONFIG):
                yield
        finally:
            for layer, call in zip(layers, former, strict=True):
                layer._compiled_call_impl = call
