"""`ragged_decode`, `ragged_step` and `ragged_extend`: check the arguments once, choose the backend by name, call it."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from headkv.cache.checks import appendable, storable
from headkv.cache.ragged import RaggedLayer

Backend = Literal["auto", "reference", "rust", "triton"]
BACKENDS = ("auto", "reference", "rust", "triton")


def ragged_decode(
    q: Tensor,
    layer: RaggedLayer,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention of one new token a sequence over the ragged layer that already holds it.

    Args:
        q: `[B, HQ, D]`; query head `i` reads KV head `i // (HQ // H)`.
        layer: a `RaggedLayer`, or a layer of a `RaggedCache`.
        scale: of the logits; default `D ** -0.5`.
        sliding_window: the model's own window: entries at a distance of `sliding_window` or more are not seen.
        softcap: logits become `softcap * tanh(logits / softcap)`.
        backend: "reference", "rust" (CPU), "triton" (GPU), or "auto": see `choose_backend`.

    Returns:
        `[B, HQ, D]` in the dtype of `q`; sums are taken in float32.

    Raises:
        ValueError, TypeError: on arguments that do not fit the layer.
        ImportError: when the named backend is not installed; the message says how to install it.
    """
    layer = _ragged(layer)
    scale = _check(q, layer, 3, scale, sliding_window, softcap)
    run = _installed(choose_backend(layer, backend, q.dtype)).decode
    return run(q, layer, scale=scale, sliding_window=sliding_window, softcap=softcap)


def ragged_step(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    layer: RaggedLayer,
    *,
    seen: Tensor | None = None,
    ahead: bool = False,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Store one new token a sequence, and attend over all: `layer.append` and `ragged_decode`, on a GPU in one go.

    Args:
        q: `[B, HQ, D]`.
        keys, values: `[B, H, D]` of the new token, in the layer's dtype.
        seen: None, or `[1]` int64 on the device, the new token's position (backend "triton" only). Then nothing is
            counted on the host, so that a CUDA graph can hold the call: make room by `layer.reserve` before it runs,
            and count by `layer.advance` afterwards.
        ahead: with `seen`: read the layer even before the launches before this one in the stream have ended. Right only
            where none of those that may still run writes this layer, as when other layers' steps lie between.
        layer, scale, sliding_window, softcap, backend: as in `ragged_decode`.

    Returns:
        `[B, HQ, D]` in the dtype of `q`.

    Raises:
        ValueError, TypeError, ImportError: as `ragged_decode`; the layer is unchanged then.
    """
    layer = _ragged(layer)
    scale = _check(q, layer, 3, scale, sliding_window, softcap)
    for name, new in (("keys", keys), ("values", values)):
        if not isinstance(new, Tensor) or new.ndim != 3:
            raise ValueError(f"{name} must have shape [B, H, D], got {list(getattr(new, 'shape', ()))}")
    appendable(layer, keys[:, :, None], values[:, :, None])
    name = choose_backend(layer, backend, q.dtype)
    run = _installed(name)
    options: dict[str, Any] = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap}
    if seen is not None:
        if name != "triton":
            raise ValueError(f"seen must be None with the backend {name!r}, got a tensor")
        return run.step(q, keys, values, layer, seen=seen, ahead=ahead, **options)
    if name != "triton":
        layer.append(keys[:, :, None], values[:, :, None])
        return run.decode(q, layer, **options)
    layer.reserve(1)
    out = run.step(q, keys, values, layer, **options)
    layer.advance(1)
    return out


def ragged_extend(
    q: Tensor,
    layer: RaggedLayer,
    *,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention of T new tokens a sequence, causal among themselves, over the layer that already holds them.

    Args:
        q: `[B, HQ, T, D]`.
        query_positions: `[B, T]` int, where in the text the queries stand; default: the last T tokens seen.
        layer, scale, sliding_window, softcap, backend: as in `ragged_decode`.

    Returns:
        `[B, HQ, T, D]` in the dtype of `q`.
    """
    layer = _ragged(layer)
    scale = _check(q, layer, 4, scale, sliding_window, softcap)
    tokens = q.shape[2]
    if query_positions is None:
        if tokens > layer.seen:
            raise ValueError(
                f"q must hold at most the {layer.seen} tokens that the layer has seen, got {tokens}"
            )
        query_positions = torch.arange(layer.seen - tokens, layer.seen, device=q.device).expand(
            q.shape[0], -1
        )
    elif query_positions.shape != (q.shape[0], tokens) or query_positions.dtype.is_floating_point:
        got = f"{query_positions.dtype} {list(query_positions.shape)}"
        raise ValueError(f"query_positions must be int of shape [{q.shape[0]}, {tokens}], got {got}")
    run = _installed(choose_backend(layer, backend, q.dtype)).extend
    return run(
        q, layer, query_positions=query_positions, scale=scale, sliding_window=sliding_window, softcap=softcap
    )


def choose_backend(layer: RaggedLayer, backend: Backend = "auto", dtype: torch.dtype | None = None) -> str:
    """The name of the backend that will run: `backend` itself, or for "auto" Rust on a CPU, Triton on a GPU, and the
    reference where that one is not installed or the queries are of float64.

    >>> layer = RaggedLayer.from_rows([[(torch.zeros(2, 32), torch.zeros(2, 32))]])
    >>> choose_backend(layer, "reference")
    'reference'
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
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


def _ragged(layer: RaggedLayer) -> RaggedLayer:
    inner = getattr(
        layer, "ragged", layer
    )  # a RaggedCache's layer holds a RaggedLayer once it has seen a prompt
    if not isinstance(inner, RaggedLayer):
        raise TypeError(
            f"layer must be a RaggedLayer or a filled layer of a RaggedCache, got {type(layer).__name__}"
        )
    return inner


def _check(
    q: Tensor, layer: RaggedLayer, ndim: int, scale: float | None, window: int | None, softcap: float | None
) -> float:
    if not (
        isinstance(q, Tensor) and q.dtype == torch.float64
    ):  # float64 queries: the reference tells the truth
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
    if window is not None and window < 1:
        raise ValueError(f"sliding_window must be None or at least 1, got {window}")
    if window is not None and layer.count is not None:
        raise ValueError(f"sliding_window must be None on a layer with compensation entries, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be None or positive, got {softcap}")
    if scale is None:
        return float(layer.head_dim**-0.5)
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be None or positive and finite, got {scale}")
    return float(scale)
