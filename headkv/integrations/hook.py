"""How a model's attention becomes headkv's, without patching anything of transformers.

Two functions registered under the name "headkv" carry it. A cache of ours hands the new keys and values on, wrapped in
`NewTokens`, to whatever attention function the model calls: here that is `attention_forward`, which asks the layer that
sent them to store them and to attend. `padding_mask` passes the padding mask on as it came. With any other cache, or
none, the attention is transformers' own: sdpa, or the model's eager one where sdpa can not do what the model asks.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    causal_mask_function,
    eager_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headkv.integrations.precision import Together, in_one_dtype
from headkv.logits import Rule

NAME = "headkv"
# Of attention, what transformers' sdpa refuses.
EAGER = ("softcap", "s_aux")
MASK_BLOCK = 1 << 24  # pairs of tokens looked at together


class Attends(Protocol):
    """A layer of a cache that stores new tokens, and attends over all."""

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """Of what is stored; None before the first token."""

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, rule: Rule) -> Tensor:
        """`q` `[B, HQ, T, D]`, `keys`, `values` `[B, H, T, D]`, `valid` `[B, T]` bool or None -> `[B, HQ, T, D]`."""


@dataclass(frozen=True)
class NewTokens:
    """One chunk's keys and values `[B, H, T, D]` on the way from a cache layer to the attention function."""

    layer: Attends
    keys: Tensor
    values: Tensor

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(
            f"this model reads `{name}` of the keys of a headkv cache before attention. Either its attention "
            f"implementation is not {NAME!r} (use headkv.compress, or model.set_attn_implementation({NAME!r})), or "
            "headkv does not support its attention"
        )


def attends(cache: Any) -> bool:
    """Whether `cache` hands tokens to layers of ours."""
    return any(hasattr(layer, "attend") for layer in getattr(cache, "layers", None) or ())


class UnsupportedMask(ValueError, AttributeError):
    """A mask is not used as attention does; an AttributeError too, so that `hasattr` answers False."""


