"""One layer of the ragged cache, as transformers' caches have layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from headkv.attention import api, dense, padding
from headkv.attention.api import Backend
from headkv.attention.gradients import without_gradients
from headkv.cache import RaggedLayer
from headkv.cache.mixed import Store, from_snapshot, stored_in
from headkv.integrations.calls import PLAIN
from headkv.integrations.decoding import Growth
from headkv.integrations.hook import NewTokens
from headkv.integrations.looks import NoTensor
from headkv.integrations.planning import (
    Observation,
    all_padding,
    keep_entries,
    prefill_windows,
    storage_of,
    texts_of,
)
from headkv.integrations.states import Beside, State, copied, fresh
from headkv.integrations.support import CacheOptions, is_whole_prompt
from headkv.logits import Rule
from headkv.prefill import Parts

if TYPE_CHECKING:
    from torch import LongTensor

    from headkv.methods.base import Keep, Method, PromptMethod


class RaggedCacheLayer(Beside, CacheLayerMixin):
    """One layer of a `RaggedCache` that attends: empty until its first prompt, then a `RaggedLayer`
    at `.ragged`, or a `MixedLayer` where heads are stored in different ways.

    Args:
        method: what each head keeps of a prompt.
        layer_idx, num_layers: this layer, among those that attend.
        options: backend of attention after the prefill, head room, rollback and storage of the rows. With
            `chunked_prefill`, as for a method that decides for all layers at once, the prompt is not compressed when
            its first call has been read, but by `finalize_prefill`.
        parts: of the layer's attention, for methods that look at weights.
        state: what the layer has beside keys and values, in models that have both.
        is_croppable: whether tokens can be taken back; not beside states, of whatever layer.
    """

    keys = NoTensor()
    values = NoTensor()

    def __init__(
        self,
        method: Method | PromptMethod,
        layer_idx: int,
        num_layers: int,
        options: CacheOptions,
        parts: Parts = Parts(),  # noqa: B008  (frozen)
        *,
        state: State | None = None,
        is_croppable: bool = True,
    ):
        self.ragged: Store | None = None
        super().__init__()
        self.method, self.layer_idx, self.num_layers = method, layer_idx, num_layers
        self.options, self.parts, self.state, self.is_croppable = options, parts, state, is_croppable
        self.asked = (
            False  # for its length, by transformers, since the model's last call: see `calls.left_out`
        )
        self.call = PLAIN  # what is known of the forward call that is under way
        # The next token's position on the device, while a `DecodeGraph` records a step.
        self.clock: Tensor | None = None
        self.hidden: Tensor | None = (
            None  # what attention was given in the call under way, for methods that ask
        )
        self._observed: Observation | None = None  # the last queries of a prefill that is not complete yet
        self._streams = False  # and whether heads stream in it
        self.growth = Growth()  # since the prompt

    # -- the new tokens' way ----------------------------------------------------------------------------------------

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Wrap the new tokens for the attention function, which stores them."""
        self.asked = False
        tokens = NewTokens(self, key_states, value_states)
        return tokens, tokens

    @property
    def backend(self) -> Backend:
        """Of attention after the prefill."""
        return self.options.backend

    @property
    def seen(self) -> int:
        """Tokens of the text so far, also those no longer stored."""
        return 0 if self.ragged is None else self.ragged.seen

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """Of keys and values; None before the first token."""
        return None if self.ragged is None else self.ragged.dtype

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, rule: Rule) -> Tensor:
        """Store T new tokens and attend over everything kept: `q` `[B, HQ, T, D]` -> `[B, HQ, T, D]`.

        The first call is the prefill: dense attention, then the method chooses what stays, and only that is stored.
        Where heads stream in a chunked prefill, their rows are windowed from its first chunk on. Drafts that come with
        the prompt are no part of it: they are stored behind what stays, and attend to that.
        """
        drafts = self.call.drafts
        if not drafts or not self.reads_prompt:
            return self._attend(q, keys, values, valid, rule)
        end = q.shape[2] - drafts
        prompt, new = (
            (q[:, :, part], keys[:, :, part], values[:, :, part], None if valid is None else valid[:, part])
            for part in (slice(None, end), slice(end, None))
        )
        out = self._attend(*prompt, rule)
        self.finalize_prefill()
        return torch.cat([out, self._attend(*new, rule)], 2)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, rule: Rule) -> Tensor:
        if self.ragged is None:
            return self._prefill(q, keys, values, valid, rule)
        if q.shape[2] == 1 and self.call.remaining is None:
            self.finalize_prefill()
        add = partial(self._add, self.ragged, valid=valid)
        return without_gradients(add, q, keys, values, rule=rule)

    def _add(
        self, ragged: Store, q: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, rule: Rule
    ) -> Tensor:
        """Store new tokens behind others, and attend over all."""
        if self.options.decode is not None and self._observed is None:
            self.growth = self.growth.observe(q, valid, rule, self.options.decode)
        if q.shape[2] == 1 and valid is None and self._observed is None:
            return self._step(q, keys, values, ragged, rule)
        ragged.rollback = max(ragged.rollback, self.call.drafts)
        ragged.append(keys, values, valid)
        if self._observed is not None:
            self._observed = self._observed.extend(q, valid, self._heard(q.shape[2]))
        return api.extend(q, ragged, rule, self.backend)

    def _prefill(self, q: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, rule: Rule) -> Tensor:
        waits = self.options.chunked_prefill or is_whole_prompt(self.method) or bool(self.call.remaining)
        windows = self._windows(keys, valid, rule.sliding_window, waits)
        out = dense.prefill(q, keys, values, rule, valid=valid, **(windows or {}))
        out = padding.answered(out, q, keys, values, valid, rule, windows, self.backend)
        q, keys, values = q.detach(), keys.detach(), values.detach()
        heard = self._heard(q.shape[2])
        observed = Observation.of(q, valid, self.method.observed_queries, rule, heard)
        if waits:
            ragged = padding.stored_whole(keys, values, valid, windows, self.options.rollback)
            self.ragged, self._observed, self._streams = ragged, observed, windows is not None
        else:
            self.ragged = self._compressed(keys, values, valid, observed)
        self.is_initialized = True
        return out

    def _step(self, q: Tensor, keys: Tensor, values: Tensor, ragged: Store, rule: Rule) -> Tensor:
        new = q[:, :, 0], keys[:, :, 0], values[:, :, 0], ragged, rule, self.backend
        if self.clock is None:
            return api.step(*new)[:, :, None]
        return api.recorded_step(*new, seen=self.clock)[:, :, None]  # those of one layer lie a model apart

    def _heard(self, tokens: int) -> Tensor | None:
        """What attention was given of this call's first `tokens`, `[B, tokens, hidden]`; drafts come after them."""
        hidden, self.hidden = self.hidden, None
        return None if hidden is None else hidden[:, :tokens].detach()

    def _windows(
        self, keys: Tensor, valid: Tensor | None, sliding_window: int | None, waits: bool
    ) -> dict[str, Tensor] | None:
        """What heads see while this prompt is read, if the method says that they stream."""
        batch_size, num_kv_heads, n, _ = keys.shape
        lengths: list[int | None] = [None if waits else n] * batch_size
        if valid is not None and not waits and hasattr(self.method, "prefill_windows"):
            lengths = valid.sum(1).tolist()  # waits for the device
        return prefill_windows(
            self.method,
            lengths,
            layer_idx=self.layer_idx,
            num_layers=self.num_layers,
            num_kv_heads=num_kv_heads,
            sliding_window=sliding_window,
        )

    # -- what stays of a prompt -------------------------------------------------------------------------------------

    @property
    def reads_prompt(self) -> bool:
        """Whether what comes next is a prompt, or more of one."""
        return self.ragged is None or self._observed is not None

    @property
    def observed(self) -> Observation | None:
        """The last queries of a prefill that waits for `finalize_prefill`; None when none does."""
        return self._observed

    def finalize_prefill(self, chosen: Sequence[Keep] | None = None) -> None:
        """End a prefill that waits: choose what stays of everything stored so far. Does nothing when that is done.

        Where heads stream, that is chosen already; what windowed rows hide then goes.
        """
        if self.ragged is None or self._observed is None:
            return
        if self._streams:
            whole = self.whole()
            if bool((whole.length == 0).any()):
                raise all_padding(int((whole.length == 0).nonzero()[0]) // whole.num_kv_heads)
            whole.trim(self.options.headroom)
            self.ragged = self._stored(whole)
        else:
            self.ragged = self.compressed(chosen)
        self._observed = None

    def compressed(
        self,
        chosen: Sequence[Keep] | None = None,
        *,
        rollback: int | None = None,
        dense: tuple[Tensor, Tensor, Tensor | None] | None = None,
    ) -> Store:
        """What will be stored of a prompt that waits; the layer stays as it is.

        Args:
            chosen: what to keep, for each sequence; default: the method is asked for this layer.
            rollback: in place of the layer's own.
            dense: what `to_dense` of the layer's store gives, if that was asked before.
        """
        assert self._observed is not None
        dense = self.whole().to_dense() if dense is None else dense
        return self._compressed(*dense, self._observed, chosen, rollback)

    def _compressed(
        self,
        keys: Tensor,
        values: Tensor,
        valid: Tensor | None,
        observed: Observation,
        chosen: Sequence[Keep] | None = None,
        rollback: int | None = None,
    ) -> Store:
        """Of a whole prompt's keys and values `[B, H, n, D]` what the method chooses."""
        options = self.options
        rollback = options.rollback if rollback is None else rollback
        if chosen is None:
            where: dict[str, Any] = {"layer_idx": self.layer_idx, "num_layers": self.num_layers}
            where["parts"] = self.parts
            method: Any = self.method
            stored = keep_entries(method, observed, keys, values, valid, rollback=rollback, **where)
        else:
            window, texts = observed.rule.sliding_window, texts_of(valid, keys.shape[0])
            stored = storage_of(chosen, texts, keys, valid, sliding_window=window, rollback=rollback)
        how: dict[str, Any] = {"rollback": rollback, "headroom": options.headroom}
        return self._stored(RaggedLayer.from_dense(keys, values, valid=valid, **how, **stored))

    def _stored(self, ragged: RaggedLayer) -> Store:
        """The entries in the storage that the layer's heads have."""
        return stored_in(ragged, self.options.storage_of(self.layer_idx), self.options.residual_length)

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
        self.asked = True
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks speak of the text, not of the store: (tokens seen and new, offset 0)."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length  # the older name

    def reset(self) -> None:
        """Forget everything."""
        self.ragged = self._observed = self.hidden = None
        self.growth, self.is_initialized = Growth(), False
        if self.state is not None:
            self.state = fresh(self.state)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; older transformers give the length to keep, a positive number."""
        self.cropping(tokens_to_remove)()

    def cropping(self, tokens_to_remove: int) -> Callable[[], None]:
        """`crop`, checked but still to be done, so that all layers do it or none.

        Raises:
            ValueError: it can not be done; the layer is unchanged then.
        """
        if self.ragged is None:
            return _nothing
        tokens_to_remove = int(tokens_to_remove)  # assisted generation of some releases gives a tensor
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.ragged.seen - tokens_to_remove)
        if remove and not self.is_croppable:
            raise ValueError(
                f"cannot crop {remove} token(s): some layers of this model hold a state of the whole text, which can "
                "not forget its last tokens; take a cache.snapshot() before them and cache.restore() it"
            )
        if remove and self._observed is not None:
            raise ValueError("cannot crop during a chunked prefill; call finalize_prefill() first")
        cropped = self.ragged.cropping(remove)

        def crop() -> None:
            cropped()
            self.growth = self.growth.crop(remove)

        return crop

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Batch entry `i` becomes a copy of batch entry `beam_idx[i]`."""
        if self.state is not None:
            self.state.reorder_cache(cast("LongTensor", beam_idx))
        if self.ragged is not None:
            self.ragged.reorder(beam_idx)
            self.growth = self.growth.reorder(beam_idx)
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
        if self.state is not None:
            self.state.offload()
        if self.ragged is not None:
            self.ragged_device = self.ragged.device
            self.ragged.to("cpu")

    def prefetch(self) -> None:
        """Move an offloaded layer back."""
        if self.state is not None:
            self.state.prefetch()
        if self.ragged is not None and hasattr(self, "ragged_device"):
            self.ragged.to(self.ragged_device)

    def __deepcopy__(self, memo: dict[int, Any]) -> RaggedCacheLayer:
        """A copy to go on with by itself; the method is shared."""
        where = (self.method, self.layer_idx, self.num_layers, self.options, self.parts)
        state = None if self.state is None else copied(self.state)
        copy = RaggedCacheLayer(*where, state=state, is_croppable=self.is_croppable)
        if self.ragged is not None:
            copy.restore(from_snapshot(self.ragged.snapshot()))
        # Replaced, never changed:
        copy._observed, copy._streams, copy.growth = self._observed, self._streams, self.growth
        return copy

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: nothing of the model."""
        return {**vars(self), "parts": Parts(), "hidden": None}

    @property
    def dtype(self) -> torch.dtype | None:
        """Of keys and values; None before the first token."""
        return self.stored_dtype

    @property
    def device(self) -> torch.device | None:
        """Where they lie; None before the first token."""
        return None if self.ragged is None else self.ragged.device

    # -- for the reader -----------------------------------------------------------------------------------------------

    def restore(self, ragged: Store) -> None:
        """Hold `ragged`, a prompt that was compressed before."""
        self.ragged, self._observed, self.is_initialized, self.growth = ragged, None, True, Growth()

    def whole(self) -> RaggedLayer:
        """The layer's store while a prompt waits to be compressed, and nothing is quantised."""
        assert isinstance(self.ragged, RaggedLayer)
        return self.ragged

    def filled(self) -> Store:
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


def _nothing() -> None:
    """To an empty layer."""
