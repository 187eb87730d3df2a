"""Which attention a loaded model runs, by name: chosen for a while, and put back as it was.

The parts of a model may have different ones. The decoder's is chosen, with that of what it is part of; a vision tower
keeps its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_attention(model: PreTrainedModel) -> str:
    """The name of the attention that the decoder of `model` runs."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def choose_attention(model: PreTrainedModel, name: str) -> None:
    """The decoder of `model` runs the attention `name` from now on."""
    config = model.config
    spec = _spec(config, config.get_text_config(decoder=True), name)
    model.set_attn_implementation(name if spec is None else spec)


@contextmanager
def kept_attention(model: Any) -> Iterator[None]:
    """Whatever is chosen inside, every part of `model` has its own attention back on exit."""
    former = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        yield
    finally:
        for config, name in former:
            config._attn_implementation = {"": name}  # of this part alone, as parts of it have theirs


@contextmanager
def chosen_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Inside, the decoder of `model` runs the attention `name`; then every part has its own back."""
    with kept_attention(model):
        choose_attention(model, name)
        yield


def _spec(config: Any, decoder: Any, name: str) -> dict[str, Any] | None:
    """What transformers is told so that `decoder` and what holds it change; None where `config` does not hold it."""
    parts = {key: part for key in config.sub_configs if (part := getattr(config, key, None)) is not None}
    found = {key: _spec(part, decoder, name) for key, part in parts.items()}
    inner = {key: name if spec == {"": name} else spec for key, spec in found.items() if spec is not None}
    return {"": name, **inner} if inner or config is decoder else None


def _configs(model: Any) -> list[Any]:
    """The configurations of all parts of a model, each once."""
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if hasattr(config, "_attn_implementation") and id(config) not in found:
            found[id(config)] = config
            for key in config.sub_configs:
                add(getattr(config, key, None))

    for module in model.modules() if hasattr(model, "modules") else ():
        add(getattr(module, "config", None))
    return list(found.values())
