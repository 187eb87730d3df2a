"""The KV heads of a model in another order: the same model, whose ranks have other heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def reorder_heads(model: PreTrainedModel, order: Tensor) -> None:
    """Put the KV heads of every layer, with the query heads of their groups, in another order, in place.

    The model computes what it did, up to the order of one sum in each layer. Do it before a model is shared out over
    ranks: reorder, `save_pretrained`, and load that with a `tp_plan`. Profiles must follow: `profile.reordered(order)`.

    Args:
        model: a decoder of transformers with separate projections `q_proj`, `k_proj`, `v_proj`, `o_proj`.
        order: `[L, H]` int64, see `headkv.heads.balanced_order`.

    Raises:
        ValueError: an order that is none, or attention of another form; the model is unchanged then.
    """
    attentions = [x for x in model.modules() if isinstance(getattr(x, "k_proj", None), nn.Linear)]
    if order.ndim != 2 or len(order) != len(attentions) or order.dtype != torch.int64:
        raise ValueError(f"order must be int64 [{len(attentions)}, H], got {order.dtype} {list(order.shape)}")
    if not torch.equal(order.sort(1).values, torch.arange(order.shape[1]).expand_as(order)):
        raise ValueError("order must hold every head of a layer once")
    for attention in attentions:
        _check(attention, order.shape[1])
    for attention, heads in zip(attentions, order, strict=True):
        output: Any = attention.o_proj
        for name in ("q_proj", "k_proj", "v_proj"):
            projection = getattr(attention, name)
            for parameter in projection.parameters(recurse=False):
                _reorder(parameter, heads, 0)
        _reorder(output.weight, heads, 1)
        if isinstance(sinks := getattr(attention, "sinks", None), nn.Parameter):
            _reorder(sinks, heads, 0)


def _reorder(parameter: Tensor, heads: Tensor, dim: int) -> None:
    by_head = parameter.unflatten(dim, (len(heads), -1))
    parameter.copy_(by_head.index_select(dim, heads.to(parameter.device)).flatten(dim, dim + 1))


def _check(attention: nn.Module, heads: int) -> None:
    """Attention whose heads can change places."""
    name, known = type(attention).__name__, ("q_proj", "k_proj", "v_proj", "o_proj")
    if not all(isinstance(getattr(attention, x, None), nn.Linear) for x in known):
        raise ValueError(
            f"model must have linear layers {', '.join(known)} in its attention, which {name} has not"
        )
    width = {x: getattr(attention, x).weight.shape[0] for x in known}
    dim = getattr(attention, "head_dim", 0)
    if width["k_proj"] != heads * dim or width["q_proj"] % width["k_proj"]:
        raise ValueError(
            f"order must be of the model's {width['k_proj'] // max(1, dim)} KV heads, got {heads}"
        )
    for path, parameter in attention.named_parameters():
        if hasattr(parameter, "device_mesh"):
            raise ValueError("model must be whole: reorder heads before they are shared out over ranks")
        if path.split(".")[0] not in (*known, "sinks") and parameter.numel() != dim:
            raise ValueError(f"model has {path} in its attention, whose heads headkv can not reorder")
