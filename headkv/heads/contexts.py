"""Cached contexts: a text is read once, and then asked about under many configurations of heads.

The full model reads the text and its keys and values stay. Only question and answer pass the model after that, so what
an answer costs does not grow with the number of heads that are tried: a batch holds many configurations. In each, a KV
head sees all of the text (its gate is 1), only the first entries and the last ones (0), or a mix of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headkv import _checks
from headkv._config import attention_layers, kv_heads, layer_kinds
from headkv.data import Needle
from headkv.heads.gated import gated_attention
from headkv.heads.observe import exchanged_attention
from headkv.logits import Rule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CPU_ROOM = 1 << 30  # bytes of a batch where the memory that is free can not be asked for


@dataclass(frozen=True)
class Stream:
    """What a streaming head keeps of a text of n tokens: the first `sinks`, the last `recent_share * n`, 16 at least.

    Question and answer come after the text, and every head sees them.
    """

    sinks: int = 16
    recent_share: float = 0.06

    def __post_init__(self) -> None:
        _checks.whole("sinks", self.sinks)
        _checks.between("recent_share", self.recent_share, 0, 1)

    def far(self, n: int) -> slice:
        """The entries that a streaming head does not keep.

        >>> Stream(sinks=16, recent_share=0.06).far(1000)
        slice(16, 940, None)
        """
        return slice(min(self.sinks, n), max(min(self.sinks, n), n - max(16, round(self.recent_share * n))))


@dataclass(frozen=True, eq=False)
class Context:
    """A text that the full model has read.

    Attributes:
        length: n, in tokens.
        keys: of each layer [H, n, D], after RoPE; a sliding layer holds only what its window can still see.
        values: likewise.
        sliding: of each layer, whether it has a sliding window; its heads have nothing to open or shut.
    """

    length: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    sliding: tuple[bool, ...]

    def heads(self) -> list[tuple[int, int]]:
        """The heads that a configuration can open or shut, as (layer, KV head)."""
        return [
            (layer, head)
            for layer, (keys, is_sliding) in enumerate(zip(self.keys, self.sliding, strict=True))
            for head in range(0 if is_sliding else keys.shape[0])
        ]


@dataclass(frozen=True, eq=False)
class Answers:
    """How the right answers did, one row for each question and configuration.

    Attributes:
        logprobs: [R, a] float32, of each token of the answer; 0 behind a shorter one.
        first: [R, a] bool, whether that token is the model's first choice; True behind a shorter one.
    """

    logprobs: Tensor
    first: Tensor

    @property
    def total(self) -> Tensor:
        """The whole answer's log-probability, [R]."""
        return self.logprobs.sum(-1)

    @property
    def right(self) -> Tensor:
        """Whether greedy decoding would write the answer, [R] bool."""
        return self.first.all(-1)


@torch.no_grad()
def read(model: PreTrainedModel, context_ids: Tensor) -> Context:
    """Let the full model read a text, [1, n] int64, and keep its keys and values on the model's device.

    Raises:
        ValueError: all layers of the model have a sliding window: there is no head to open or shut; or it is a hybrid,
            whose states no context holds.
    """
    config = model.config.get_text_config()
    if len(attention_layers(config)) != config.num_hidden_layers or "hybrid" in str(layer_kinds(config)):
        raise ValueError(
            f"model must attend in all layers and hold no states, got the hybrid {type(model).__name__}"
        )
    layers = model.base_model(context_ids.to(model.device), use_cache=True).past_key_values.layers
    if all(layer.is_sliding for layer in layers):
        raise ValueError(f"model must have a layer without a sliding window, got {len(layers)} with one")
    return Context(
        length=context_ids.shape[1],
        keys=tuple(layer.keys[0] for layer in layers),
        values=tuple(layer.values[0] for layer in layers),
        sliding=tuple(bool(layer.is_sliding) for layer in layers),
    )


@contextmanager
def asking(model: PreTrainedModel, stream: Stream) -> Iterator[Asker]:
    """In this context `model` answers from cached contexts; its weights and attention are back on exit.

    Raises:
        ValueError: the model's attention can not be exchanged by name.
    """
    asker = Asker(model, stream)
    with exchanged_attention(model, asker.attend):
        yield asker


