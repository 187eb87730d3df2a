"""Gradients end, with an error, where attention is not recorded: at a ragged cache, and where heads stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headkv.logits import Rule


class _Refuse(torch.autograd.Function):
    """Hand `out` on, as something that depends on the inputs, and refuse when a gradient comes back."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *inputs: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "gradients do not pass through a ragged cache, which stores keys and values without what made them, nor "
            "through heads that stream, slide or have a sink: train over a prefix in a transformers DynamicCache, or "
            "outside headkv.compress; for inference, call the model under torch.no_grad()"
        )


def without_gradients(attend: Callable[..., Tensor], *tensors: Tensor, rule: Rule) -> Tensor:
    """`attend(*tensors, rule=rule)`, recording nothing; a later `backward()` that needs a gradient of these raises.

    Merely calling a model whose parameters require gradients, as they do when freshly loaded, is inference.
    """
    inputs = tensors if rule.sink_logits is None else (*tensors, rule.sink_logits)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
        return attend(*tensors, rule=rule)
    with torch.no_grad():
        out = attend(*(x.detach() for x in tensors), rule=rule)
    refused: Tensor = _Refuse.apply(out, *inputs)
    return refused
