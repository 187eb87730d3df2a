"""`headkv.compress`: a model whose `generate` uses a ragged cache, for as long as a `with` block lasts."""

from __future__ import annotations

import threading
import warnings
import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from transformers import Cache, DynamicCache

from headkv import _checks
from headkv._config import layer_kinds
from headkv.attention.api import Backend
from headkv.cache.ragged import MIN_HEADROOM, Storage
from headkv.heads import HeadStorage
from headkv.integrations.cache import RaggedCache
from headkv.integrations.calls import Arguments, Hooks, is_of_generate, left_out
from headkv.integrations.compiled import decoder_layers
from headkv.integrations.decoding import DecodeBudget
from headkv.integrations.graph import check_device, replaying
from headkv.integrations.hook import NAME, attends, register
from headkv.integrations.layer import RaggedCacheLayer
from headkv.integrations.planning import ROLLBACK
from headkv.integrations.probe import check_attention
from headkv.integrations.support import (
    CacheOptions,
    attentions_to_hear,
    check_method,
    check_storage,
    decoder_of,
    has_states,
    supported_config,
    supported_model,
)
from headkv.integrations.text import tokens_in
from headkv.methods import FullCache
from headkv.models.attention import choose_attention, kept_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headkv.methods.base import Method, PromptMethod


# What a block changes and puts back belongs to the model, so that blocks on two threads are entered one by one.
_TURN = threading.RLock()


def compress(
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
    cuda_graph: bool = False,
    compile_layers: bool = False,
) -> Session:
    """Let `model` compress its KV cache by `method` inside a `with` block; outside it is as it was.

    Args:
        model: a decoder of transformers, as it is, wrapped by peft, accelerate or torch.compile, or shared out over
            ranks by a `tp_plan`: then every rank does the same calls, and budgets are those of all heads.
        method: what each head keeps of a prompt, e.g. `headkv.AdaKV(budget=0.2)`.
        backend: of attention after the prefill: "auto", "reference", "rust" or "triton"; see `headkv.ragged_decode`.
        headroom: free slots behind each row after the prefill; it grows by itself when they are used up.
        rollback: how many tokens windowed rows can take back (`crop`); they store as many entries more than they attend
            to. Assisted generation gets what it needs by itself.
        chunked_prefill: a prompt comes in several forward calls of your own: wait with compression until the first call
            with a single token, or until `session.cache.finalize_prefill()`. `generate(prefill_chunk_size=…)` is seen
            by itself.
        decode_budget: entries a KV head, on average, that are left of prompt and answer together while the answer, or
            later turns, go on: rows that outgrow their part of it are planned again by the last queries, head by head
            (`DecodeBudget`). None: what follows the prompt is kept. Not together with `cuda_graph`.
        every: tokens from one such plan to the next; 128 if a `decode_budget` is given.
        storage: of what stays of a prompt and of what follows it: "model", in the model's dtype; "int8", in 8 bits
            with a scale a vector, half the bytes of 16 bits; "int4", in 4, about a quarter; "k8v4", keys in 8 bits and
            values in 4; see `RaggedLayer.quantise`. Or a `HeadStorage`, one of these for each KV head. Prompts are
            read, and methods choose, in the model's dtype.
        residual_length: of each row this many newest entries are also kept in the model's dtype. Most of the error of
            4 bits is that of a question's own entries; where a question fits into 32, they take three quarters of it
            away. A longer one gains less, and drafts of assisted generation, which are read several at once, may then
            change tokens. Every row takes the bytes of as many entries, however few it stores.
        cuda_graph: replay each decode step of `generate` (greedy or sampling) as one CUDA graph, see `DecodeGraph`: the
            same tokens, without the time that the host takes to launch over a thousand kernels. Recording costs a few
            steps.
        compile_layers: with `cuda_graph`, let torch.compile fuse what the layers do in a decode step: faster, but the
            first decode step takes a while (once a process), and tokens may differ by rounding.

    Returns:
        A context manager; its `cache` is the `RaggedCache` of the latest `generate` (or forward) call. A `DynamicCache`
        of your own, passed as `past_key_values`, becomes that cache's other name: pass either to the next call of a
        conversation.

    Raises:
        TypeError, ValueError: a model, a method or an option that is not supported, by name; `compile_layers` without
            `cuda_graph`; see `DecodeGraph` and `RaggedCache.for_model`. The model is unchanged.

    >>> with headkv.compress(model, headkv.AdaKV(budget=0.2)) as session:  # doctest: +SKIP
    ...     out = model.generate(**inputs, max_new_tokens=64)
    >>> session.cache.lengths()  # doctest: +SKIP
    """
    decode = DecodeBudget.of(decode_budget, every)
    if decode is not None and cuda_graph:
        raise ValueError(f"decode_budget must be None with cuda_graph=True, got {decode_budget!r}")
    options = CacheOptions(backend, headroom, rollback, chunked_prefill, decode, storage, residual_length)
    return Session(model, method, options, Decoding(cuda_graph, compile_layers))