class Asker:
    """Asks a model about contexts that it has read; made by `asking`."""

    def __init__(self, model: PreTrainedModel, stream: Stream) -> None:
        self.model, self.stream = model, stream
        config = model.config.get_text_config()
        self.shape = (int(config.num_hidden_layers), kv_heads(config))
        self._heads, self._vocabulary = int(config.num_attention_heads), int(config.vocab_size)
        self._context: Context | None = None
        self._gates: Tensor | None = None
        self._open: list[list[int]] = []

    def ask(self, context: Context, needles: Sequence[Needle], gates: Tensor) -> Answers:
        """Ask R questions about one context, each under gates of its own, in one forward pass.

        Args:
            context: from `read`.
            needles: R questions with their answers.
            gates: [R, layers, H] in [0, 1]; gradients reach them. Layers with a sliding window have none to
                open: they see what their window holds.
        """
        device = self.model.device
        texts = [torch.cat([needle.question_ids, needle.answer_ids], dim=1)[0, :-1] for needle in needles]
        # What follows an answer is not seen.
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device)
        lengths = torch.tensor([needle.answer_ids.shape[1] for needle in needles])
        begins = torch.tensor([needle.question_ids.shape[1] - 1 for needle in needles])
        answers = nn.utils.rnn.pad_sequence([needle.answer_ids[0] for needle in needles], batch_first=True)
        keep = ids.shape[1] - int(begins.min())
        positions = torch.arange(context.length, context.length + ids.shape[1], device=device)
        self._context, self._gates = context, gates.to(device)
        # A head that no row opens needs no far entries, unless its gate is still to learn.
        shut = torch.zeros(self.shape, dtype=torch.bool) if gates.requires_grad else (gates == 0).all(0)
        self._open = [[h for h, is_shut in enumerate(row) if not is_shut] for row in shut.tolist()]
        try:
            logits = self.model(
                ids, position_ids=positions.expand(len(ids), -1), use_cache=False, logits_to_keep=keep
            ).logits
        finally:
            self._context = self._gates = None
        at = begins[:, None] - int(begins.min()) + torch.arange(answers.shape[1])  # [R, a]
        beyond = (torch.arange(answers.shape[1]) >= lengths[:, None]).to(device)
        at, answers = at.clamp_max(keep - 1).to(device), answers.to(device)
        logits = logits[torch.arange(len(ids), device=device)[:, None], at]  # [R, a, vocabulary]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        found = logits.gather(-1, answers[..., None])[..., 0] - logits.logsumexp(-1)
        return Answers(found.masked_fill(beyond, 0.0), (logits.argmax(-1) == answers) | beyond)

    @torch.inference_mode()
    def try_all(self, context: Context, needles: Sequence[Needle], gates: Tensor) -> Answers:
        """Ask all questions under all configurations, as many at a time as memory allows.

        Args:
            context: from `read`.
            needles: Q questions.
            gates: [C, layers, H].

        Returns:
            Answers of Q * C rows, the configurations of the first question first, on the CPU.
        """
        pairs = [(q, c) for q in range(len(needles)) for c in range(len(gates))]
        step = max(1, self.room() // max(self.row_bytes(context, needle) for needle in needles))
        found = [
            self.ask(context, [needles[q] for q, _ in part], gates[[c for _, c in part]])
            for part in (pairs[at : at + step] for at in range(0, len(pairs), step))
        ]
        longest = max(needle.answer_ids.shape[1] for needle in needles)
        logprobs, first = (
            torch.cat([nn.functional.pad(x, (0, longest - x.shape[1]), value=fill).cpu() for x in parts])
            for parts, fill in (([a.logprobs for a in found], 0.0), ([a.first for a in found], True))
        )
        return Answers(logprobs, first)

    def room(self) -> int:
        """Bytes that a batch may take: half of what a GPU has free, 1 GiB elsewhere."""
        if self.model.device.type != "cuda":
            return _CPU_ROOM
        free, _ = torch.cuda.mem_get_info(self.model.device)
        reserved = torch.cuda.memory_reserved(self.model.device)
        return (free + reserved - torch.cuda.memory_allocated(self.model.device)) // 2

    def row_bytes(self, context: Context, needle: Needle) -> int:
        """About what one row of a batch takes at its widest: logits of one layer and of the vocabulary, float32."""
        answer = needle.answer_ids.shape[1]
        new = needle.question_ids.shape[1] + answer
        return 4 * (3 * self._heads * new * (context.length + 2 * new) + 3 * (answer + 1) * self._vocabulary)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Attend as transformers asks: query [R, HQ, T, D], key and value [R, H, T, D] -> [R, T, HQ, D]."""
        assert self._context is not None and self._gates is not None, "only `ask` runs the model in here"
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        keys, values = self._context.keys[layer], self._context.values[layer]  # [H, n, D]
        output = gated_attention(
            query.unflatten(1, (keys.shape[0], -1)),
            key,
            value,
            keys,
            values,
            far=slice(0, 0) if sliding_window is not None else self.stream.far(keys.shape[1]),
            gates=self._gates[:, layer],
            opened=self._open[layer],
            rule=Rule.of(query.shape[-1], scaling, sliding_window, softcap, s_aux),
        )
        return output.flatten(1, 2).transpose(1, 2).contiguous(), None
