"""Ragged layers in a file: safetensors, a version, and checksums, so that what is read is what was written.

Of every row only the entries that it stores are written; head room is made anew. `FORMAT` and `VERSION` stand in the
file's header with what is said `about` it, and that with its checksum. Each layer has one as well, or each part of one
whose heads are stored in different ways.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from headkv._files import replacing
from headkv.cache import layout, moves
from headkv.cache.checks import DTYPES
from headkv.cache.mixed import MixedLayer, Store
from headkv.cache.quantised import BITS
from headkv.cache.quantised import DTYPES as CODES
from headkv.cache.ragged import RaggedLayer
from headkv.cache.residual import NAMES as RESIDUAL
from headkv.cache.residual import Residual
from headkv.cache.rows import SUMS, Pools, channels

FORMAT = "headkv-cache"
VERSION = 1

# What rows are, beside their pools: all int64 `[rows]`. Where they begin follows from their capacities.
_NUMBERS = ("length", "capacity", "sinks", "recent", "evicted_end", "trimmed_end")
_FACTS = ("num_kv_heads", "seen", "rollback")


def write(
    path: str | os.PathLike[str],
    layers: Sequence[Store],
    about: dict[str, Any],
    beside: dict[str, Tensor] | None = None,
) -> None:
    """A file of `layers` at `path`, whole or not at all.

    Args:
        path: what is there is replaced.
        layers: on any devices.
        about: what else the file says; plain JSON values.
        beside: what else it holds, by name; on any devices.
    """
    from safetensors.torch import save_file

    parts = [
        (part, {"layer": i, "heads": heads})
        for i, layer in enumerate(layers)
        for part, heads in zip(layer.parts, layer.heads, strict=True)
    ]
    packed = [_packed(part) for part, _ in parts]
    said = [
        {**{name: getattr(part, name) for name in _FACTS}, **whose, "sha256": _digest(tensors)}
        for (part, whose), tensors in zip(parts, packed, strict=True)
    ]
    rest = {name: x.detach().cpu().clone().contiguous() for name, x in (beside or {}).items()}
    text = json.dumps({**about, "layers": said, "beside": _digest(rest)})
    header = {"format": FORMAT, "version": str(VERSION), "about": text, "sha256": _of_text(text)}
    tensors = {f"{i}.{name}": x for i, part in enumerate(packed) for name, x in part.items()}
    tensors |= {f"beside.{name}": x for name, x in rest.items()}
    with replacing(path) as partial:
        save_file(tensors, partial, metadata=header)


def read(
    path: str | os.PathLike[str],
    check: Callable[[dict[str, Any]], None],
    devices: Sequence[torch.device],
) -> tuple[list[Store], dict[str, Tensor]]:
    """The layers that `write` wrote, and what it wrote beside them, on the CPU.

    Args:
        path: the file.
        check: is given what the file says, before a layer is read; raises ValueError where that does not fit.
        devices: where to put each layer.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole file of this version, or `check` says so; the message names it.
    """
    from safetensors import SafetensorError, safe_open

    where = os.fspath(path)
    if not os.path.exists(where):
        raise FileNotFoundError(f"there is no file of a cache at {where}")
    try:
        with safe_open(where, "pt") as file:
            about = _about(file.metadata() or {})
            check(about)
            beside = _tensors(file, "beside")
            if _digest(beside) != about.get("beside"):
                raise ValueError(
                    "damaged: what stands beside layers does not have the checksum that the file names"
                )
            whose = [facts.get("layer", i) for i, facts in enumerate(about["layers"])]  # at first not said
            if sorted({*whose}) != list(range(len(devices))):
                raise ValueError(f"layers must be 0 to {len(devices) - 1}, got {whose}")
            parts: dict[int, list[tuple[RaggedLayer, list[int]]]] = {layer: [] for layer in sorted(whose)}
            for i, (layer, facts) in enumerate(zip(whose, about["layers"], strict=True)):
                part = _unpacked(_tensors(file, i), facts, f"layer {layer}", devices[layer])
                parts[layer].append((part, facts.get("heads", [])))
            return [_together(of_layer) for of_layer in parts.values()], beside
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} can not be read as a whole safetensors file: {error}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _about(header: dict[str, str]) -> dict[str, Any]:
    """What a file says of itself, if it is one of ours."""
    if header.get("format") != FORMAT:
        raise ValueError(
            f'not a cache of headkv: its "format" must be "{FORMAT}", got {header.get("format")!r}'
        )
    if (version := header.get("version")) != str(VERSION):
        newer = " of a newer headkv" if version is not None and version.isdecimal() else ""
        raise ValueError(f"version must be {VERSION}, got {version!r}{newer}")
    text = header.get("about", "")
    if header.get("sha256") != _of_text(text):
        raise ValueError("damaged: what its header says does not have the checksum that it names")
    about: dict[str, Any] = json.loads(text)
    return about


def _together(parts: list[tuple[RaggedLayer, list[int]]]) -> Store:
    return parts[0][0] if len(parts) == 1 else MixedLayer(*zip(*parts, strict=True))


def _packed(layer: RaggedLayer) -> dict[str, Tensor]:
    """The contents of a layer on the CPU: its entries row after row, and what its rows are."""
    pools = moves.gather(layer.pools, layout.source_of_rows(layer.start, layer.length, layer.length))
    sums = [name for name in SUMS if getattr(layer, name) is not None]
    rest = {name: getattr(layer, name) for name in (*_NUMBERS, *sums)}
    if (held := Residual.of(layer)) is not None:
        rest |= held.tidied(layer.length)._asdict()  # what a crop took back is not written
    return {
        name: x.cpu().clone().contiguous() for name, x in {**pools._asdict(), **rest}.items() if x is not None
    }


def _tensors(file: Any, index: int | str) -> dict[str, Tensor]:
    prefix = f"{index}."
    return {
        name.removeprefix(prefix): file.get_tensor(name)
        for name in file.keys()  # noqa: SIM118 (not a mapping)
        if name.startswith(prefix)
    }


def _unpacked(
    tensors: dict[str, Tensor], facts: dict[str, Any], name: str, device: torch.device
) -> RaggedLayer:
    """A layer with the head room that it had."""
    if _digest(tensors) != facts.get("sha256"):
        raise ValueError(f"damaged: {name} does not have the checksum that the file names")
    _check(tensors, facts, name)
    moved = {key: x.to(device, copy=True) for key, x in tensors.items()}
    start, length, capacity = layout.starts(moved["length"]), moved["length"], moved["capacity"]
    pools = Pools(moved["keys"], moved["values"], moved["positions"], moved.get("scales"))
    moved |= moves.gather(pools, layout.source_of_rows(start, length, capacity))._asdict()
    numbers = {key: int(facts[key]) for key in _FACTS}
    contents: dict[str, Any] = {**moved, **numbers, "start": layout.starts(capacity)}
    return RaggedLayer(**contents)


def _check(tensors: dict[str, Tensor], facts: dict[str, Any], name: str) -> None:
    """Tensors that are a layer: nothing that reads it then leaves its memory."""
    for key in _FACTS:
        if not isinstance(facts.get(key), int) or facts[key] < 0:
            raise ValueError(f"{key} of {name} must be an int of at least 0, got {facts.get(key)!r}")
    keys, values, length = (tensors.get(key) for key in ("keys", "values", "length"))
    scales = tensors.get("scales")
    if keys is None or values is None or length is None or not keys.ndim == values.ndim == 2:
        raise ValueError(f"{name} must have keys [slots, D], values [slots, D] and lengths [rows]")
    stored = [(x, x) for x in DTYPES] if scales is None else [(CODES[k], CODES[v]) for k, v in BITS.values()]
    if (keys.dtype, values.dtype) not in stored or channels(keys) != channels(values):
        got = f"{keys.dtype} {list(keys.shape)} and {values.dtype} {list(values.shape)}"
        raise ValueError(f"{name} must have keys and values of one storage and width, got {got}")
    slots, rows = [keys.shape[0]], [length.numel()]
    shapes: dict[str, tuple[list[int], torch.dtype]] = {
        "keys": ([*slots, keys.shape[1]], keys.dtype),
        "values": ([*slots, values.shape[1]], values.dtype),
        "positions": (slots, torch.int32),
        **{key: (rows, torch.int64) for key in _NUMBERS},
    }
    if scales is not None:
        dtype = scales.dtype if scales.dtype in DTYPES else torch.float32
        shapes["scales"] = [*slots, 2], dtype
    if set(SUMS) & tensors.keys():
        sums = [*rows, channels(keys)], torch.float32
        shapes |= {"key_sum": sums, "value_sum": sums, "count": (rows, torch.int64)}
    if set(RESIDUAL) & tensors.keys() and scales is not None:
        ring = tensors.get("residual_keys", keys)
        size = max(1, ring.shape[1]) if ring.ndim == 3 else 1
        rings = [*rows, size, channels(keys)], scales.dtype
        shapes |= {"residual_keys": rings, "residual_values": rings, "residual_count": (rows, torch.int64)}
    found = {key: (list(x.shape), x.dtype) for key, x in tensors.items()}
    if found != shapes:
        raise ValueError(f"{name} must hold {shapes}, got {found}")
    heads, positions = facts["num_kv_heads"], tensors["positions"]
    right = (
        heads > 0 and rows[0] > 0 and rows[0] % heads == 0,
        bool((length >= 0).all()) and int(length.sum()) == slots[0],
        bool((tensors["capacity"] >= length).all()),
        all(bool((tensors[key] >= 0).all()) for key in ("sinks", "recent", "evicted_end", "trimmed_end")),
        bool(((positions >= 0) & (positions < facts["seen"])).all()),
        "residual_count" not in tensors or _held(tensors),
    )
    if not all(right):
        raise ValueError(f"{name} must be made of rows that lie within it, got {facts}")


def _held(tensors: dict[str, Tensor]) -> bool:
    """Rows hold as many newest entries as they may, and have."""
    count, size = tensors["residual_count"], tensors["residual_keys"].shape[1]
    return bool(((count >= 0) & (count <= tensors["length"].clamp(max=size))).all())


def _digest(tensors: dict[str, Tensor]) -> str:
    """A checksum of tensors on the CPU: their names, dtypes, shapes and bits."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
