"""The ragged cache as a transformers cache, which any decoder takes as its `past_key_values`."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from headkv._config import attention_layers, layer_kinds
from headkv._figure import grid_figure
from headkv._grid import grid_html
from headkv.attention.api import Backend
from headkv.cache import LayerSnapshot, MixedSnapshot, files
from headkv.cache.mixed import Store, from_snapshot
from headkv.cache.ragged import MIN_HEADROOM, Storage
from headkv.heads import HeadStorage
from headkv.heads.ranks import RankLoads
from headkv.integrations.calls import Hooks, Told, left_out
from headkv.integrations.decoding import DecodeBudget, bound
from headkv.integrations.hook import NAME, register
from headkv.integrations.layer import RaggedCacheLayer
from headkv.integrations.looks import no_attribute, no_pairs
from headkv.integrations.planning import ROLLBACK, Observation
from headkv.integrations.probe import check_attention
from headkv.integrations.prompt import CachedPrompt, WaitingLayer
from headkv.integrations.ranks import own_part, shared
from headkv.integrations.saved import NoMethod, check_identity, check_one_process, devices_of, identity
from headkv.integrations.states import (
    State,
    StatefulCache,
    copied,
    filled,
    fresh,
    of_layer,
    state_bytes,
    state_of,
    tensors,
)
from headkv.integrations.support import (
    CacheOptions,
    attentions_to_hear,
    check_method,
    check_storage,
    is_whole_prompt,
    own_layers,
    parts_of,
    ranks_of,
    supported_config,
    supported_model,
)
from headkv.integrations.text import TextMemory
from headkv.models.attention import choose_attention, decoder_attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

    from headkv.methods.base import Method, PromptMethod


# Of the layers that attend, then of states.
Snapshot = tuple["LayerSnapshot | MixedSnapshot | State", ...]


class RaggedCache(StatefulCache):
    """A transformers cache that stores, for every KV head, only the entries that a method keeps.

    Make it with `for_model` and pass it as `past_key_values`; `headkv.compress` does that for you.

    In hybrid models some layers have no attention: those keep transformers' own layers, whole, and methods, profiles,
    `lengths()` and pictures count the layers that attend, from 0.

    A forward call that fails, e.g. for want of memory, leaves its tokens in the layers that it came through. Take them
    out before the call is repeated: `cache.crop(n)`, with n the tokens seen before it; `cache.reset()` if it was the
    prompt. A hybrid's can only be reset, or restored from a snapshot.
    """

    layers: list[Any]

    def __init__(self, layers: list[Any]):
        super().__init__(layers=layers)
        self.told = self._untold()
        self._model: PreTrainedModel | None = (
            None  # whose hooks tell of calls, for as long as the cache lives
        )
        self._made_for: weakref.ref[PreTrainedModel] | None = None  # what a file says that it is of

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        method: Method | PromptMethod,
        *,
        backend: Backend = "auto",
        headroom: int = MIN_HEADROOM,
        rollback: int = ROLLBACK,
        chunked_prefill: bool = False,
        decode_budget: int | None = None,
        every: int | None = None,
        storage: Storage | HeadStorage = "model",
        residual_length: int = 0,
    ) -> RaggedCache:
        """An empty cache for one generation (or conversation) of `model`; sets the model's attention to "headkv".

        That attention is transformers' own sdpa for every other cache, so it may stay; `headkv.compress` puts the
        former one back on exit.

        Args:
            model: a decoder of transformers, wrapped or not, whose attention goes through its attention interface.
            method: what each head keeps of a prompt, e.g. `headkv.AdaKV(budget=0.2)`.
            backend: of attention after the prefill; see `headkv.ragged_decode`.
            headroom: free slots behind each row after the prefill; it grows by itself when they are used up.
            rollback: how many tokens windowed rows can take back (`crop`); they store as many entries more than they
                attend to. Assisted generation gets what it needs by itself.
            chunked_prefill: the prompt comes in several forward calls of your own: wait with compression until the
                first call with a single token, or until `finalize_prefill()`. (`generate(prefill_chunk_size=…)` is seen
                by itself.) Heads that stream while the prompt is read (`streaming_prefill=True` of a method) do not
                wait: they never hold more than a chunk and their window.
            decode_budget, every: bound what a long generation, and later turns, store; see `headkv.compress`.
            storage, residual_length: as there. A cache that is loaded goes on with those that were saved.

        Raises:
            TypeError, ValueError: on a model or option that is not supported; the model is unchanged then.
        """
        decode = DecodeBudget.of(decode_budget, every)
        options = CacheOptions(backend, headroom, rollback, chunked_prefill, decode, storage, residual_length)
        model = supported_model(model)
        check_attention(model)
        check_method(method, model, chunked_prefill)
        check_storage(options.storage, model)
        cache = cls.unattached(model, method, options)
        cache._attach(model)
        return cache

    def _attach(self, model: PreTrainedModel) -> None:
        self._listen(model)
        register()
        if decoder_attention(model) != NAME:
            choose_attention(model, NAME)

    @classmethod
    def unattached(
        cls, model: PreTrainedModel, method: Method | PromptMethod, options: CacheOptions
    ) -> RaggedCache:
        """An empty cache for `model`, which stays as it is: whoever made the cache tells it of calls (`Listener`)."""
        layers, attend = own_layers(model), attention_layers(supported_config(model))
        options = replace(options, ranks=ranks_of(model))
        method = shared(method, options.ranks)
        more: dict[str, Any] = {"is_croppable": not any(map(state_of, layers))}
        for number, (i, part) in enumerate(zip(attend, map(own_part, parts_of(model)), strict=True)):
            state = None if (own := state_of(layers[i])) is None else fresh(own)
            layers[i] = RaggedCacheLayer(method, number, len(attend), options, part, state=state, **more)
        cache = cls(layers)
        cache._made_for = weakref.ref(model)
        return cache

    @classmethod
    def around(cls, model: PreTrainedModel, layers: list[Any]) -> RaggedCache:
        """The cache of which these are the layers, e.g. those of a copy; see `unattached`.

        Raises:
            ValueError: they wait for the rest of a prompt, or are another model's.
        """
        if len(layers) != (n := len(layer_kinds(supported_config(model)))):
            raise ValueError(f"past_key_values must have the model's {n} layers, got {len(layers)}")
        cache = cls(layers)
        if cache.waiting:
            raise ValueError("past_key_values must not be a copy that was made while a prompt was read")
        cache._made_for = weakref.ref(model)
        return cache

    def _listen(self, model: PreTrainedModel) -> None:
        """Let hooks on `model` tell of calls over this cache, until it is gone."""
        this = weakref.ref(self)
        heard = attentions_to_hear(model, self.attending[0].method)
        find = lambda arguments: _same(this(), arguments)  # noqa: E731
        hooks = Hooks(model, find, lambda: _one(this()), heard=heard)
        weakref.finalize(self, hooks.remove)
        self._model = model

    def _untold(self) -> Told:
        return Told(TextMemory() if is_whole_prompt(self.attending[0].method) else None)

    @property
    def attending(self) -> list[RaggedCacheLayer]:
        """The layers that attend, which are all of them but in hybrids."""
        return [layer for layer in self.layers if isinstance(layer, RaggedCacheLayer)]

    @property
    def listens(self) -> bool:
        """Whether hooks on a model tell this cache of calls; otherwise whoever made it does."""
        return self._model is not None

    def __deepcopy__(self, memo: dict[int, Any]) -> RaggedCache:
        """A copy to go on with by itself; the method and the model are shared."""
        twin = RaggedCache([copy.deepcopy(x, memo) if state_of(x) is not x else x for x in self.layers])
        twin.hold({i: copied(state) for i, state in self.states.items()})
        twin.told, twin._made_for = self.told.copy(), self._made_for
        if self._model is not None:
            twin._listen(self._model)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """What is written to a file: no model, nor text that waits to be read again."""
        return {**vars(self), "_model": None, "_made_for": None, "told": self._untold()}

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Hand the new tokens of one layer to the attention function; see `RaggedCacheLayer.update`.

        Raises:
            RuntimeError: an earlier call got through some of the layers only; the message says what to do.
        """
        attending = self.attending
        if self.layers[layer_idx] is attending[0]:
            self.check_even()
            decode = attending[0].options.decode
            if decode is not None and self.seen and not self.waiting:
                bound(attending, decode, attending[0].options.ranks)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def check_even(self) -> None:
        """All layers have seen the same tokens.

        Raises:
            RuntimeError: they have not, as a forward call failed on its way; the message says what to do.
        """
        seen = {layer.seen for layer in self.attending}
        if len(seen) == 1:
            return
        least = min(seen)
        prompt = least == 0 or self.waiting
        cure = "cache.reset()" if prompt else f"cache.crop({least})"
        if self.states:
            cure = "cache.reset(), or cache.restore() of a snapshot"
        raise RuntimeError(
            f"an earlier forward call failed on its way: layers have seen {least} to {max(seen)} tokens; "
            f"call {cure}, then repeat that call"
        )

    def check_whole(self) -> None:
        """No earlier call failed on its way, be it before the first layer that attends: states do not say how far.

        Raises:
            RuntimeError: one did; the message says what to do.
        """
        self.check_even()
        if self.told.under_way and (
            self.seen or any(any(x.has_previous_state.values()) for x in self.states.values())
        ):
            raise RuntimeError(
                "an earlier forward call failed on its way, and layers of this model hold states that can not be taken "
                "back: call cache.reset(), or cache.restore() of a snapshot, then repeat that call"
            )

    @property
    def seen(self) -> int:
        """Tokens of the text so far, also those no longer stored."""
        return self.attending[0].seen

    @property
    def nbytes(self) -> int:
        """Bytes that all layers hold from the allocator, with head room and bookkeeping, and states."""
        rows = sum(layer.ragged.nbytes for layer in self.attending if layer.ragged is not None)
        return rows + sum(state_bytes(state) for state in self.states.values())

    def lengths(self) -> Tensor:
        """Stored entries, `[layers, B, H]` int64; of hybrids the layers that attend, of ranks the own heads."""
        return torch.stack([layer.filled().lengths().cpu() for layer in self.attending])

    def rank_loads(self) -> RankLoads:
        """Entries that each rank stores, over the batch, where ranks share the model's heads: to be called on all.

        Raises:
            ValueError: this process has all heads.
            RuntimeError: nothing is stored yet.
        """
        ranks = self.attending[0].options.ranks
        if ranks is None:
            raise ValueError("the heads of this cache's model are all on this process: there are no ranks")
        entries = torch.stack(
            [layer.filled().lengths().to(layer.filled().device) for layer in self.attending]
        )
        return RankLoads.of(ranks.gather(entries, 2).sum(1), ranks.size)

    def finalize_prefill(self) -> None:
        """End a prefill in chunks now; see `for_model`. All or nothing where the method decides for all layers at once.

        Raises:
            ValueError: a method that answers for another number of layers.
        """
        if self.told.memory is None or not self.waiting:
            for layer in self.attending:
                layer.finalize_prefill()
            return
        method, chosen = cast("PromptMethod", self.attending[0].method), []
        for prompt in self.prompts():
            keeps = list(method.plan_prompt(prompt))
            if len(keeps) != len(self.attending):
                got = f"{len(self.attending)} layers, got {len(keeps)}"
                raise ValueError(f"plan_prompt of {type(method).__name__} must answer for {got}")
            chosen.append(keeps)
        # All of them first: where memory runs out the whole prompt is still there.
        by_layer = zip(self.attending, zip(*chosen, strict=True), strict=True)
        stored = [layer.compressed(keeps) for layer, keeps in by_layer]
        for layer, ragged in zip(self.attending, stored, strict=True):
            layer.restore(ragged)
        self.told.memory.forget()

    def prompts(self) -> list[CachedPrompt]:
        """The prompt that waits for a method which sees it whole: one for each sequence of the batch."""
        if (memory := self.told.memory) is None or not self.waiting:
            raise RuntimeError("no prompt waits: the method decides layer by layer, or has decided already")
        waiting = [WaitingLayer(x.whole(), _observed(x), x.backend, x.parts) for x in self.attending]
        decoder, text = memory.decoder_and_text()
        batch = range(waiting[0].ragged.batch_size)
        return [CachedPrompt(decoder, waiting, text, b, tuple(self.layers)) for b in batch]

    @property
    def waiting(self) -> bool:
        """Whether a prompt is stored that is not compressed yet."""
        return any(layer.observed is not None for layer in self.attending)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, or all but a positive number of them: in all layers or none.

        Raises:
            ValueError: some head would need entries that are gone, a prompt waits, or layers hold states that can not
                forget (hybrids); the cache is unchanged then.
        """
        for change in [layer.cropping(tokens_to_remove) for layer in self.attending]:
            change()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.hold({i: fresh(state) for i, state in self.states.items()})  # for a batch of any size
        self.told.under_way = False
        if self.told.memory is not None:
            self.told.memory.forget()

    def snapshot(self) -> Snapshot:
        """A copy of the whole cache: one compressed context answers many questions.

        Returns:
            For `restore`: the layers that attend, then states, if a hybrid's layers hold some.

        Raises:
            RuntimeError: nothing is stored yet, a prompt waits to be compressed, or a call over states failed.
        """
        if self.waiting:
            raise RuntimeError(
                "cannot take a snapshot during a chunked prefill; call finalize_prefill() first"
            )
        if self.states:
            self.check_whole()
        rows = [layer.filled().snapshot() for layer in self.attending]
        return (*rows, *map(copied, self.states.values()))

    def restore(self, snapshot: Snapshot) -> None:
        """Become what the cache was when `snapshot` was taken."""
        attending, states = self.attending, self.states
        if len(snapshot) != (n := len(attending) + len(states)):
            kinds = f"{n} layers" if not states else f"{len(attending)} layers and {len(states)} states"
            raise ValueError(f"snapshot must hold {kinds}, got {len(snapshot)}")
        for layer, taken in zip(attending, snapshot[: len(attending)], strict=True):
            layer.restore(from_snapshot(cast("LayerSnapshot | MixedSnapshot", taken)))
        taken_states = cast("tuple[State, ...]", snapshot[len(attending) :])
        self.hold({i: copied(taken) for i, taken in zip(states, taken_states, strict=True)})
        self.told.under_way = False

    def save(self, path: str | os.PathLike[str]) -> None:
        """A file of the compressed context, from which `load` makes it again: safetensors, written whole or not at all.

        It holds what every head stores and what the model is, but neither the text nor the method.

        Raises:
            RuntimeError: nothing is stored yet, a prompt waits to be compressed, a call failed on its way, or the
                cache's model is gone.
            ValueError: the model's heads lie on several ranks.
        """
        check_one_process(self.attending[0].options, "saved")
        self.check_even()
        if self.waiting:
            raise RuntimeError("cannot save during a chunked prefill; call finalize_prefill() first")
        layers = [layer.filled() for layer in self.attending]
        if self.states:
            self.check_whole()
        model = None if self._made_for is None else self._made_for()
        if model is None:
            raise RuntimeError(
                "cannot save a cache whose model is gone, or that was pickled: nothing says what it is"
            )
        states = {f"{i}.{name}": x for i, state in self.states.items() for name, x in tensors(state).items()}
        files.write(path, layers, {"model": identity(model)}, states)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: PreTrainedModel,
        method: Method | PromptMethod | None = None,
        *,
        backend: Backend = "auto",
    ) -> RaggedCache:
        """The cache that `save` wrote, to be passed as `past_key_values`; sets the model's attention to "headkv".

        What is generated from it equals, bit for bit, what the cache that was saved would give.

        Args:
            path: the file.
            model: the one that the context was read by, or its equal: same shape, rotary embeddings, weights and dtype.
            method: what each head keeps of another prompt, after `reset()`. Without one such a prompt is refused.
            backend: of attention, as in `for_model`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is truncated, damaged, of something else, of a newer headkv or of another model; the message
                names the file and says which.
            TypeError: as in `for_model`. The model is unchanged after any error.
        """
        options = CacheOptions(backend)
        model = supported_model(model)
        chosen = NoMethod() if method is None else method
        check_method(chosen, model, False)
        cache = cls.unattached(model, chosen, options)
        check_one_process(cache.attending[0].options, "loaded")
        devices, attend = devices_of(model), attention_layers(supported_config(model))
        layers, beside = files.read(
            path, lambda about: check_identity(about, model), [devices[i] for i in attend]
        )
        stored = _storage(layers)  # another prompt is stored so, too
        for layer, ragged in zip(cache.attending, layers, strict=True):
            layer.options = replace(layer.options, storage=stored, residual_length=ragged.residual_length)
            layer.restore(ragged)
        cache.hold({i: filled(like, of_layer(beside, i, devices[i])) for i, like in cache.states.items()})
        cache._attach(model)
        return cache

    @property
    def max_batch_size(self) -> int:
        """Sequences in the batch; -1 before the first prompt."""
        return self.batch_size

    def __getitem__(self, layer: Any) -> Any:
        """Not possible; see `RaggedCacheLayer.row`.

        Raises:
            TypeError: saying what to look at.
        """
        no_pairs()

    def __iter__(self) -> Iterator[Any]:
        """Not possible; see `__getitem__`."""
        no_pairs()

    def __getattr__(self, name: str) -> Any:
        no_attribute(self, name)

    def __repr__(self) -> str:
        layers = f"{len(self.layers)} layers"
        if (attend := len(self.attending)) < len(self.layers):
            layers += f", {attend} of them with attention"
        return f"RaggedCache({layers}, {self.seen} tokens seen, {self.nbytes / 1e6:.1f} MB stored)"

    def _repr_html_(self) -> str:
        if self.seen == 0:
            return f"<p>{self}</p>"
        return grid_html(self._stored(), f"{self}{self._whose()}", unit="entries", heads="KV head", low=0)

    def plot(self) -> Figure:
        """A matplotlib figure of the entries that each KV head stores: layers downward, heads across.

        Raises:
            RuntimeError: before the first prompt.
            ImportError: there is no matplotlib; the message says how to install it.
        """
        title = f"{self.seen:,} tokens seen{self._whose()}"
        return grid_figure(self._stored(), title, unit="entries stored", heads="KV head", low=0)

    def _stored(self) -> Tensor:
        """Entries of each head, `[layers, H]`: of the one sequence, or the mean of several."""
        lengths = self.lengths()
        return lengths[:, 0] if lengths.shape[1] == 1 else lengths.double().mean(1)

    def _whose(self) -> str:
        sequences = self.attending[0].filled().batch_size
        return "" if sequences == 1 else f"; mean of {sequences} sequences"


def _storage(layers: Sequence[Store]) -> Storage | HeadStorage:
    """Of all heads of all layers: one, where they have the same."""
    names = [part.storage for layer in layers for part in layer.parts]
    if len(set(names)) == 1:
        return names[0]
    return HeadStorage(
        [x if isinstance(x := layer.storage, tuple) else (x,) * layer.num_kv_heads for layer in layers]
    )


def _observed(layer: RaggedCacheLayer) -> Observation:
    assert layer.observed is not None
    return layer.observed


def _one(cache: RaggedCache | None) -> list[RaggedCache]:
    return [] if cache is None else [cache]


def _same(cache: RaggedCache | None, arguments: dict[str, Any]) -> RaggedCache | None:
    """The cache, if it is the one of this call, or the one left out of it."""
    if cache is None or cache._model is None:
        return None
    if (left := left_out(cache._model, arguments)) is not None and left is cache:
        left.reset()
        arguments["past_key_values"] = cache
    return cache if cache is arguments.get("past_key_values") else None
