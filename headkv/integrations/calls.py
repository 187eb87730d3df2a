"""What a forward call says of the text that it brings, and hooks that tell a cache.

`generate` hands a cache nothing but tokens. How it makes its calls says more, the same way in all releases served: a
prompt in chunks comes with positions that are cut out of the whole prompt's, and drafts come with the request for
the logits of each of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from headkv.integrations.hook import attends
from headkv.integrations.support import decoder_of

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel

Arguments = dict[str, Any]


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


def named(module: Module, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    """All arguments of a forward call by their names, in a dict of its own."""
    if not args:
        return dict(kwargs)
    _, *names = inspect.signature(type(module).forward).parameters  # the module's own may be a wrapper
    return {**dict(zip(names, args, strict=False)), **kwargs}


def text_in(arguments: Arguments) -> Tensor | None:
    """The tokens of a call, `[B, T]`, or their embeddings, `[B, T, hidden]`."""
    ids = arguments.get("input_ids")
    return ids if ids is not None else arguments.get("inputs_embeds")


def tokens_in(arguments: Arguments) -> int:
    """T."""
    text = text_in(arguments)
    return 0 if text is None else int(text.shape[1])


def is_of_generate(arguments: Arguments) -> bool:
    """Whether a decode loop of transformers made this call, other than the assisted one."""
    return arguments.get("return_dict") is True and "position_ids" in arguments


def read_call(arguments: Arguments, seen: int) -> Call:
    """What a call of `generate` says; nothing is known of other calls.

    Args:
        arguments: of the model's forward.
        seen: tokens that its cache has seen.
    """
    tokens, positions = tokens_in(arguments), arguments.get("position_ids")
    if arguments.get("use_cache") is not True or "position_ids" not in arguments:
        return PLAIN
    if "return_dict" not in arguments:  # no decode loop but the assisted one leaves that out
        wanted = arguments.get("logits_to_keep")
        return Call(drafts=wanted - 1) if isinstance(wanted, int) and 1 < wanted <= tokens else PLAIN
    if not is_of_generate(arguments) or not isinstance(positions, Tensor) or positions.ndim < 2 or positions.shape[-1] != tokens:
        return PLAIN
    total = positions.stride(-2)  # columns of what the positions were cut from, itself unless it is longer
    return Call(remaining=max(0, total - seen - tokens)) if total > tokens else PLAIN


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
    if not call.drafts or seen == 0 or tokens - call.drafts <= seen:
        return arguments
    if not isinstance(positions, Tensor) or bool(positions[..., 0].any()):
        return arguments
    for name in ("input_ids", "position_ids", "token_type_ids"):
        if isinstance(value := arguments.get(name), Tensor) and value.shape[-1] == tokens:
            new[name] = value[..., seen:]
    return new


@dataclass(frozen=True, eq=False)
class Text:
    """What the model was given as a prompt, `[B, n]` each.

    Attributes:
        input_ids: int64, or None where it was given embeddings.
        next_positions: `[B]` int64, the position (as rotary embeddings count) of the token that comes next.
    """

    input_ids: Tensor | None
    next_positions: Tensor


class TextMemory:
    """The text that goes into one cache, for a method that reads it again.

    Args:
        decoder: what reads it.
    """

    def __init__(self, decoder: Module) -> None:
        self.decoder = decoder
        self._ids: list[Tensor | None] = []
        self._next: Tensor | None = None

    def forget(self) -> None:
        """What was read is no longer needed, or another prompt comes."""
        self._ids, self._next = [], None

    def copy(self) -> TextMemory:
        """What another cache goes on with."""
        twin = TextMemory(self.decoder)
        twin._ids, twin._next = list(self._ids), self._next
        return twin

    def add(self, arguments: Arguments, seen: int) -> None:
        """Remember the text of one call over a cache that has seen `seen` tokens."""
        if (given := text_in(arguments)) is None:
            return
        if seen == 0:
            self.forget()
        self._ids.append(arguments.get("input_ids"))
        positions: Tensor | None = arguments.get("position_ids")
        if positions is not None:
            self._next = positions[..., -1].reshape(-1).expand(given.shape[0]) + 1
        else:
            self._next = torch.full((given.shape[0],), seen + given.shape[1], device=given.device)

    def text(self) -> Text:
        """All that was read since `forget`.

        Raises:
            RuntimeError: nothing was, as the decoder was called in a way that no hook sees.
        """
        if self._next is None:
            raise RuntimeError(
                "the prompt was read where no hook sees it: call the model itself, not its layers or its forward, "
                "inside the headkv.compress block that made the cache, or with RaggedCache.for_model"
            )
        ids = [part for part in self._ids if part is not None]
        return Text(torch.cat(ids, 1) if len(ids) == len(self._ids) else None, self._next)


class Listener(Protocol):
    """A cache that is told of forward calls over it."""

    def before_model(self, arguments: Arguments) -> Arguments:
        """A call of the whole model begins; answers the arguments to go on with."""

    def before_decoder(self, arguments: Arguments) -> None:
        """The decoder begins; what `before_model` was told belongs to this call."""

    def after_decoder(self) -> None:
        """All layers have seen the call's tokens."""


class Hooks:
    """Forward hooks on a model and its decoder that tell a cache of the calls over it.

    Some wrappers call the model's `forward` past its hooks; the decoder's are run all the same.

    Args:
        model: a decoder of transformers.
        find: from a call's arguments, which it may change, to the cache to be told; None: no such call.
        owner: who wants to see all calls over a cache; the decoder's `forward`, called past its hooks, is refused then.
    """

    def __init__(
        self, model: PreTrainedModel, find: Callable[[Arguments], Listener | None], owner: Any = None
    ) -> None:
        decoder = decoder_of(model)
        self.find, self.owner = find, owner
        self.handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, with_kwargs=True),
        ]
        layers = (layer for layer in decoder.modules() if isinstance(layer, GradientCheckpointingLayer))
        if owner is not None and (first := next(layers, None)) is not None:
            self.handles.append(first.register_forward_pre_hook(self._before_layers, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Hooks:
        """A model that is copied with its hooks has none of ours at work."""
        copy = object.__new__(Hooks)
        copy.find, copy.owner, copy.handles = _find_none, None, []
        return copy

    # Hooks of a cache that is collected while torch goes through a module's hooks are still called, without kwargs.

    @torch.compiler.disable
    def _before_model(self, module: Module, args: tuple[Any, ...], kwargs: Arguments | None = None) -> Any:
        if kwargs is None:
            return None
        arguments = named(module, args, kwargs)
        if (cache := self.find(arguments)) is not None:
            arguments = cache.before_model(arguments)
        return (), arguments

    @torch.compiler.disable
    def _before_decoder(self, module: Module, args: tuple[Any, ...], kwargs: Arguments | None = None) -> Any:
        if kwargs is None:
            return None
        arguments = named(module, args, kwargs)
        if (cache := self.find(arguments)) is not None:
            cache.before_decoder(arguments)
        return (), arguments

    @torch.compiler.disable
    def _after_decoder(self, module: Module, args: Any, kwargs: Any, output: Any = None) -> None:
        if output is not None and (cache := self.find(kwargs)) is not None:
            cache.after_decoder()

    @torch.compiler.disable
    def _before_layers(self, module: Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        cache = kwargs.get("past_key_values")
        if self.owner is not None and isinstance(cache, Cache) and not attends(cache):
            raise RuntimeError(
                "the decoder's forward was called directly, which no hook sees, so that nothing would be compressed: "
                "call the model itself"
            )


def _find_none(arguments: Arguments) -> None:
    """Of a copied model: no cache is told."""
