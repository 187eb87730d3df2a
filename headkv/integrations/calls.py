"""What a forward call says of the text that it brings, and hooks that tell a cache.

`generate` hands a cache nothing but tokens. How it makes its calls says more, the same way in all releases served: a
prompt in chunks comes with positions that are cut out of the whole prompt's, and drafts come with the request for
the logits of each of them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from headkv.integrations.carry import check_carries
from headkv.integrations.hook import attends
from headkv.integrations.support import decoder_of
from headkv.integrations.text import Arguments, TextMemory, tokens_in

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Call:
    """What is known of one forward call.

    Attributes:
        drafts: tokens at its end that are not verified yet (prompt lookup, a draft model).
        remaining: tokens of the prompt that later calls bring; None where nothing says that it comes in several.
    """

    drafts: int = 0
    remaining: int | None = None


PLAIN = Call()


CACHE = "past_key_values"  # as headkv calls it


@functools.cache
def _parameters(kind: Any) -> tuple[str, ...]:
    _, *names = inspect.signature(kind.forward).parameters  # the module's own may be a wrapper
    return tuple(names)


def cache_name(module: Module) -> str:
    """What a module calls the cache; since transformers 5.24 it is "cache"."""
    names = _parameters(cast(Any, type(module)))
    return "cache" if "cache" in names and CACHE not in names else CACHE


def named(module: Module, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    """All arguments of a forward call by their names, the cache by the one of ours, in a dict of its own."""
    arguments = {**dict(zip(_parameters(cast(Any, type(module))), args, strict=False)), **kwargs}
    if (name := cache_name(module)) != CACHE and name in arguments:
        arguments[CACHE] = arguments.pop(name)
    return arguments


def as_named_by(module: Module, arguments: Arguments) -> Arguments:
    """The same, the cache by the module's own name."""
    if (name := cache_name(module)) != CACHE and CACHE in arguments:
        arguments[name] = arguments.pop(CACHE)
    return arguments


def is_of_generate(arguments: Arguments) -> bool:
    """Whether a decode loop of transformers made this call, other than the assisted one."""
    return arguments.get("return_dict") is True and "position_ids" in arguments


def is_assisted(arguments: Arguments) -> bool:
    """Whether the assisted decode loop made this call, with drafts or without: no other leaves `return_dict` out."""
    named = "position_ids" in arguments and "return_dict" not in arguments
    return named and arguments.get("use_cache") is True and isinstance(arguments.get("logits_to_keep"), int)


def read_call(arguments: Arguments, seen: int) -> Call:
    """What a call of `generate` says; nothing is known of other calls.

    Args:
        arguments: of the model's forward.
        seen: tokens that its cache has seen.
    """
    tokens, positions = tokens_in(arguments), arguments.get("position_ids")
    if arguments.get("use_cache") is not True or "position_ids" not in arguments:
        return PLAIN
    if is_assisted(arguments):
        wanted = arguments["logits_to_keep"]
        return Call(drafts=wanted - 1) if 1 < wanted <= tokens else PLAIN
    if not is_of_generate(arguments) or not isinstance(positions, Tensor) or positions.ndim < 2:
        return PLAIN
    total = positions.stride(-2)  # columns of what the positions were cut from, itself unless it is longer
    return Call(remaining=max(0, total - seen - tokens)) if total > tokens == positions.shape[-1] else PLAIN


def check_chunk(arguments: Arguments, seen: int) -> None:
    """A chunk begins where the text ends.

    Raises:
        ValueError: it does not: older transformers send all of a conversation again.
    """
    positions = arguments["position_ids"]
    total = positions.stride(-2)
    is_view = positions.untyped_storage().nbytes() > positions.numel() * positions.element_size()
    if is_view and positions.storage_offset() % total < seen:
        raise ValueError(
            f"prefill_chunk_size must be None once the cache holds a text ({seen} tokens): this release of "
            "transformers would send that text again"
        )


def only_new(arguments: Arguments, call: Call, seen: int) -> Arguments:
    """The arguments without tokens that the cache has seen: assisted decoding sends a conversation from its start."""
    tokens, positions, new = tokens_in(arguments), arguments.get("position_ids"), dict(arguments)
    if not is_assisted(arguments) or seen == 0 or tokens - call.drafts <= seen:
        return arguments
    if not isinstance(positions, Tensor) or bool(positions[..., 0].any()):
        return arguments
    for name in ("input_ids", "position_ids", "token_type_ids"):
        if isinstance(value := arguments.get(name), Tensor) and value.shape[-1] == tokens:
            new[name] = value[..., seen:]
    return new


