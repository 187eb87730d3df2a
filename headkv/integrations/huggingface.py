"""The ragged cache as a transformers cache, without patching anything of transformers.

Three public extension points carry it. `RaggedCache` is a `transformers.Cache`; its layers' `update` hands the new keys
and values on, wrapped in `NewTokens`, to whatever attention function the model calls. That function is ours,
registered under the name "headkv": it stores the tokens in the layer and attends over it. A mask function of the same
name passes the padding mask on as it came. With any other cache, or none, the attention is transformers' own sdpa.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from headkv._config import kv_heads
from headkv.attention import dense
from headkv.attention.api import BACKENDS, Backend, ragged_extend, ragged_step
from headkv.cache import LayerSnapshot, RaggedLayer, layout, moves
from headkv.cache.checks import count
from headkv.cache.ragged import MIN_HEADROOM
from headkv.integrations.planning import (
    ROLLBACK,
    Observation,
    all_padding,
    keep_entries,
    prefill_windows,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from headkv.methods.base import Method

NAME = "headkv"


@dataclass(frozen=True)
class NewTokens:
    """One chunk's keys and values `[B, H, T, D]` on the way from a cache layer to the attention function."""

    layer: RaggedCacheLayer
    keys: Tensor
    values: Tensor

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(
            f"this model reads `{name}` of the keys of a headkv cache before attention. Either its attention "
            f"implementation is not {NAME!r} (use headkv.compress, or model.set_attn_implementation({NAME!r})), or "
            "headkv does not support its attention"
        )


@dataclass(frozen=True)
class PaddingMask:
    """What transformers says about masking a forward call, kept as it was said.

    `valid` is `[B, T]` bool, which of the new tokens are text, None for all; `dense()` builds the mask that sdpa would
    have got.
    """

    valid: Tensor | None
    only_causal: bool
    dense: Callable[[], Tensor | None]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ValueError(
            f"something reads `{name}` of the attention mask before attention: static caches, compiled decoding and "
            f"models that change their masks are not supported with the attention implementation {NAME!r}"
        )


