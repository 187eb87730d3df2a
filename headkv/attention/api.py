"""`ragged_decode`, `ragged_step` and `ragged_extend`: check the arguments once, choose the backend by name, call it."""

from __future__ import annotations

import importlib
from functools import partial
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from headkv import _checks
from headkv.attention.gradients import without_gradients
from headkv.attention.mixed import by_part
from headkv.cache import MixedLayer, RaggedLayer
from headkv.cache.checks import appendable, storable
from headkv.cache.mixed import Store
from headkv.logits import Rule

Backend = Literal["auto", "reference", "rust", "triton"]
BACKENDS = ("auto", "reference", "rust", "triton")


def ragged_decode(
    q: Tensor,
    layer: Store,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention of one new token a sequence over the ragged layer that already holds it.

    Args:
        q: `[B, HQ, D]`; query head `i` reads KV head `i // (HQ // H)`.
        layer: a `RaggedLayer` or `MixedLayer`, or a layer of a `RaggedCache`.
        scale: of the logits; default `D ** -0.5`.
        sliding_window: the model's own window: entries at a distance of `sliding_window` or more are not seen.
        softcap: logits become `softcap * tanh(logits / softcap)`.
        sink_logits: `[HQ]`, of each query head one more logit that has no value (GPT-OSS's sinks); -inf: none.
        backend: "reference", "rust" (CPU), "triton" (GPU), or "auto": see `choose_backend`.

    Returns:
        `[B, HQ, D]` in the dtype of `q`; sums are taken in float32. A later `backward` through it is refused.

    Raises:
        ValueError, TypeError: on arguments that do not fit the layer.
        ImportError: when the named backend is not installed; the message says how to install it.
    """
    layer = _ragged(layer)
    rule = Rule.of(layer.head_dim, scale, sliding_window, softcap, sink_logits)
    _check(q, layer, 3, rule)
    run = _installed(choose_backend(layer, backend, q.dtype)).decode
    return without_gradients(partial(by_part, run, layer), q, rule=rule)


def ragged_step(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    layer: Store,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Store one new token a sequence, and attend over all: `layer.append` and `ragged_decode`, on a GPU in one go.

    Args:
        q: `[B, HQ, D]`.
        keys, values: `[B, H, D]` of the new token, in the layer's dtype.
        layer, scale, sliding_window, softcap, sink_logits, backend: as in `ragged_decode`.

    Returns:
        `[B, HQ, D]` in the dtype of `q`.

    Raises:
        ValueError, TypeError, ImportError: as `ragged_decode`; the layer is unchanged then.
    """
    layer = _ragged(layer)
    return step(
        q, keys, values, layer, Rule.of(layer.head_dim, scale, sliding_window, softcap, sink_logits), backend
    )


def step(
    q: Tensor, keys: Tensor, values: Tensor, layer: Store, rule: Rule, backend: Backend = "auto"
) -> Tensor:
    """`ragged_step`, with the numbers of its rule together."""
    _check_step(q, keys, values, layer, rule)
    name = choose_backend(layer, backend, q.dtype)
    return without_gradients(partial(_step, layer=layer, name=name), q, keys, values, rule=rule)


def _step(q: Tensor, keys: Tensor, values: Tensor, *, layer: Store, rule: Rule, name: str) -> Tensor:
    run = _installed(name)
    if name != "triton":
        layer.append(keys[:, :, None], values[:, :, None])
        return by_part(run.decode, layer, q, rule=rule)
    layer.reserve(1)
    out = by_part(run.step, layer, q, keys, values, rule=rule)
    layer.advance(1)
    return out


def recorded_step(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    layer: Store,
    rule: Rule,
    backend: Backend = "auto",
    *,
    seen: Tensor,
) -> Tensor:
    """`ragged_step` for a CUDA graph to hold: nothing is counted on the host.

    Make room by `layer.reserve` before it runs, and count by `layer.advance` afterwards. It reads the layer ahead of
    the launches before it, so that other layers' steps must lie between two of one layer.

    Args:
        q, keys, values: as in `ragged_step`.
        seen: `[1]` int64 on the device, the new token's position.

    Raises:
        ValueError: a layer whose backend is not "triton".
    """
    _check_step(q, keys, values, layer, rule)
    if (name := choose_backend(layer, backend, q.dtype)) != "triton":
        raise ValueError(f"seen must be None with the backend {name!r}, got a tensor")
    run = partial(_installed(name).step, seen=seen, ahead=True)
    return by_part(run, layer, q, keys, values, rule=rule)


def ragged_extend(
    q: Tensor,
    layer: Store,
    *,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention of T new tokens a sequence, causal among themselves, over the layer that already holds them.

    Args:
        q: `[B, HQ, T, D]`.
        query_positions: `[B, T]` int, where in the text the queries stand; default: the last T tokens seen.
        layer, scale, sliding_window, softcap, sink_logits, backend: as in `ragged_decode`.

    Returns:
        `[B, HQ, T, D]` in the dtype of `q`.
    """
    layer = _ragged(layer)
    rule = Rule.of(layer.head_dim, scale, sliding_window, softcap, sink_logits)
    return extend(q, layer, rule, backend, query_positions=query_positions)


def extend(
    q: Tensor,
    layer: Store,
    rule: Rule,
    backend: Backend = "auto",
    *,
    query_positions: Tensor | None = None,
) -> Tensor:
    """`ragged_extend`, with the numbers of its rule together."""
    _check(q, layer, 4, rule)
    batch_size, tokens = q.shape[0], q.shape[2]
    if query_positions is None:
        if tokens > layer.seen:
            raise ValueError(
                f"q must hold at most the {layer.seen} tokens that the layer has seen, got {tokens}"
            )
        last = torch.arange(layer.seen - tokens, layer.seen, device=q.device)
        query_positions = last.expand(batch_size, -1)
    elif query_positions.shape != (batch_size, tokens) or query_positions.dtype.is_floating_point:
        got = f"{query_positions.dtype} {list(query_positions.shape)}"
        raise ValueError(f"query_positions must be int of shape [{batch_size}, {tokens}], got {got}")
    run = partial(_installed(choose_backend(layer, backend, q.dtype)).extend, query_positions=query_positions)
    return without_gradients(partial(by_part, run, layer), q, rule=rule)


def choose_backend(layer: Store, backend: Backend = "auto", dtype: torch.dtype | None = None) -> str:
    """The name of the backend that will run: `backend` itself, or for "auto" Rust on a CPU, Triton on a GPU, and the
    reference where that one is not installed or the queries are of float64.

    Raises:
        ValueError: no such backend.
        TypeError: float64 queries and a backend that would round them.

    >>> layer = RaggedLayer.from_rows([[(torch.zeros(2, 32), torch.zeros(2, 32))]])
    >>> choose_backend(layer, "reference")
    'reference'
    """
    _checks.one_of("backend", backend, BACKENDS)
    if backend in ("rust", "triton") and dtype == torch.float64:
        raise TypeError(
            f"q must be float32, bfloat16 or float16 with the backend {backend!r}, got {dtype}; "
            "the backend 'reference' computes in float64"
        )
    if backend != "auto":
        return backend
    fast = None if dtype == torch.float64 else {"cpu": "rust", "cuda": "triton"}.get(layer.device.type)
    return fast if fast is not None and _backend(fast).available() else "reference"


def _backend(name: str) -> ModuleType:
    return importlib.import_module(f"headkv.attention.{name}")


def _installed(name: str) -> ModuleType:
    """The backend's module, or an ImportError that says how to install what it needs."""
    module = _backend(name)
    if name != "reference":
        module.require()
    return module


def _ragged(layer: Any) -> Store:
    # A RaggedCache's layer holds a store once it has seen a prompt.
    inner = getattr(layer, "ragged", layer)
    if not isinstance(inner, (RaggedLayer, MixedLayer)):
        raise TypeError(
            f"layer must be a RaggedLayer or a filled layer of a RaggedCache, got {type(layer).__name__}"
        )
    return inner


def _check_step(q: Tensor, keys: Tensor, values: Tensor, layer: Store, rule: Rule) -> None:
    _check(q, layer, 3, rule)
    for name, new in (("keys", keys), ("values", values)):
        if not isinstance(new, Tensor) or new.ndim != 3:
            raise ValueError(f"{name} must have shape [B, H, D], got {list(getattr(new, 'shape', ()))}")
    appendable(layer, keys[:, :, None], values[:, :, None])


def _check(q: Tensor, layer: Store, ndim: int, rule: Rule) -> None:
    # float64 queries: the reference tells the truth.
    if not (isinstance(q, Tensor) and q.dtype == torch.float64):
        storable("q", q)
    shape = "[B, HQ, D]" if ndim == 3 else "[B, HQ, T, D]"
    if q.ndim != ndim or 0 in q.shape:
        raise ValueError(f"q must have shape {shape} with no empty dimension, got {list(q.shape)}")
    if q.shape[0] != layer.batch_size or q.shape[-1] != layer.head_dim:
        raise ValueError(
            f"q must have B={layer.batch_size} and D={layer.head_dim} like layer, got {list(q.shape)}"
        )
    if q.shape[1] % layer.num_kv_heads:
        raise ValueError(
            f"q must have a multiple of {layer.num_kv_heads} heads (KV heads of layer), got {q.shape[1]}"
        )
    if q.device != layer.device:
        raise ValueError(f"q must be on the layer's device {layer.device}, got {q.device}")
    rule.check_heads(q)
    if rule.sliding_window is not None and layer.compensates:
        got = rule.sliding_window
        raise ValueError(f"sliding_window must be None on a layer with compensation entries, got {got}")