def left_out(model: Module, arguments: Arguments) -> Listener | None:
    """The cache that `generate` left out of a call, to read the text from its start.

    Models do so whose rotary embeddings change where a text outgrows their first length (Phi 3's longrope): what is
    stored is of no use then. They ask the cache for its length, and then call without it.
    """
    keep = arguments.get("logits_to_keep")
    of_generate = arguments.get("use_cache") is True and "position_ids" in arguments
    if (
        not of_generate
        or arguments.get("past_key_values") is not None
        or not isinstance(keep, int)
        or not keep
    ):
        return None
    every = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    caches = (cache for hooks in every if isinstance(hooks, Hooks) for cache in hooks.caches())
    return next((cache for cache in caches if cache.attending[0].asked), None)


class Listener(Protocol):
    """A cache that is told of forward calls over it."""

    told: Told
    layers: list[Any]

    @property
    def attending(self) -> list[Any]:
        """Those of its layers that store keys and values."""

    @property
    def states(self) -> dict[int, Any]:
        """What layers hold beside, or in place of, keys and values."""

    def check_whole(self) -> None:
        """No earlier call failed on its way."""

    @property
    def seen(self) -> int:
        """Tokens of the text so far."""

    @property
    def waiting(self) -> bool:
        """Whether a prompt is stored that is not compressed yet."""

    def finalize_prefill(self) -> None:
        """Compress the prompt that waits."""

    def reset(self) -> None:
        """Forget everything."""


class Told:
    """What a cache was told of calls over it.

    Args:
        memory: of the text, where the method decides once the whole prompt is read.
    """

    def __init__(self, memory: TextMemory | None = None) -> None:
        self.memory = memory
        self._call = self._announced = PLAIN
        self.under_way = False  # a call, or it failed
        self._carries = False  # states, over several tokens at once, as far as was asked

    def copy(self) -> Told:
        """What another cache goes on with."""
        return Told(None if self.memory is None else self.memory.copy())

    def before_model(self, cache: Listener, arguments: Arguments) -> Arguments:
        """A call of the whole model begins.

        Returns:
            The arguments to go on with.

        Raises:
            ValueError: it asks for what can not be done over this cache, which is unchanged then.
        """
        if arguments.get("use_cache") is False:
            raise ValueError("use_cache must not be False with a RaggedCache as past_key_values")
        call = read_call(arguments, cache.seen)
        if call.remaining is not None:
            check_chunk(arguments, cache.seen)
        if call.drafts and cache.states:
            raise ValueError(
                "drafts can not be served with this model, some of whose layers hold a state of the whole text, which "
                "can not forget those that are wrong; leave out prompt_lookup_num_tokens and assistant_model"
            )
        if call.drafts and cache.attending[0].options.decode is not None:
            raise ValueError(
                "decode_budget must be None with drafts, whose text would depend on how many are right; leave out "
                "prompt_lookup_num_tokens and assistant_model"
            )
        if call.drafts and self.memory is not None and _reads_prompt(cache):
            name = type(cache.attending[0].method).__name__
            raise ValueError(
                f"{name} decides once the whole prompt is read: drafts must not come with the prompt; leave out "
                "prompt_lookup_num_tokens and assistant_model"
            )
        self._announced = call
        return only_new(arguments, call, cache.seen)

    def before_decoder(self, cache: Listener, decoder: Module, arguments: Arguments) -> None:
        """The decoder begins, with the call announced, or one that went past the model's hooks."""
        if cache.states:
            cache.check_whole()
            if cache.seen and tokens_in(arguments) > 1 and not self._carries:
                check_carries(decoder, cache.layers)
                self._carries = True
        self.under_way = True
        call, self._announced = self._announced, PLAIN
        if call != self._call:
            self._call = call
            for layer in cache.attending:
                layer.call = call
        if self.memory is None or not _reads_prompt(cache):
            return
        if cache.waiting and call.remaining is None and tokens_in(arguments) == 1:
            cache.finalize_prefill()
        else:
            self.memory.add(decoder, arguments, cache.seen)

    def after_decoder(self, cache: Listener) -> None:
        """All layers have seen the call's tokens: a prompt may have ended."""
        self.under_way = False
        whole = self.memory is not None and not cache.attending[0].options.chunked_prefill
        if self._call.remaining == 0 or (whole and not self._call.remaining):
            cache.finalize_prefill()


