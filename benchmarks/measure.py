"""What the benchmarks share: calls timed in turns, tables, and goals that are met or say what stands in the way."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from headkv._table import table

Row = Mapping[str, str | float]
WARM_UPS, FIRST_REPLAYS = 2, 3
NOT_COUNTED = WARM_UPS + FIRST_REPLAYS  # calls of `replay_microseconds` before one counts


@dataclass(frozen=True)
class Goal:
    """One figure that was wanted.

    Attributes:
        figure: what is measured.
        wanted: the least (or most) that was asked for.
        measured: what came out.
        met: whether that is enough.
        bound: what it can not pass, and why, for a figure that is not met.
    """

    figure: str
    wanted: str
    measured: str
    met: bool
    bound: str = ""


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call; every round runs each of them once, after a round that does not count.

    Whatever slows the machine for a while then slows all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: median(times) for name, times in seconds.items()}


def replay_microseconds(call: Callable[[], object], replays: int) -> float:
    """Median time of a CUDA graph that holds one call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(FIRST_REPLAYS + replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return median(times[FIRST_REPLAYS:])


def show(title: str, rows: Sequence[Row]) -> None:
    """Prints rows of equal columns as a table."""
    words = [column for column, value in rows[0].items() if isinstance(value, str)]
    print(title, table(rows, words), "", sep="\n")


def show_goals(goals: Sequence[Goal]) -> None:
    """Prints the goals, met or not, if there are any."""
    rows = [
        {
            "goal": g.figure,
            "wanted": g.wanted,
            "measured": g.measured,
            "": "met" if g.met else f"NOT met: {g.bound}",
        }
        for g in goals
    ]
    if rows:
        show("Goals", rows)


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option that all benchmarks have."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write tables and goals here")


def finish(path: Path | None, tables: Mapping[str, Sequence[Row]], goals: Sequence[Goal]) -> None:
    """Shows the tables, and the goals after them; writes all to `path`, if there is one."""
    for title, rows in tables.items():
        show(title, rows)
    if path is None:
        show_goals(goals)
    else:
        path.write_text(json.dumps({"tables": tables, "goals": [asdict(g) for g in goals]}, indent=1) + "\n")