class RaggedCacheLayer(CacheLayerMixin):
    """One layer of a `RaggedCache`: empty until its first prompt, then a `RaggedLayer` at `.ragged`."""

    is_croppable = True

    def __init__(
        self,
        method: Method,
        layer_idx: int,
        num_layers: int,
        backend: Backend,
        storage: dict[str, int],
        chunked_prefill: bool,
    ):
        super().__init__()
        self.method, self.layer_idx, self.num_layers = method, layer_idx, num_layers
        self.backend, self.storage, self.chunked_prefill = backend, storage, chunked_prefill
        self.ragged: RaggedLayer | None = None
        self.clock: Tensor | None = (
            None  # the next token's position on the device, while a `DecodeGraph` records a step
        )
        self._observed: Observation | None = None  # the last queries of a prefill that is not complete yet
        self._streams = False  # and whether heads stream in it

    # -- the new tokens' way ----------------------------------------------------------------------------------------

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Wrap the new tokens for the attention function, which stores them."""
        tokens = NewTokens(self, key_states, value_states)
        return tokens, tokens

    @torch.compiler.disable
    def attend(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        valid: Tensor | None,
        *,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Store T new tokens and attend over everything kept: `q` `[B, HQ, T, D]` -> `[B, HQ, T, D]`.

        The first call is the prefill: dense attention, then the method chooses what stays, and only that is stored.
        Where heads stream in a chunked prefill, their rows are windowed from its first chunk on.
        """
        options: dict[str, Any] = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap}
        if self.ragged is None:
            windows: dict[str, Any] | None = self._windows(keys, valid, sliding_window)
            out = dense.prefill(q, keys, values, valid=valid, **(windows or {}), **options)
            seen = Observation.of(q, valid, self.method.observed_queries, **options)
            if self.chunked_prefill:
                empty = [(k[:0], v[:0]) for k, v in zip(keys[0], values[0], strict=True)]
                ragged = RaggedLayer.from_rows([empty] * keys.shape[0])
                if windows is not None:
                    ragged.rollback = self.storage["rollback"]
                    ragged.set_windows(**{name: x.to(keys.device) for name, x in windows.items()})
                ragged.append(keys, values, valid)  # a sequence's first chunk may be all padding
                self.ragged, self._observed, self._streams = ragged, seen, windows is not None
            else:
                self._store(keys, values, valid, seen)
            self.is_initialized = True
            return out
        tokens = q.shape[2]
        if tokens == 1:
            self.finalize_prefill()
            if valid is None:
                new = (q[:, :, 0], keys[:, :, 0], values[:, :, 0], self.ragged)
                # Recorded steps of one layer lie a whole model apart, so that they may read ahead.
                options |= {"seen": self.clock, "ahead": self.clock is not None}
                return ragged_step(*new, backend=self.backend, **options)[:, :, None]
        self.ragged.append(keys, values, valid)
        if self._observed is not None:
            self._observed = self._observed.extend(q, valid)
        return ragged_extend(q, self.ragged, backend=self.backend, **options)

    def _windows(
        self, keys: Tensor, valid: Tensor | None, sliding_window: int | None
    ) -> dict[str, Tensor] | None:
        """What heads see while this prompt is read, if the method says that they stream."""
        batch_size, num_kv_heads, n, _ = keys.shape
        lengths: list[int | None] = [None if self.chunked_prefill else n] * batch_size
        if valid is not None and not self.chunked_prefill and hasattr(self.method, "prefill_windows"):
            lengths = valid.sum(1).tolist()  # waits for the device
        where: dict[str, Any] = {"layer_idx": self.layer_idx, "num_layers": self.num_layers}
        shape: dict[str, Any] = {"num_kv_heads": num_kv_heads, "sliding_window": sliding_window}
        return prefill_windows(self.method, lengths, **where, **shape)

    def finalize_prefill(self) -> None:
        """End a chunked prefill: choose what stays of everything stored so far. Does nothing when that is done.

        Where heads stream, that is chosen already; what windowed rows hide then goes.
        """
        if self.ragged is None or self._observed is None:
            return
        layer, n = self.ragged, self.ragged.seen
        if self._streams:
            if bool((layer.length == 0).any()):
                raise all_padding(int((layer.length == 0).nonzero()[0]) // layer.num_kv_heads)
            layer.trim(self.storage["headroom"])
            self._observed = None
            return
        rows, offsets = layout.rows_of_slots(layer.length)
        slots = layer.start[rows] + offsets
        where = layer.positions[slots].long()
        source = torch.zeros(layer.rows * n, dtype=torch.int64, device=layer.device)
        source[rows * n + where] = slots  # padding takes any slot, and is not read
        valid = None
        if slots.numel() < source.numel():
            valid = torch.zeros(layer.batch_size, n, dtype=torch.bool, device=layer.device)
            valid[rows // layer.num_kv_heads, where] = True
        keys, values, _ = moves.gather(layer.pools, source)
        shape = (layer.batch_size, layer.num_kv_heads, n, layer.head_dim)
        self._store(keys.view(shape), values.view(shape), valid, self._observed)
        self._observed = None

    def _store(self, keys: Tensor, values: Tensor, valid: Tensor | None, observed: Observation) -> None:
        """Store of a whole prompt's keys and values `[B, H, n, D]` what the method chooses."""
        where: dict[str, Any] = {"layer_idx": self.layer_idx, "num_layers": self.num_layers}
        kept = keep_entries(
            self.method, observed, keys, values, valid, rollback=self.storage["rollback"], **where
        )
        self.ragged = RaggedLayer.from_dense(keys, values, valid=valid, **{**self.storage, **kept})

    # -- what transformers asks of a cache layer ----------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Sequences in the batch; absent before the first prompt, as transformers expects."""
        if self.ragged is None:
            raise AttributeError("batch_size: this layer has not seen a prompt yet")
        return self.ragged.batch_size

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first prompt says what to store."""

    def get_seq_length(self) -> int:
        """Tokens SEEN, also those no longer stored: positions and masks follow from it."""
        return 0 if self.ragged is None else self.ragged.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks speak of the text, not of the store: (tokens seen and new, offset 0)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length  # the older name

    def reset(self) -> None:
        """Forget everything."""
        self.ragged = self._observed = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; older transformers give the length to keep, a positive number."""
        if self.ragged is None:
            return
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.ragged.seen - tokens_to_remove)
        if remove and self._observed is not None:
            raise ValueError("cannot crop during a chunked prefill; call finalize_prefill() first")
        self.ragged.crop(remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Batch entry `i` becomes a copy of batch entry `beam_idx[i]`."""
        if self.ragged is not None:
            self.ragged.reorder(beam_idx)
            if self._observed is not None:
                self._observed = self._observed.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these batch entries (int indices, or a bool mask)."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch entry."""
        if self.ragged is not None:
            every = torch.arange(self.ragged.batch_size, device=self.ragged.device)
            self.reorder_cache(every.repeat_interleave(repeats))

    def offload(self) -> None:
        """Move the layer to the CPU."""
        if self.ragged is not None:
            self.ragged_device = self.ragged.device
            self.ragged.to("cpu")

    def prefetch(self) -> None:
        """Move an offloaded layer back."""
        if self.ragged is not None and hasattr(self, "ragged_device"):
            self.ragged.to(self.ragged_device)

    # -- for the reader -----------------------------------------------------------------------------------------------

    def filled(self) -> RaggedLayer:
        """The layer's store.

        Raises:
            RuntimeError: before the first prompt.
        """
        if self.ragged is None:
            raise RuntimeError("the cache is empty: run the model on a prompt first")
        return self.ragged

    def row(self, batch: int, head: int) -> Any:
        """Keys, values and positions of one row; see `RaggedLayer.row`."""
        return self.filled().row(batch, head)

    def __repr__(self) -> str:
        return f"RaggedCacheLayer({self.layer_idx}: {'empty' if self.ragged is None else self.ragged})"


class RaggedCache(Cache):
    """A transformers cache that stores, for every KV head, only the entries that a method keeps.

    Make it with `for_model` and pass it as `past_key_values`; `headkv.compress` does that for you.

    A forward call that fails, e.g. for want of memory, leaves its tokens in the layers that it came through. Take them
    out before the call is repeated: `cache.crop(n)`, with n the tokens seen before it; `cache.reset()` if it was the
    prompt.
    """

    layers: list[RaggedCacheLayer]  # type: ignore[assignment]

    def __init__(self, layers: list[RaggedCacheLayer]):
        super().__init__(layers=layers)  # type: ignore[arg-type]

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        method: Method,
        *,
        backend: Backend = "auto",
        headroom: int = MIN_HEADROOM,
        rollback: int = ROLLBACK,
        chunked_prefill: bool = False,
    ) -> RaggedCache:
        """An empty cache for one generation (or conversation) of `model`; sets the model's attention to "headkv".

        That attention is transformers' own sdpa for every other cache, so it may stay; `headkv.compress` puts the
        former one back on exit.

        Args:
            model: a decoder of transformers whose attention goes through its attention interface.
            method: what each head keeps of a prompt, e.g. `headkv.AdaKV(budget=0.2)`.
            backend: of attention after the prefill; see `headkv.ragged_decode`.
            headroom: free slots behind each row after the prefill; it grows by itself when they are used up.
            rollback: how many tokens windowed rows can take back (`crop`, assisted generation); they store as many
                entries more than they attend to.
            chunked_prefill: the prompt comes in several forward calls (`prefill_chunk_size`): wait with compression
                until the first call with a single token, or until `finalize_prefill()`. Heads that stream while the
                prompt is read (`streaming_prefill=True` of a method) do not wait: they never hold more than a chunk
                and their window.

        Raises:
            TypeError, ValueError: on a model or option that is not supported; the model is unchanged then.
        """
        config = supported_config(model)
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        if isinstance(method, type) or not callable(getattr(method, "plan", None)):
            raise TypeError(
                f"method must be a headkv method such as headkv.AdaKV(budget=0.2), got {method!r}"
            )
        for profile in getattr(method, "profiles", ()):
            profile.check_model(model)
        if chunked_prefill:
            _check_chunks(method, config)
        storage = {"headroom": count("headroom", headroom), "rollback": count("rollback", rollback)}
        num_layers = config.num_hidden_layers
        layers = [
            RaggedCacheLayer(method, i, num_layers, backend, storage, chunked_prefill)
            for i in range(num_layers)
        ]
        if model.config._attn_implementation != NAME:
            model.set_attn_implementation(NAME)
        return cls(layers)

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Hand the new tokens of one layer to the attention function; see `RaggedCacheLayer.update`.

        Raises:
            RuntimeError: an earlier call got through some of the layers only; the message says what to do.
        """
        if layer_idx == 0:
            self.check_even()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def check_even(self) -> None:
        """All layers have seen the same tokens.

        Raises:
            RuntimeError: they have not, as a forward call failed on its way; the message says what to do.
        """
        seen = {layer.get_seq_length() for layer in self.layers}
        if len(seen) == 1:
            return
        least = min(seen)
        prompt = least == 0 or any(layer._observed is not None for layer in self.layers)
        cure = "cache.reset()" if prompt else f"cache.crop({least})"
        raise RuntimeError(
            f"an earlier forward call failed on its way: layers have seen {least} to {max(seen)} tokens; "
            f"call {cure}, then repeat that call"
        )

    @property
    def seen(self) -> int:
        """Tokens of the text so far, also those no longer stored."""
        return self.get_seq_length()

    @property
    def nbytes(self) -> int:
        """Bytes that all layers hold from the allocator, with head room and bookkeeping."""
        return sum(layer.ragged.nbytes for layer in self.layers if layer.ragged is not None)

    def lengths(self) -> Tensor:
        """Stored entries, `[layers, B, H]` int64."""
        return torch.stack([layer.filled().lengths().cpu() for layer in self.layers])

    def finalize_prefill(self) -> None:
        """End a chunked prefill now; see `for_model`."""
        for layer in self.layers:
            layer.finalize_prefill()

    def snapshot(self) -> tuple[LayerSnapshot, ...]:
        """A copy of the whole cache: one compressed context answers many questions."""
        if any(layer._observed is not None for layer in self.layers):
            raise RuntimeError(
                "cannot take a snapshot during a chunked prefill; call finalize_prefill() first"
            )
        return tuple(layer.filled().snapshot() for layer in self.layers)

    def restore(self, snapshot: tuple[LayerSnapshot, ...]) -> None:
        """Become what the cache was when `snapshot` was taken."""
        if len(snapshot) != len(self.layers):
            raise ValueError(f"snapshot must hold {len(self.layers)} layers, got {len(snapshot)}")
        for layer, copy in zip(self.layers, snapshot, strict=True):
            layer.ragged = RaggedLayer.from_snapshot(copy)
            layer._observed, layer.is_initialized = None, True

    def __repr__(self) -> str:
        return f"RaggedCache({len(self.layers)} layers, {self.seen} tokens seen, {self.nbytes / 1e6:.1f} MB stored)"


def supported_config(model: Any) -> PreTrainedConfig:
    """The configuration of the decoder in `model`, if headkv can serve it.

    Raises:
        TypeError, ValueError: naming what is not supported.
    """
    if not hasattr(model, "config") or not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model {name} is an encoder-decoder; headkv supports decoders only")
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"model {name} does not call its attention through transformers' attention interface"
        )
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ValueError(
            f"model {name} has layers of kind {', '.join(sorted(kinds))}; allowed: full and sliding attention"
        )
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "kv_sharing_modes", None):
        raise ValueError(f"model {name} shares keys and values between layers, which headkv does not support")
    return config


def _check_chunks(method: Method, config: PreTrainedConfig) -> None:
    """A method that must know a prompt's length before it is read says so here, not at the first chunk."""
    shape = {"layer_idx": 0, "num_layers": config.num_hidden_layers, "num_kv_heads": kv_heads(config)}
    prefill_windows(method, [None], **shape, sliding_window=None)


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function "headkv": `query` `[B, HQ, T, D]` -> `[B, T, HQ, D]` and no weights."""
    if not isinstance(key, NewTokens):
        mask = attention_mask.dense() if isinstance(attention_mask, PaddingMask) else attention_mask
        return sdpa_attention_forward(
            module,
            query,
            key,
            cast(Tensor, value),
            mask,
            dropout=dropout,
            scaling=scaling,
            softcap=softcap,
            **kwargs,
        )
    for option in ("s_aux", "position_bias", "cache"):
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
        valid = attention_mask.valid
        if not attention_mask.only_causal:
            raise ValueError(
                "attention_mask must be causal: masks that join blocks of tokens are not supported"
            )
    elif attention_mask is not None:
        raise ValueError(f"attention_mask must be 2-D [B, tokens], got {list(attention_mask.shape)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options: dict[str, Any] = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap}
    out = key.layer.attend(query, key.keys, key.values, valid, **options)
    return out.transpose(1, 2).contiguous(), None


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> PaddingMask:
    """transformers' mask function "headkv": keeps the new tokens' padding and how to build a dense mask, if need be."""

    def build() -> Tensor | None:
        # Fewer keyword arguments than sdpa's own, as some came only with later releases.
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            attention_mask=attention_mask,
            use_vmap=use_vmap,
            **kwargs,
        )

    valid = None
    if attention_mask is not None:
        valid = attention_mask[:, kv_length - q_length : kv_length].bool()
        valid = None if bool(valid.all()) else valid
    return PaddingMask(valid, only_causal=not use_vmap, dense=build)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, padding_mask)
