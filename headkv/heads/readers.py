"""Read the head scores that the authors of DuoAttention and HeadKV publish, as `HeadProfile`s."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from headkv import _checks
from headkv.heads.profile import HeadProfile

_TSV = "full_attention_heads.tsv"


def read_duo_attention(folder: str | os.PathLike[str], *, model: str) -> HeadProfile:
    """The gates in a pattern folder of DuoAttention: `full_attention_heads.tsv` and, beside it, `config.json`.

    The table holds a gate for each KV head, one line a layer. The gates stay as they are: clipping and the
    quantile are the method's part. The sinks and the recent window of the training are kept as parameters.

    Args:
        folder: the folder, or the table itself.
        model: the id of the model that the pattern is of; the files do not name it in a fixed way.

    Raises:
        FileNotFoundError: there is no table.
        ValueError: the table is no rectangle of numbers, or `config.json` is not as published.
    """
    path = Path(folder)
    table = path / _TSV if path.is_dir() else path
    rows: list[list[float]] = []
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append([float(word) for word in line.split()])
        except ValueError as error:
            raise ValueError(f"{table}, line {number}: expected numbers, got {line!r}") from error
        if len(rows[-1]) != len(rows[0]):
            raise ValueError(f"{table}, line {number}: expected {len(rows[0])} gates, got {len(rows[-1])}")
    if not rows:
        raise ValueError(f"{table}: expected one line a layer, got an empty file")
    parameters: dict[str, object] = {"source": "DuoAttention"}
    settings = table.with_name("config.json")
    if settings.exists():
        parameters |= _duo_settings(settings)
    return HeadProfile(model, "gate", "kv", torch.tensor(rows), parameters)


def read_headkv(
    path: str | os.PathLike[str],
    *,
    model: str,
    num_layers: int,
    num_heads: int,
    kind: str = "retrieval",
) -> HeadProfile:
    """The scores in a file of HeadKV: one JSON object, {"layer-head": [a value for each sample]}.

    A query head's score is the mean of its values. Keys are read by name, whatever their order.

    Args:
        path: the file.
        model: the id of the model that it is of; the file does not say.
        num_layers: of that model.
        num_heads: query heads of that model.
        kind: "retrieval" or "retrieval-reasoning" (the R2 files).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a head is missing or unknown, or has no values.
    """
    _checks.one_of("kind", kind, ("retrieval", "retrieval-reasoning"))
    _checks.whole("num_layers", num_layers, 1)
    _checks.whole("num_heads", num_heads, 1)
    where = os.fspath(path)
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{where} is not a whole JSON file: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f'{where}: expected an object of "layer-head" keys, got {type(data).__name__}')
    expected = {f"{layer}-{head}": (layer, head) for layer in range(num_layers) for head in range(num_heads)}
    shape = f"{num_layers} layers of {num_heads} query heads"
    if unknown := sorted(set(data) - set(expected)):
        raise ValueError(f"{where}: expected {shape}, got {len(unknown)} other keys such as {unknown[0]!r}")
    if missing := sorted(set(expected) - set(data)):
        raise ValueError(f"{where}: expected {shape}, but {len(missing)} are missing, such as {missing[0]!r}")
    scores = torch.zeros(num_layers, num_heads)
    samples = set()
    for key, (layer, head) in expected.items():
        values = data[key]
        if not isinstance(values, list) or not values or not all(_is_number(value) for value in values):
            raise ValueError(f"{where}: {key!r} must be a list of numbers, not empty, got {values!r}")
        scores[layer, head] = sum(values) / len(values)
        samples.add(len(values))
    if len(samples) > 1:
        raise ValueError(f"{where}: all heads must have as many values, got {sorted(samples)}")
    return HeadProfile(model, kind, "query", scores, {"source": "HeadKV", "samples": samples.pop()})


def _duo_settings(path: Path) -> dict[str, object]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        found = {"sinks": settings["sink_size"], "recent": settings["recent_size"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected an object with sink_size and recent_size: {error!r}") from error
    for name, value in found.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{path}: {name} must be an int of at least 0, got {value!r}")
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
