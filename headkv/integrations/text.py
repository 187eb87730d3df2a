"""The text of forward calls, and what is remembered of it while a prompt is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn import Module

Arguments = dict[str, Any]  # of a forward call, by name


def text_in(arguments: Arguments) -> Tensor | None:
    """The tokens of a call, `[B, T]`, or their embeddings, `[B, T, hidden]`."""
    ids = arguments.get("input_ids")
    return ids if ids is not None else arguments.get("inputs_embeds")


def tokens_in(arguments: Arguments) -> int:
    """T."""
    text = text_in(arguments)
    return 0 if text is None else int(text.shape[1])


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
    """The text that goes into one cache, for a method that reads it again."""

    def __init__(self) -> None:
        self._decoder: Module | None = None
        self._ids: list[Tensor | None] = []
        self._next: Tensor | None = None

    def forget(self) -> None:
        """What was read is no longer needed, or another prompt comes."""
        self._decoder, self._ids, self._next = None, [], None

    def copy(self) -> TextMemory:
        """What another cache goes on with."""
        twin = TextMemory()
        twin._decoder, twin._ids, twin._next = self._decoder, list(self._ids), self._next
        return twin

    def add(self, decoder: Module, arguments: Arguments, seen: int) -> None:
        """Remember the text that `decoder` reads in one call over a cache that has seen `seen` tokens."""
        if (given := text_in(arguments)) is None:
            return
        if seen == 0:
            self.forget()
        self._decoder = decoder
        self._ids.append(arguments.get("input_ids"))
        positions: Tensor | None = arguments.get("position_ids")
        if positions is not None:
            self._next = positions[..., -1].reshape(-1).expand(given.shape[0]) + 1
        else:
            self._next = torch.full((given.shape[0],), seen + given.shape[1], device=given.device)

    def decoder_and_text(self) -> tuple[Module, Text]:
        """All that was read since `forget`, and by what.

        Raises:
            RuntimeError: nothing was, as the decoder was called in a way that no hook sees.
        """
        if self._next is None or self._decoder is None:
            raise RuntimeError(
                "the prompt was read where no hook sees it: call the model itself, not its layers or its forward, "
                "inside the headkv.compress block that made the cache, or with RaggedCache.for_model"
            )
        ids = [part for part in self._ids if part is not None]
        whole = torch.cat(ids, 1) if len(ids) == len(self._ids) else None
        return self._decoder, Text(whole, self._next)