@dataclass(frozen=True)
class PaddingMask:
    """What transformers says about masking a forward call, kept as it was said.

    `valid` is `[B, T]` bool, which of the new tokens are text, None for all; `only_causal(window)` says whether a token
    sees all text before it, within the layer's sliding window, and nothing else; `dense(make)` builds the mask that
    another attention would have got, by its own function.
    """

    valid: Tensor | None
    only_causal: Callable[[int | None], bool]
    dense: Callable[[Callable[..., Tensor | None]], Tensor | None]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PaddingMask:
        """The same for a layer on another device, as accelerate asks for where a model is spread."""
        move = functools.partial(_moved, device=device, non_blocking=non_blocking)
        return replace(self, valid=move(self.valid), dense=lambda make: move(self.dense(make)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedMask(
            f"something reads `{name}` of the attention mask before attention: static caches, compiled decoding and "
            f"models that change their masks are not supported with the attention implementation {NAME!r}"
        )


def _moved(mask: Tensor | None, device: torch.device | str | int, non_blocking: bool) -> Tensor | None:
    return None if mask is None else mask.to(device, non_blocking=non_blocking)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | NewTokens,
    value: Tensor | NewTokens,
    attention_mask: PaddingMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function "headkv": `query` `[B, HQ, T, D]` -> `[B, T, HQ, D]` and no weights."""
    if not isinstance(key, NewTokens):
        options = {"dropout": dropout, "scaling": scaling, "softcap": softcap, "s_aux": s_aux, **kwargs}
        return _as_transformers(module, (query, key, cast(Tensor, value)), attention_mask, options)
    for option in ("position_bias", "cache"):
        if kwargs.get(option) is not None:
            raise ValueError(
                f"{option} is not supported by headkv's attention (model class {type(module).__name__})"
            )
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions=True is not supported: a ragged cache never forms the attention matrix"
        )
    if dropout:
        raise ValueError(f"dropout must be 0 with a ragged cache, got {dropout}; call model.eval()")
    valid = None
    if isinstance(attention_mask, PaddingMask):
        valid = _moved(attention_mask.valid, query.device, False)
        if not attention_mask.only_causal(sliding_window):
            raise ValueError(
                "attention_mask must be causal: masks that join blocks of tokens are not supported"
            )
    elif attention_mask is not None:
        raise ValueError(f"attention_mask must be 2-D [B, tokens], got {list(attention_mask.shape)}")
    numbers = (scaling, sliding_window, softcap, s_aux)
    return _attend(query, key, valid, numbers).transpose(1, 2).contiguous(), None


def _as_transformers(
    module: torch.nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: PaddingMask | Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attention over keys and values that are none of ours: sdpa, or the eager one of the model's own file."""
    run, make = sdpa_attention_forward, cast("Callable[..., Tensor | None]", sdpa_mask)
    if any(options.get(name) is not None for name in EAGER):
        run = vars(sys.modules[type(module).__module__]).get("eager_attention_forward", run)
        make = functools.partial(eager_mask, dtype=tensors[0].dtype)
    return run(module, *tensors, mask.dense(make) if isinstance(mask, PaddingMask) else mask, **options)[
        0
    ], None


@torch.compiler.disable
def _attend(query: Tensor, tokens: NewTokens, valid: Tensor | None, numbers: tuple[Any, ...]) -> Tensor:
    rule = Rule.of(query.shape[-1], *numbers)
    layer, device = tokens.layer, query.device.type
    together, result = in_one_dtype(Together(query, tokens.keys, tokens.values), layer.stored_dtype)
    if not torch.is_autocast_enabled(device):
        return layer.attend(*together, valid, rule).to(result)
    with torch.autocast(device, enabled=False):  # so that nothing is rounded again
        return layer.attend(*together, valid, rule).to(result)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> PaddingMask:
    """transformers' mask function "headkv": keeps the new tokens' padding and how to build a dense mask, if need be."""
    kwargs.pop("dtype", None)  # of an eager mask, whose queries say it
    # Fewer keyword arguments than sdpa's own, as some came only with later releases.
    size = {"batch_size": batch_size, "kv_length": kv_length, "attention_mask": attention_mask, **kwargs}
    # transformers lets sdpa do without a mask unless something was laid over the plain one.
    plain = kwargs.get("allow_is_causal_skip", not kwargs.get("use_vmap", False))
    valid = None
    if attention_mask is not None:
        valid = attention_mask[:, kv_length - q_length : kv_length].bool()
        valid = None if bool(valid.all()) else valid
    return PaddingMask(
        valid,
        only_causal=functools.cache(lambda window: plain or _is_causal(window, q_length, **size)),
        dense=lambda make: make(q_length=q_length, **size),
    )


def _is_causal(window: int | None, q_length: int, *, batch_size: int, kv_length: int, **kwargs: Any) -> bool:
    """Whether a mask that something was laid over is what it would be without that."""
    bare = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    size: dict[str, Any] = {"batch_size": batch_size, "kv_length": kv_length}
    options = {**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    step = max(1, MASK_BLOCK // (batch_size * kv_length)) if "q_offset" in kwargs else q_length
    for begin in range(0, q_length, step):
        options["q_length"] = min(step, q_length - begin)
        if "q_offset" in kwargs:
            options["q_offset"] = kwargs["q_offset"] + begin
        laid = sdpa_mask(**size, **options)
        plain = sdpa_mask(**size, **{**options, "mask_function": bare, "use_vmap": False})
        if not torch.equal(cast(Tensor, laid), cast(Tensor, plain)):
            return False
    return True


def register() -> None:
    """Make the attention function known by its name again: some libraries wrap every one that they find."""
    ALL_ATTENTION_FUNCTIONS[NAME] = attention_forward


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, padding_mask)
