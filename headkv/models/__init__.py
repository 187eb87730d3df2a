"""Models at hand: SmolLM2-135M-Instruct, offline after its first load, and tiny random decoders.

And what is done with any loaded model: its attention is chosen by name (`attention`), it decodes (`decoding`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headkv.models.order import reorder_heads as reorder_heads
    from headkv.models.smollm2 import load_smollm2 as load_smollm2
    from headkv.models.tiny import FAMILIES as FAMILIES
    from headkv.models.tiny import tiny_model as tiny_model

__all__ = ["FAMILIES", "load_smollm2", "reorder_heads", "tiny_model"]


def __getattr__(name: str) -> Any:
    # Loaded when used, so that `python -m headkv.models.smollm2` finds its module not yet imported.
    if name not in __all__:
        raise AttributeError(f"module 'headkv.models' has no attribute {name!r}")
    from headkv.models import order, smollm2, tiny

    return getattr({"load_smollm2": smollm2, "reorder_heads": order}.get(name, tiny), name)


def __dir__() -> list[str]:
    return __all__
