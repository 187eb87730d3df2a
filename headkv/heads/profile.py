"""A head profile: one score a head, measured once on a model and kept in a small versioned JSON file."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from headkv import _checks
from headkv._config import attention_layers, class_or_name, kv_heads, model_name
from headkv._figure import grid_figure
from headkv._files import replacing
from headkv._grid import grid_html, spread
from headkv._wrappers import unwrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("echo", "induction", "retrieval", "retrieval-reasoning", "gate", "ablation", "reconstruction")

_FORMAT = "headkv-head-profile"
_DATA = resources.files("headkv.heads") / "data"
_PROFILERS = "headkv.heads.profilers"
_HEADS = {"query": "query head", "kv": "KV head"}
_FIELDS = ("format", "version", "model", "kind", "heads", "parameters", "scores")


@dataclass(frozen=True, eq=False)
class HeadProfile:
    """Scores of all heads of one model; a higher score means that the head needs the far past more.

    Attributes:
        model: the model's public id, e.g. "HuggingFaceTB/SmolLM2-135M-Instruct".
        kind: what was measured, one of `KINDS`: "echo" and "induction" (RazorAttention), "retrieval" and
            "retrieval-reasoning" (HeadKV), "gate" (DuoAttention), "ablation" (what an answer loses without the head),
            "reconstruction" (KVzip). Every method takes every kind; scores that are to share out a budget are at
            least 0.
        heads: "query" (one score a query head) or "kv" (one a KV head).
        scores: [layers, heads], float32, finite, on the CPU; of hybrid models the layers that attend, in order.
        parameters: how it was measured; plain JSON values.

    Raises:
        ValueError: a field is not as described above.
        TypeError: `scores` is not a tensor of floats.
    """

    version: ClassVar[int] = 1

    model: str
    kind: str
    heads: str
    scores: Tensor
    parameters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model must be the model's id, a non-empty string, got {self.model!r}")
        _checks.one_of("kind", self.kind, KINDS)
        _checks.one_of("heads", self.heads, ("query", "kv"))
        if not isinstance(self.scores, Tensor) or not self.scores.is_floating_point():
            got = self.scores.dtype if isinstance(self.scores, Tensor) else type(self.scores).__name__
            raise TypeError(f"scores must be a floating-point tensor [layers, heads], got {got}")
        if self.scores.ndim != 2 or self.scores.numel() == 0:
            raise ValueError(
                f"scores must be [layers, heads], not empty, got shape {list(self.scores.shape)}"
            )
        if not bool(self.scores.isfinite().all()):
            layer, head = (~self.scores.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"scores must be finite, got {self.scores[layer, head].item()} at layer {layer}, head {head}"
            )
        try:
            json.dumps(self.parameters, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"parameters must be plain JSON values: {error}") from error
        object.__setattr__(self, "scores", self.scores.detach().to("cpu", torch.float32).contiguous())
        object.__setattr__(self, "parameters", dict(self.parameters))

    @property
    def num_layers(self) -> int:
        """The number of layers."""
        return self.scores.shape[0]

    @property
    def num_heads(self) -> int:
        """The number of heads of a layer, query or KV heads as `heads` says."""
        return self.scores.shape[1]

    def kv_scores(self, num_kv_heads: int, reduce: str = "max") -> Tensor:
        """One score a KV head, [layers, num_kv_heads], float32.

        The query heads of a group, which share a KV head, are reduced to one score. A profile of KV heads is
        returned as it is.

        Args:
            num_kv_heads: of the model.
            reduce: "max" (RazorAttention), "sum" or "mean".

        Raises:
            ValueError: `num_kv_heads` does not fit the profile, or `reduce` is unknown.
        """
        _checks.one_of("reduce", reduce, ("max", "sum", "mean"))
        num_kv_heads = _checks.whole("num_kv_heads", num_kv_heads)
        if (
            num_kv_heads < 1
            or self.num_heads % num_kv_heads
            or (self.heads == "kv") * self.num_heads > num_kv_heads
        ):
            allowed = str(self.num_heads) if self.heads == "kv" else f"a divisor of {self.num_heads}"
            raise ValueError(f"num_kv_heads must be {allowed} for this profile, got {num_kv_heads}")
        grouped = self.scores.unflatten(1, (num_kv_heads, -1))  # [layers, H, G]
        return grouped.amax(-1) if reduce == "max" else getattr(grouped, reduce)(-1)

    def check_model(self, model: Any) -> None:
        """A check that this profile was made for `model`, a transformers model (wrapped or not) or its configuration.

        Raises:
            ValueError: the number of layers or heads differs, or both have a name and the names differ (only
                their last part counts, in any case). `renamed` is the way to use it all the same.
        """
        model = unwrapped(model)
        config = getattr(model, "config", model)
        name = model_name(config)
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        wanted = config.num_attention_heads
        if self.heads == "kv":
            wanted = kv_heads(config)
        layers = len(attention_layers(config))
        if (layers, wanted) != (self.num_layers, self.num_heads):
            kind = "" if layers == config.num_hidden_layers else "attention "
            raise ValueError(
                f"profile must fit the model, {layers} {kind}layers of {wanted} {self.heads} "
                f"heads, got one of {self.model} with {self.num_layers} layers of {self.num_heads}"
            )
        if name and _last_part(name) != _last_part(self.model):
            raise ValueError(
                f"profile must be one of the model {name!r}, got one of {self.model!r}; if their heads are "
                f"the same (a copy, a fine-tuned version), pass profile.renamed({name!r})"
            )

    def renamed(self, model: str) -> HeadProfile:
        """This profile as one of `model`: a copy, or a fine-tuned version, of the measured model."""
        return dataclasses.replace(
            self, model=model, parameters={**self.parameters, "measured_on": self.model}
        )

    def reordered(self, order: Tensor) -> HeadProfile:
        """This profile of the model whose KV heads stand in `order` `[layers, H]`; see `headkv.models.reorder_heads`.

        Raises:
            ValueError: an order of another number of layers or heads.
        """
        heads = order.shape[-1] if order.ndim == 2 else 0
        if not heads or len(order) != self.num_layers or self.num_heads % heads:
            allowed = f"[{self.num_layers}, a divisor of {self.num_heads}]"
            raise ValueError(f"order must have shape {allowed} for this profile, got {list(order.shape)}")
        grouped = self.scores.unflatten(1, (heads, -1))
        scores = grouped.gather(1, order[..., None].expand_as(grouped)).flatten(1)
        return dataclasses.replace(
            self, scores=scores, parameters={**self.parameters, "order": order.tolist()}
        )

    @property
    def label(self) -> str:
        """What it is, in three words."""
        return f"{self.kind} of {_base_name(self.model)}"

    def __repr__(self) -> str:
        shape = f"{self.num_layers} x {self.num_heads} {_HEADS[self.heads]}s"
        return f"HeadProfile({self.label}: {shape}, scores {spread(self.scores)})"

    def _repr_html_(self) -> str:
        layer, head = divmod(int(self.scores.argmax()), self.num_heads)
        said = f"{self.kind.capitalize()} scores of {self.model}: highest in layer {layer}, head {head}."
        return grid_html(self.scores, said, unit="", heads=_HEADS[self.heads])

    def plot(self) -> Figure:
        """A matplotlib figure of the scores: layers downward, heads across.

        Raises:
            ImportError: there is no matplotlib; the message says how to install it.
        """
        return grid_figure(self.scores, self.label, unit=f"{self.kind} score", heads=_HEADS[self.heads])

    def save(self, path: str | os.PathLike[str]) -> None:
        """A file of the profile, JSON with one line a layer; `load` gives back the same scores to the bit."""
        rows = (json.dumps([float(f"{score:.9g}") for score in row]) for row in self.scores.tolist())
        head = {
            "format": _FORMAT,
            "version": self.version,
            "model": self.model,
            "kind": self.kind,
            "heads": self.heads,
            "parameters": self.parameters,
        }
        text = json.dumps(head, indent=2, ensure_ascii=False, allow_nan=False)[:-2]
        text += ',\n  "scores": [\n    ' + ",\n    ".join(rows) + "\n  ]\n}\n"
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadProfile:
        """A profile that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no whole, valid profile of this version; the message says what is wrong.
        """
        where = os.fspath(path)
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors both; lists within lists
            raise ValueError(f"{where} is not a whole JSON file: {error}") from error
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ValueError(f'{where} is not a head profile: its "format" must be "{_FORMAT}"')
        if data.get("version") != cls.version:
            raise ValueError(f"{where}: version must be {cls.version}, got {data.get('version')!r}")
        if missing := [name for name in _FIELDS if name not in data]:
            raise ValueError(f"{where}: {', '.join(missing)} missing")
        if not isinstance(data["parameters"], dict):
            raise ValueError(f"{where}: parameters must be an object, got {data['parameters']!r}")
        try:
            scores = torch.tensor(data["scores"], dtype=torch.float32)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ValueError(f"{where}: scores must be rows of equal length of numbers: {error}") from error
        try:
            return cls(data["model"], data["kind"], data["heads"], scores, data["parameters"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error

    @classmethod
    def builtin(cls, name: str) -> HeadProfile:
        """A profile that is shipped with headkv, e.g. "smollm2-induction".

        Raises:
            ValueError: there is none of this name; the message lists those that there are.
        """
        _checks.one_of("name", name, _shipped())
        with resources.as_file(_DATA / f"{name}.json") as path:
            return cls.load(path)

    @classmethod
    def for_model(cls, model: Any, kind: str) -> HeadProfile:
        """The shipped profile of a kind for a loaded model.

        Args:
            model: a transformers model, known by its name (only the last part counts, in any case).
            kind: one of `KINDS`.

        Raises:
            ValueError: none is shipped; the message lists those that are, and says how one is measured. Or the model
                has other layers or heads than the one of this name.

        >>> HeadProfile.for_model(model, "retrieval")  # doctest: +SKIP
        HeadProfile(retrieval of SmolLM2-135M-Instruct: 30 x 9 query heads, scores 0 to 0.857)
        """
        _checks.one_of("kind", kind, KINDS)
        name, shipped = model_name(model), [cls.builtin(name) for name in _shipped()]
        for profile in shipped:
            if profile.kind == kind and _last_part(profile.model) == _last_part(name):
                profile.check_model(model)
                return profile
        there: dict[str, list[str]] = {}
        for profile in shipped:
            there.setdefault(profile.model, []).append(profile.kind)
        listed = "; ".join(f"{', '.join(kinds)} of {known}" for known, kinds in there.items())
        raise ValueError(
            f"model must be one with a shipped profile of kind {kind!r}, got {class_or_name(model)!r}. "
            f"Shipped: {listed}. HeadProfile.measure(model, tokenizer, {kind!r}) measures one, "
            f"`headkv profile --kind {kind} --model {name or 'NAME'} --out FILE` writes it to a file"
        )

    @classmethod
    def measure(cls, model: Any, tokenizer: Any, kind: str, **options: Any) -> HeadProfile:
        """A profile of a loaded model, measured now.

        Args:
            model: a transformers decoder.
            tokenizer: its tokenizer.
            kind: one of `headkv.heads.profilers.PROFILERS`.
            options: of the kind's profiler; `headkv.heads.profilers.profile_options(kind)` lists them. `progress=True`
                shows a progress bar.

        Raises:
            ValueError: an unknown kind, or an option out of range.
            TypeError: an option that the profiler does not have.
            RuntimeError: the model answers too badly to be measured.
        """
        # By its name: profilers are made of profiles, not the other way round.
        profile: HeadProfile = importlib.import_module(_PROFILERS).measure(kind, model, tokenizer, **options)
        return profile


def _shipped() -> list[str]:
    return sorted(entry.name[:-5] for entry in _DATA.iterdir() if entry.name.endswith(".json"))


def _base_name(name: str) -> str:
    return Path(name.replace("\\", "/")).name


def _last_part(name: str) -> str:
    return _base_name(name).lower()
