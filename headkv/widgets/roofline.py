"""Measured times against the limit: the longer of reading the bytes and doing the arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import traitlets as t

from headkv.widgets import checks
from headkv.widgets.base import Picture, bundle

VIEWS = ("time", "speed")


class Roofline(Picture):
    """Times of several ways to do the same work, in cases of growing size, against a machine's two limits.

    The limit of a case is the longer of two times: bytes over bandwidth, operations over arithmetic. Points are
    measured; nothing but the limit is computed in the page. Seen as speed it is the roofline of Williams et al. (2009):
    operations a second over operations a byte.

    Args:
        cases: the sizes, from small to large: each a mapping with its `name`, the `bytes` that it must read or write
            and the `operations` that it must do.
        seconds: for each way the time of each case, None where it was not measured.
        bandwidth: bytes a second that the memory gives.
        arithmetic: operations a second that the machine does at most.
        across: what the names of the cases count, as "new tokens".
        machine: what was measured, and where the two limits are from.
        way, case: what is chosen first, by name; default: the first way at the last case that it was measured at.
        view: "time" (seconds over the size) or "speed" (operations a second over operations a byte).
        title: a line above the picture.

    Attributes:
        way, case: their places, in the order given; view: as above. All three are kept in step with the page.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example:
        >>> cases = [{"name": f"{mb} MB", "bytes": 1e6 * mb, "operations": 4e6 * mb} for mb in (1, 4)]
        >>> Roofline(cases, {"ours": [3e-6, 6e-6]}, bandwidth=1e12, arithmetic=1e14)
        Roofline: ours (4 MB): 6.00 us, 1.5 times the limit of 4.00 us, which the bytes set.
    """

    _esm = bundle("roofline.js")

    cases: t.List[Any] = t.List().tag(sync=True)
    ways = t.List(t.Unicode()).tag(sync=True)
    seconds: t.List[Any] = t.List().tag(sync=True)
    bandwidth = t.Float().tag(sync=True)
    arithmetic = t.Float().tag(sync=True)
    across = t.Unicode().tag(sync=True)
    machine = t.Unicode().tag(sync=True)
    way = t.Int().tag(sync=True)
    case = t.Int().tag(sync=True)
    view = t.Enum(VIEWS).tag(sync=True)
    title = t.Unicode().tag(sync=True)

    def __init__(
        self,
        cases: Sequence[Mapping[str, Any]],
        seconds: Mapping[str, Sequence[float | None]],
        *,
        bandwidth: float,
        arithmetic: float,
        across: str = "",
        machine: str = "",
        way: str | None = None,
        case: str | None = None,
        view: str = "time",
        title: str | None = None,
    ) -> None:
        made = [_case(i, given) for i, given in enumerate(cases)]
        if len(made) < 2 or not seconds:
            raise ValueError(
                f"there must be two cases or more and one way, got {len(made)} and {len(seconds)}"
            )
        work = [one["operations"] for one in made]
        if sorted(set(work)) != work:
            raise ValueError(f"cases must have more and more operations, got {work}")
        times = [_times(name, given, len(made)) for name, given in seconds.items()]
        at = list(seconds).index(checks.one_of("way", way or next(iter(seconds)), tuple(seconds)))
        there = [made[i]["name"] for i, value in enumerate(times[at]) if value]
        super().__init__(
            cases=made,
            ways=list(seconds),
            seconds=times,
            bandwidth=checks.positive("bandwidth", bandwidth),
            arithmetic=checks.positive("arithmetic", arithmetic),
            across=across,
            machine=machine,
            way=at,
            case=[one["name"] for one in made].index(checks.one_of("case", case or there[-1], tuple(there))),
            view=checks.one_of("view", view, VIEWS),
            title=title or "",
        )

    @t.validate("way", "case")
    def _as_given(self, proposal: Any) -> Any:
        name = proposal["trait"].name
        return checks.whole(name, proposal["value"], 0, len(getattr(self, f"{name}s")) - 1)

    @property
    def limits(self) -> list[float]:
        """Seconds that each case takes at least."""
        return [max(self._parts(case)) for case in self.cases]

    def _parts(self, case: Mapping[str, Any]) -> tuple[float, float]:
        return case["bytes"] / self.bandwidth, case["operations"] / self.arithmetic

    def describe(self) -> str:
        case, took = self.cases[self.case], self.seconds[self.way][self.case]
        reading, counting = self._parts(case)
        limit = max(reading, counting)
        setting = "the bytes set" if reading >= counting else "the arithmetic sets"
        size = f"{self.across}: {case['name']}" if self.across else case["name"]
        where = f"Roofline: {self.ways[self.way]} ({size})"
        if took is None:
            return f"{where}: not measured; the limit is {_time(limit)}, which {setting}."
        return (
            f"{where}: {_time(took)}, {took / limit:.1f} times the limit of {_time(limit)}, which {setting}."
        )


def _time(seconds: float) -> str:
    """Three digits: 29.7 us, 1.01 ms."""
    scale, unit = (1e6, "us") if seconds < 1e-3 else (1e3, "ms")
    value = seconds * scale
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def _case(i: int, given: Mapping[str, Any]) -> dict[str, Any]:
    if missing := [name for name in ("name", "bytes", "operations") if name not in given]:
        raise ValueError(f"cases[{i}] must have name, bytes and operations, got no {missing[0]}")
    figures = {name: checks.positive(f"cases[{i}] {name}", given[name]) for name in ("bytes", "operations")}
    return {"name": str(given["name"]), **figures}


def _times(name: str, given: Sequence[float | None], cases: int) -> list[float | None]:
    if len(given) != cases:
        raise ValueError(f"seconds of {name!r} must be {cases}, one a case, got {len(given)}")
    times = [None if x is None else checks.positive(f"seconds of {name!r}", x) for x in given]
    if not any(times):
        raise ValueError(f"seconds of {name!r} must hold a time, got none")
    return times
