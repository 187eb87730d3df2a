"""How many heads keep all, by which list of scores: which they are, the bytes, and what was still answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import traitlets as t

from headkv.widgets import checks
from headkv.widgets.base import Picture, bundle

FIELDS = ("profile", "kind", "length", "heads", "stored", "right", "full", "asked")


class SparsityDial(Picture):
    """A dial of the heads that keep all while the others stream, ordered by one of several profiles.

    Answers and shares were measured beforehand, for each stop of the dial; the page only sorts the heads.

    Args:
        profiles: for each list, by its name, its scores `[layers, heads]`, one a KV head; the highest keep all, of
            equal ones the earlier.
        cells: what was measured, one mapping for each profile, kind of question, length and number of heads, as
            `headkv profile compare --json` writes them: `profile`, `kind`, `length`, `heads` that keep all, `stored`
            (share of the entries), `right` (answers, of those that are right with all heads full), `full` (answers
            that are), `asked`.
        profile: which list is shown first.
        heads: how many heads keep all at first; default: the stop nearest to a fifth of them.
        bytes_per_entry: bytes of one key and one value of one head (512: head dim 64, float32).
        selected: the chosen (layer, head).
        title: a line above the picture.

    Attributes:
        at: the stop of the dial, by its place in `counts`; kept in step with the page.
        profile, length: what is shown, by its place in `names` and `lengths`; likewise.
        kind: of the questions; empty for all together; likewise.
        counts: the stops, heads that keep all.

    Raises:
        TypeError, ValueError: an argument is not as described, or a cell is missing; the message names it.

    Example:
        >>> rows = [dict(profile="gate", kind="words", length=100, heads=k, stored=s, right=r, full=9, asked=10)
        ...         for k, s, r in ((0, 0.2, 0), (1, 0.6, 8), (2, 1.0, 9))]
        >>> SparsityDial({"gate": [[0.9, 0.1]]}, rows, heads=1)
        SparsityDial: 1 of 2 KV heads keep all, the highest by gate; 60% of the bytes at 100 tokens: 8 of 9 answers.
    """

    _esm = bundle("sparsity_dial.js")

    _shape = t.List(t.Int()).tag(sync=True)
    _scores: t.List[Any] = t.List().tag(sync=True)
    names = t.List(t.Unicode()).tag(sync=True)
    counts = t.List(t.Int()).tag(sync=True)
    lengths = t.List(t.Int()).tag(sync=True)
    kinds = t.List(t.Unicode()).tag(sync=True)
    stored: t.List[Any] = t.List().tag(sync=True)  # [lengths][counts]
    right: t.List[Any] = t.List().tag(sync=True)  # [lengths][profiles][counts][kinds]
    full: t.List[Any] = t.List().tag(sync=True)  # [lengths][kinds]
    asked: t.List[Any] = t.List().tag(sync=True)
    bytes_per_entry = t.Int().tag(sync=True)
    at = t.Int().tag(sync=True)
    profile = t.Int().tag(sync=True)
    length = t.Int().tag(sync=True)
    kind = t.Unicode().tag(sync=True)
    selected = t.List(t.Int()).tag(sync=True)
    title = t.Unicode().tag(sync=True)

    def __init__(
        self,
        profiles: Mapping[str, Any],
        cells: Sequence[Mapping[str, Any]],
        *,
        profile: str | None = None,
        heads: int | None = None,
        bytes_per_entry: int = 512,
        selected: tuple[int, int] = (0, 0),
        title: str | None = None,
    ) -> None:
        if not profiles:
            raise ValueError("profiles must hold one list of scores or more, got none")
        scores = {name: checks.array(f"scores of {name!r}", x, ndim=(2,)) for name, x in profiles.items()}
        names = list(scores)
        shape = scores[names[0]].shape
        for name, array in scores.items():
            if array.shape != shape:
                raise ValueError(f"scores of {name!r} must be {list(shape)}, got {list(array.shape)}")
        total = shape[0] * shape[1]
        found = {_key(i, cell, total): cell for i, cell in enumerate(cells)}
        lengths, counts = sorted({key[2] for key in found}), sorted({key[3] for key in found})
        kinds = list(dict.fromkeys(key[1] for key in found))
        if len(counts) < 2:
            raise ValueError(f"cells must hold two numbers of heads or more, got {counts}")

        def cell(name: str, kind: str, length: int, count: int) -> Mapping[str, Any]:
            if (there := found.get((name, kind, length, count))) is None:
                raise ValueError(
                    f"cells must hold {name!r}, {kind}, {length} tokens, {count} heads, got no such one"
                )
            return there

        first = [[cell(names[0], kind, n, counts[0]) for kind in kinds] for n in lengths]
        near = total / 5 if heads is None else checks.whole("heads", heads, 0, total)
        super().__init__(
            _shape=list(shape),
            _scores=[array.round(6).tolist() for array in scores.values()],
            names=names,
            counts=counts,
            lengths=lengths,
            kinds=kinds,
            stored=[[float(cell(names[0], kinds[0], n, k)["stored"]) for k in counts] for n in lengths],
            right=[
                [[[int(cell(name, kind, n, k)["right"]) for kind in kinds] for k in counts] for name in names]
                for n in lengths
            ],
            full=[[int(one["full"]) for one in row] for row in first],
            asked=[[int(one["asked"]) for one in row] for row in first],
            bytes_per_entry=checks.whole("bytes_per_entry", bytes_per_entry, 1),
            at=min(range(len(counts)), key=lambda i: abs(counts[i] - near)),
            profile=names.index(checks.one_of("profile", profile or names[0], names)),
            length=0,
            kind="",
            selected=checks.pair("selected", selected, (shape[0], shape[1])),
            title=title or "",
        )

    @t.validate("at", "profile", "length", "kind", "selected")
    def _as_described(self, proposal: Any) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        if name == "selected":
            return checks.pair(name, value, (self._shape[0], self._shape[1]))
        if name == "kind":
            return checks.one_of(name, value, ("", *self.kinds))
        sizes = {"at": len(self.counts), "profile": len(self.names), "length": len(self.lengths)}
        return checks.whole(name, value, 0, sizes[name] - 1)

    def describe(self) -> str:
        right, full = self.right[self.length][self.profile][self.at], self.full[self.length]
        return (
            f"SparsityDial: {self.counts[self.at]} of {self._shape[0] * self._shape[1]} KV heads keep all, "
            f"the highest by {self.names[self.profile]}; {self.stored[self.length][self.at]:.0%} of the bytes at "
            f"{self.lengths[self.length]:,} tokens: {sum(right)} of {sum(full)} answers."
        )


def _key(i: int, cell: Mapping[str, Any], total: int) -> tuple[str, str, int, int]:
    """What a cell is of: profile, kind, length, heads."""
    if missing := [name for name in FIELDS if name not in cell]:
        raise ValueError(f"cells[{i}] must have {', '.join(FIELDS)}, got no {missing[0]}")
    checks.share(f"cells[{i}] stored", cell["stored"])
    asked = checks.whole(f"cells[{i}] asked", cell["asked"], 1)
    checks.whole(
        f"cells[{i}] right", cell["right"], 0, checks.whole(f"cells[{i}] full", cell["full"], 0, asked)
    )
    return (
        str(cell["profile"]),
        str(cell["kind"]),
        checks.whole(f"cells[{i}] length", cell["length"], 1),
        checks.whole(f"cells[{i}] heads", cell["heads"], 0, total),
    )
