"""A small cache, moment by moment: what each row stores, what leaves its window, what one entry stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import traitlets as t

from headkv.cache import RaggedLayer
from headkv.cache.rows import LayerSnapshot
from headkv.widgets import checks
from headkv.widgets.base import Picture, bundle

MOST_TOKENS, MOST_ROWS = 40, 8  # what a phone can show


class EvictionTimeline(Picture):
    """What became of each entry of a `RaggedLayer` from one moment to the next.

    The page shows what the snapshots hold and computes nothing of its own.

    Args:
        moments: pairs of a name ("prefill") and the layer's `snapshot()` then, at least two, of one layer of one text:
            1 to 8 rows, at most 40 tokens in the end.
        tokens: the text, as many strings as tokens in the end; default: none is shown.
        names: one a row; default: "row 0", "row 1", ...
        at: the moment that is shown first, by its place in `moments`.
        title: a line above the picture.

    Attributes:
        at: kept in step with the page.
        moments: what is shown. Of each moment its `name`, the tokens `seen`, and its `rows`: positions `stored`, those
            `hidden` by the window but not dropped yet, those that the compensation entry stands for (`mean`, None
            without one), the `window` (sinks, recent), and what happened since the moment before (`says`).

    Raises:
        TypeError, ValueError: an argument is not as described, or rows began to compensate after they had dropped
            entries, so that nobody knows what their compensation entry stands for; the message says so.

    Example:
        >>> layer = RaggedLayer.from_dense(torch.zeros(1, 1, 6, 2), torch.zeros(1, 1, 6, 2), sinks=1, recent=2)
        >>> before = layer.snapshot()
        >>> layer.trim()
        >>> EvictionTimeline([("prefill", before), ("trimmed", layer.snapshot())], at=1)
        EvictionTimeline: moment 2 of 2, trimmed, 6 tokens. Row 0: drops 1 to 3; stores 3 of 6.
    """

    _esm = bundle("eviction_timeline.js")

    moments: t.List[Any] = t.List().tag(sync=True)
    tokens = t.List(t.Unicode()).tag(sync=True)
    names = t.List(t.Unicode()).tag(sync=True)
    at = t.Int().tag(sync=True)
    title = t.Unicode().tag(sync=True)

    def __init__(
        self,
        moments: Sequence[tuple[str, LayerSnapshot]],
        *,
        tokens: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        at: int = 0,
        title: str | None = None,
    ) -> None:
        if len(moments) < 2:
            raise ValueError(f"moments must hold at least 2, got {len(moments)}")
        made: list[dict[str, Any]] = []
        for i, (name, snapshot) in enumerate(moments):
            made.append(_moment(i, str(name), snapshot, made[-1] if made else None))
        rows, seen = len(made[0]["rows"]), made[-1]["seen"]
        super().__init__(
            moments=made,
            tokens=checks.strings("tokens", tokens, seen),
            names=checks.strings("names", names, rows) or [f"row {r}" for r in range(rows)],
            at=checks.whole("at", at, 0, len(made) - 1),
            title=title or "",
        )

    @t.validate("at")
    def _as_described(self, proposal: Any) -> Any:
        return checks.whole("at", proposal["value"], 0, len(self.moments) - 1)

    def describe(self) -> str:
        now = self.moments[self.at]
        rows = " ".join(
            f"{name[:1].upper()}{name[1:]}: {row['says']}; stores {len(row['stored'])} of {now['seen']}"
            + (f", and one entry stands for {len(row['mean'])}." if row["mean"] else ".")
            for name, row in zip(self.names, now["rows"], strict=True)
        )
        return (
            f"EvictionTimeline: moment {self.at + 1} of {len(self.moments)}, {now['name']}, "
            f"{now['seen']} tokens. {rows}"
        )


def _moment(i: int, name: str, snapshot: LayerSnapshot, before: dict[str, Any] | None) -> dict[str, Any]:
    """What one snapshot holds, checked against the moment before."""
    if not isinstance(snapshot, LayerSnapshot):
        raise TypeError(f"moments[{i}] must be (name, layer.snapshot()), got {type(snapshot).__name__}")
    layer = RaggedLayer.from_snapshot(snapshot)
    if layer.batch_size != 1 or layer.rows > MOST_ROWS or layer.seen > MOST_TOKENS:
        raise ValueError(
            f"moments[{i}] must be one text of 1 to {MOST_ROWS} rows and at most {MOST_TOKENS} tokens, "
            f"got batch {layer.batch_size} of {layer.num_kv_heads} rows, {layer.seen} tokens"
        )
    if before and (layer.rows != len(before["rows"]) or layer.seen < before["seen"]):
        raise ValueError(
            f"moments[{i}] must follow moments[{i - 1}] of {len(before['rows'])} rows and {before['seen']} tokens, "
            f"got {layer.rows} rows and {layer.seen} tokens"
        )
    rows = [_row(i, layer, r) for r in range(layer.rows)]
    for r, row in enumerate(rows):
        row["says"] = _happened(before["rows"][r], row) if before else f"{_spans(row['stored'])} stored"
    return {"name": name, "seen": layer.seen, "rows": rows}


def _row(i: int, layer: RaggedLayer, r: int) -> dict[str, Any]:
    """What a row stores, hides and remembers the mean of, by positions."""
    stored = layer.row(0, r).positions.tolist()
    sinks, recent = int(layer.sinks[r]), int(layer.recent[r])
    hidden = stored[sinks : max(sinks, len(stored) - recent)] if recent else []
    mean = None
    if layer.count is not None and layer.count[r] >= 0:
        visible = set(stored).difference(hidden)
        mean = [position for position in range(layer.seen) if position not in visible]
        stands = int(layer.count[r]) + len(hidden)
        if stands != len(mean):
            raise ValueError(
                f"moments[{i}], row {r}, must compensate for all {len(mean)} entries that it does not see, got {stands}"
            )
    return {"stored": stored, "hidden": hidden, "mean": mean, "window": [sinks, recent]}


def _happened(before: dict[str, Any], now: dict[str, Any]) -> str:
    """In words, what happened to a row from one moment to the next."""
    was, stays = set(before["stored"]), set(now["stored"])
    come, gone = sorted(stays - was), sorted(was - stays)
    left = sorted(set(now["hidden"]) - set(before["hidden"]))
    taken = sorted(set(now["mean"] or []) - set(before["mean"] or []))
    parts = [f"{_spans(come)} {'comes' if len(come) == 1 else 'come'}"] if come else []
    if left:
        parts.append(f"{_spans(left)} {'leaves' if len(left) == 1 else 'leave'} the window")
    if gone:
        parts.append(f"drops {_spans(gone)}")
    if taken:
        parts.append("into the diamond")
    return ", ".join(parts) or "no change"


def _spans(positions: Sequence[int]) -> str:
    """Positions in words.

    >>> _spans([0, 1, 4, 5, 6, 9])
    '0, 1, 4 to 6, 9'
    """
    runs: list[list[int]] = []
    for position in positions:
        if runs and position == runs[-1][-1] + 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
