"""Watch a model's attention: its queries and keys after RoPE, layer by layer, with nothing patched."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from headkv._config import attention_layers
from headkv.logits import Rule
from headkv.models.attention import chosen_attention, decoder_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Attention:
    """What one layer attends with in one forward pass.

    Attributes:
        layer_idx: which layer.
        queries: [B, HQ, T, D], after RoPE; the last T positions of the text.
        keys: [B, H, n, D], after RoPE; all positions so far.
        scale: factor of the logits.
        sliding_window: a query sees this many last positions, itself included; None: all.
        softcap: cap of the logits, c * tanh(logit / c); None: none.
        sink_logits: [HQ], of each query head one more logit that has no value; None: none.
    """

    layer_idx: int
    queries: Tensor
    keys: Tensor
    scale: float
    sliding_window: int | None
    softcap: float | None
    sink_logits: Tensor | None = None

    @property
    def rule(self) -> Rule:
        """How queries meet keys."""
        return Rule(self.scale, self.sliding_window, self.softcap, self.sink_logits)

    def logits(self, head: int, rows: slice) -> Tensor:
        """The masked logits of the query heads of one KV head, first sequence: [G, R, n], float32.

        Args:
            head: the KV head.
            rows: which of the T queries.
        """
        group = self.queries.shape[1] // self.keys.shape[1]
        queries = self.queries[0, head * group : (head + 1) * group, rows].float()  # [G, R, D]
        logits = self.rule.logits(queries, self.keys[0, head].float())  # [G, R, n]
        total, new = self.keys.shape[2], self.queries.shape[2]
        at = torch.arange(total, device=logits.device)
        return logits.masked_fill(self.rule.hides(at[total - new :][rows, None], at), -torch.inf)

    def weights(self, head: int, rows: slice) -> Tensor:
        """The weights that follow from `logits`: [G, R, n], float32."""
        return self.rule.of_heads([head], self.keys.shape[1]).softmax(self.logits(head, rows))


class Watcher(Protocol):
    """What `observe` calls for every layer of every forward pass."""

    def __call__(self, attention: Attention) -> None: ...


@contextmanager
def observe(model: PreTrainedModel, watcher: Watcher) -> Iterator[None]:
    """A context in which `watcher` is called with every layer's attention, while the model runs as ever.

    The attention is computed by the implementation that the model had, which is back on exit, also after an
    error.

    Raises:
        ValueError: the model's attention can not be exchanged by name.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = decoder_attention(model)

    def attend(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        scale, window, softcap = (kwargs.get(word) for word in ("scaling", "sliding_window", "softcap"))
        watcher(
            Attention(
                layer_idx=int(module.layer_idx),  # type: ignore[arg-type]
                queries=query,
                keys=key,
                scale=query.shape[-1] ** -0.5 if scale is None else scale,
                sliding_window=window,
                softcap=softcap,
                sink_logits=kwargs.get("s_aux"),
            )
        )
        eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        return ALL_ATTENTION_FUNCTIONS.get_interface(before, eager)(module, query, key, value, mask, **kwargs)

    with exchanged_attention(model, attend):
        yield


@contextmanager
def exchanged_attention(model: PreTrainedModel, attend: Callable[..., Any]) -> Iterator[None]:
    """A context in which `model` calls `attend`, an attention function of transformers.

    It gets the masks that the model's own attention would get.

    Raises:
        ValueError: the model's attention can not be exchanged by name; when called: it does not know its layer.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = decoder_attention(model)
    names = (f"headkv-observe-{number}-{before}" for number in itertools.count())
    name = next(name for name in names if name not in ALL_ATTENTION_FUNCTIONS)
    layers = attention_layers(model.config.get_text_config())

    def known(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module.layer_idx not in layers:
            raise ValueError(
                f"model must have attention of its own in every layer, got a shared {type(module).__name__}"
            )
        return attend(module, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = known
    if before in ALL_MASK_ATTENTION_FUNCTIONS:
        # Masks are found among the registered functions alone. The name stays: it is a synonym, used again.
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    try:
        with chosen_attention(model, name):
            if decoder_attention(model) != name:
                raise ValueError(
                    f"model must let its attention be chosen by name, got {type(model).__name__}"
                )
            yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