@dataclass(frozen=True)
class Decoding:
    """How a block's decode steps run: see `compress`."""

    cuda_graph: bool = False
    compile_layers: bool = False

    def __post_init__(self) -> None:
        _checks.flag("cuda_graph", self.cuda_graph)
        _checks.flag("compile_layers", self.compile_layers)
        if self.compile_layers and not self.cuda_graph:
            raise ValueError("compile_layers must be False without cuda_graph=True, got True")

    def check(self, model: PreTrainedModel) -> None:
        """A model that can be run so."""
        if self.cuda_graph:
            if has_states(model):
                raise ValueError(
                    f"cuda_graph must be False with {type(model).__name__}, whose layers hold states of the text"
                )
            check_device(model)
        if self.compile_layers:
            decoder_layers(model)


class Session:
    """The `with` block of `compress`: sets the attention by name and supplies a cache to calls that bring none."""

    def __init__(
        self, model: Any, method: Method | PromptMethod, options: CacheOptions, decoding: Decoding
    ) -> None:
        self.model, self.method = supported_model(model), method
        self._options, self._decoding = options, decoding
        check_attention(self.model)
        check_method(method, self.model, options.chunked_prefill)
        check_storage(options.storage, self.model)
        decoding.check(self.model)
        self._decoder = decoder_of(self.model)
        self._num_layers = len(layer_kinds(supported_config(self.model)))
        self._cache: RaggedCache | None = None
        # Caches of the user's own, and what stands for each from the first call on.
        self._others: weakref.WeakKeyDictionary[Any, RaggedCache] = weakref.WeakKeyDictionary()
        self._own_turn = threading.Lock()  # several threads may generate in one block
        self._hooks: Hooks | None = None
        self._former = ExitStack()  # puts back the attention that the model had
        self._own_generate: Any = None
        self._warned = False  # in this block, that a call's logits are the full model's

    @property
    def cache(self) -> RaggedCache:
        """The cache of the latest call.

        Raises:
            RuntimeError: before the first call.
        """
        if self._cache is None:
            raise RuntimeError("no cache yet: call model.generate(...) inside the with block first")
        return self._cache

    def __enter__(self) -> Session:
        with _TURN:
            hooks = [getattr(hook, "__self__", None) for hook in self.model._forward_pre_hooks.values()]
            if any(isinstance(hook, Hooks) and isinstance(hook.owner, Session) for hook in hooks):
                raise RuntimeError(
                    "model is inside another headkv.compress block already, of this thread or another; leave that one "
                    "first, or give each thread a model of its own"
                )
            self._decoding.check(self.model)
            with ExitStack() as former:
                former.enter_context(kept_attention(self.model))
                register()
                choose_attention(self.model, NAME)
                self._former = former.pop_all()
            self._warned = False
            heard = attentions_to_hear(self.model, self.method)
            self._hooks = Hooks(self.model, self._supply, self._known, owner=self, heard=heard)
            # As transformers itself gives a model with a decode loop of its own that loop.
            if self._decoding.cuda_graph:
                own: Any = vars(self.model)
                self._own_generate = own.get("generate")
                own["generate"] = replaying(cast(Any, self.model).generate, self._decoding.compile_layers)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._hooks is not None
        with _TURN:
            self._hooks.remove()
            if self._decoding.cuda_graph:
                own: Any = vars(self.model)
                del own["generate"]
                if self._own_generate is not None:
                    own["generate"] = self._own_generate
            self._former.close()

    def _supply(self, arguments: Arguments) -> RaggedCache | None:
        """Give a call a ragged cache where it has none, or an empty one of another kind.

        Returns:
            It, if nobody else tells it of the call.
        """
        if arguments.get("output_attentions") or self.model.config.output_attentions:
            raise ValueError(
                "output_attentions=True is not supported: a ragged cache never forms the attention matrix"
            )
        given: Any = arguments.get("past_key_values")
        self._warn(arguments, given)
        if given is None and arguments.get("use_cache") is False:
            if is_of_generate(arguments):
                raise ValueError(
                    "use_cache must not be False inside headkv.compress, as nothing is compressed without a cache; "
                    "is it in model.generation_config?"
                )
            return None
        if getattr(self._decoder, "gradient_checkpointing", False) and self.model.training:
            raise ValueError(
                "gradient checkpointing leaves the cache out in training mode; call model.eval() first"
            )
        if attends(given) and not any(isinstance(layer, RaggedCacheLayer) for layer in given.layers):
            return None  # a method reads the prompt again
        if (left := left_out(self.model, arguments)) is not None:
            left.reset()
            given = left
        ragged = given if isinstance(given, RaggedCache) else self._ragged(given)
        arguments["past_key_values"] = ragged
        if len(ragged.layers) == self._num_layers:
            self._cache = ragged
        return None if ragged.listens else ragged

    def _warn(self, arguments: Arguments, given: Any) -> None:
        """Once a block: a call whose logits look like a score, though its text is read before it is compressed."""
        if (
            self._warned
            or (given is not None and given.get_seq_length())
            or isinstance(self.method, FullCache)
        ):
            return
        whole = tokens_in(arguments) > 1 and not arguments.get("logits_to_keep")
        unsaid = given is None and not (arguments.get("use_cache") or self._options.chunked_prefill)
        if arguments.get("labels") is not None or (whole and unsaid):
            self._warned = True
            warnings.warn(
                "a forward call over a whole text answers as the full model does: compression shows in what is read "
                "after it, over its cache. headkv.score(model, method, context, continuation) is the likelihood under "
                "compression; to read a prompt without this warning, call with use_cache=True or logits_to_keep=1",
                stacklevel=2,
            )

    def _known(self) -> list[RaggedCache]:
        """The caches that calls of this block may be over."""
        with self._own_turn:
            return list(self._others.values()) + ([] if self._cache is None else [self._cache])

    def _ragged(self, given: Any) -> RaggedCache:
        """What stands for a cache of the user's own from now on."""
        if given is None:
            return self._empty()
        known = self._others.get(given) if isinstance(given, Cache) else None
        if known is not None and known.layers is given.layers:
            return known
        if attends(given):
            ragged = RaggedCache.around(self.model, given.layers)
        else:
            check_replaceable(given)
            ragged = self._empty()
            # Its layers are a cache: with ours in their place it counts tokens, is cropped, reordered and copied right.
            given.layers = ragged.layers
        with self._own_turn:
            self._others[given] = ragged
        return ragged

    def _empty(self) -> RaggedCache:
        # With assistant_early_exit the model drafts by its first layers alone, for which the method was not made.
        drafting = len(layer_kinds(supported_config(self.model))) != self._num_layers
        if drafting and has_states(self.model):
            raise ValueError(
                "assistant_early_exit must be None with a hybrid, whose states can not forget drafts"
            )
        return RaggedCache.unattached(self.model, FullCache() if drafting else self.method, self._options)


def check_replaceable(given: Any) -> None:
    """A cache of the user's own whose place a ragged cache can take.

    Raises:
        TypeError, ValueError: it is filled, or does what a ragged cache does not.
    """
    kind = type(given).__name__
    if not isinstance(given, Cache):
        raise TypeError(f"past_key_values must be a DynamicCache, a RaggedCache or None, got {kind}")
    if given.get_seq_length() > 0:
        raise ValueError(f"past_key_values must be empty or a RaggedCache, got a filled {kind}")
    if given.is_compileable:
        raise ValueError(f"past_key_values must not be a static cache, got {kind}")
    if not isinstance(given, DynamicCache) or type(given).update is not DynamicCache.update:
        raise ValueError(f"past_key_values must be a DynamicCache, a RaggedCache or None, got {kind}")
    if getattr(given, "offloading", False):
        raise ValueError(
            f"past_key_values must stay on the devices of its layers, got a {kind} with offloading; leave out "
            "cache_implementation='offloaded'"
        )