def _reads_prompt(cache: Listener) -> bool:
    return cache.waiting or cache.seen == 0


class Hooks:
    """Forward hooks on a model and its decoder that tell a cache of the calls over it.

    Some wrappers call the model's `forward` past its hooks; the decoder's are run all the same.

    Args:
        model: a decoder of transformers.
        find: from a call's arguments, which it may change, to the cache to be told; None: no such call.
        caches: all that calls may be over.
        owner: who wants to see all calls over a cache; the decoder's `forward`, called past its hooks, is refused then.
        heard: attention modules whose input is handed to the cache's layers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        find: Callable[[Arguments], Listener | None],
        caches: Callable[[], Sequence[Listener]],
        owner: Any = None,
        heard: Sequence[Module] = (),
    ) -> None:
        decoder = decoder_of(model)
        self.find, self.caches, self.owner = find, caches, owner
        self.handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, with_kwargs=True),
        ]
        layers = (layer for layer in decoder.modules() if isinstance(layer, GradientCheckpointingLayer))
        if owner is not None and (first := next(layers, None)) is not None:
            self.handles.append(first.register_forward_pre_hook(self._before_layers, with_kwargs=True))
        self.handles += [
            part.register_forward_pre_hook(self._before_attention, with_kwargs=True) for part in heard
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Hooks:
        """A model that is copied with its hooks has none of ours at work."""
        copy = object.__new__(Hooks)
        copy.find, copy.caches, copy.owner, copy.handles = _find_none, tuple, None, []
        return copy

    # Hooks of a cache that is collected while torch goes through a module's hooks are still called, without kwargs.

    @torch.compiler.disable
    def _before_model(self, module: Module, args: tuple[Any, ...], kwargs: Arguments | None = None) -> Any:
        if kwargs is None:
            return None
        arguments = named(module, args, kwargs)
        if (cache := self.find(arguments)) is not None:
            arguments = cache.told.before_model(cache, arguments)
        for cache in self.caches():
            cache.attending[0].asked = False
        return (), as_named_by(module, arguments)

    @torch.compiler.disable
    def _before_decoder(self, module: Module, args: tuple[Any, ...], kwargs: Arguments | None = None) -> Any:
        if kwargs is None:
            return None
        arguments = named(module, args, kwargs)
        if (cache := self.find(arguments)) is not None:
            cache.told.before_decoder(cache, module, arguments)
        return (), as_named_by(module, arguments)

    @torch.compiler.disable
    def _after_decoder(self, module: Module, args: Any, kwargs: Any, output: Any = None) -> None:
        if output is not None and (cache := self.find(named(module, (), kwargs))) is not None:
            cache.told.after_decoder(cache)

    @torch.compiler.disable
    def _before_layers(self, module: Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        cache = named(module, args, kwargs).get(CACHE)
        if self.owner is not None and isinstance(cache, Cache) and not attends(cache):
            raise RuntimeError(
                "the decoder's forward was called directly, which no hook sees, so that nothing would be compressed: "
                "call the model itself"
            )

    @torch.compiler.disable
    def _before_attention(
        self, module: Module, args: tuple[Any, ...], kwargs: Arguments | None = None
    ) -> None:
        if kwargs is None:
            return
        arguments: Any = named(module, args, kwargs)
        cache = arguments.get("past_key_values")
        if (
            attends(cache)
            and hasattr(layer := cache.layers[module.layer_idx], "hidden")
            and layer.reads_prompt
        ):
            layer.hidden = arguments.get("hidden_states")


@contextmanager
def unheard(model: PreTrainedModel) -> Iterator[None]:
    """Inside, calls of `model` over any cache are nobody's business of ours: no hook hears them."""
    owners = {id(owner): owner for owner in map(_owner, model._forward_pre_hooks.values())}
    hooks = [owner for owner in owners.values() if isinstance(owner, Hooks)]
    former = [(one.find, one.owner) for one in hooks]
    try:
        for one in hooks:
            one.find, one.owner = _find_none, None
        yield
    finally:
        for one, (find, owner) in zip(hooks, former, strict=True):
            one.find, one.owner = find, owner


def _owner(hook: Any) -> Any:
    return getattr(hook, "__self__", None)


def _find_none(arguments: Arguments) -> None:
    """Of a copied model: no cache is told."""
