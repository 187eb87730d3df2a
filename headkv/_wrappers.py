"""The transformers model that runs inside what other libraries wrap around it."""

from __future__ import annotations

from typing import Any

from torch import nn

# Where wrappers hold what they wrap: torch.compile, (Distributed)DataParallel and DeepSpeed, FSDP, a PeftMixedModel.
_HELD_AS = ("_orig_mod", "module", "_fsdp_wrapped_module", "base_model")


def unwrapped(model: Any) -> Any:
    """The transformers model inside wrappers of peft, accelerate, torch.compile and torch's parallel ones.

    Anything else, a transformers model among it, is answered as it came.

    Raises:
        ValueError: `DataParallel` over several devices, which runs copies of the model.
    """
    while (inner := _held(model)) is not None:
        model = inner
    return model


def _held(model: Any) -> Any:
    """What one wrapper holds; None where `model` is none."""
    if not isinstance(model, nn.Module) or hasattr(type(model), "set_attn_implementation"):
        return None
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise ValueError(
            f"model must not be a DataParallel over {len(model.device_ids)} devices, which copies it for each "
            "call; spread it by device_map instead"
        )
    if callable(base := getattr(type(model), "get_base_model", None)):  # a PeftModel
        return base(model)
    if "peft_config" in vars(model):  # the tuner inside one
        return model._modules.get("model")
    return next((model._modules[name] for name in _HELD_AS if name in model._modules), None)
