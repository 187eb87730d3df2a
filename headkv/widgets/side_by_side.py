"""The same bytes, split over the heads in several ways: what each head keeps, and what the model answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import traitlets as t

from headkv import _checks
from headkv.widgets import checks
from headkv.widgets.base import Buffer, Picture, bundle


class SideBySide(Picture):
    """Ways to compress one cache, side by side at the same shares: budgets, a hidden fact, measured answers.

    Nothing is computed in the page but counts: what a column shows was measured beforehand.

    Args:
        columns: for each way, by its name, a mapping with `lengths` (entries each head keeps,
            `[shares, layers, heads]`), `kept` (which of the tokens shown, `[shares, layers, heads, m]` bool) and
            `answers` (one a share: whether it is right, and its words); optionally `right` (how many of `asked`
            other texts were answered, one a share) and `step_ms` (milliseconds of a decode step, one a share).
        shares: of the full cache, rising, each in (0, 1].
        length: n, entries of the full cache in each head.
        tokens: the m tokens around the fact, as text.
        fact: (start, end) of the fact in `tokens`, underlined.
        answer: (start, end) of the part that a head must hold to keep the answer whole; default: `fact`.
        question: what was asked, after the compression.
        expected: the right answer.
        asked: on how many texts `right` was counted.
        bytes_per_entry: bytes of one key and one value of one head (512: head dim 64, float32).
        full_step_ms: milliseconds of a decode step with the full cache, to compare `step_ms` with.
        at: which share is shown first, by its place in `shares`.
        selected: the chosen (layer, head).
        title: a line above the picture.

    Attributes:
        at, selected: kept in step with the page.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example:
        >>> kept = [[[[True, False]]], [[[True, True]]]]
        >>> even = {"lengths": [[[1]], [[2]]], "kept": kept, "answers": [(False, "4"), (True, "7")]}
        >>> SideBySide({"even": even}, shares=[0.5, 1.0], length=2, tokens=["is ", "7"], fact=(0, 2),
        ...            question="What is it?", expected="7")
        SideBySide: 1 layer of 1 KV head, 2 entries; at 50% of the bytes: even answers 4 (wrong).
    """

    _esm = bundle("side_by_side.js")

    _shape = t.List(t.Int()).tag(sync=True)
    names = t.List(t.Unicode()).tag(sync=True)
    shares = t.List(t.Float()).tag(sync=True)
    lengths: t.List[Any] = t.List().tag(sync=True)
    _kept = Buffer().tag(sync=True)
    answers: t.List[Any] = t.List().tag(sync=True)
    right: t.List[Any] = t.List().tag(sync=True)
    asked = t.Int().tag(sync=True)
    step_ms: t.List[Any] = t.List().tag(sync=True)
    full_step_ms = t.Float(None, allow_none=True).tag(sync=True)
    length = t.Int().tag(sync=True)
    tokens = t.List(t.Unicode()).tag(sync=True)
    fact = t.List(t.Int()).tag(sync=True)
    answer = t.List(t.Int()).tag(sync=True)
    question = t.Unicode().tag(sync=True)
    expected = t.Unicode().tag(sync=True)
    bytes_per_entry = t.Int().tag(sync=True)
    at = t.Int().tag(sync=True)
    selected = t.List(t.Int()).tag(sync=True)
    title = t.Unicode().tag(sync=True)

    def __init__(
        self,
        columns: Mapping[str, Mapping[str, Any]],
        *,
        shares: Sequence[float],
        length: int,
        tokens: Sequence[str],
        fact: Sequence[int],
        question: str,
        expected: str,
        answer: Sequence[int] | None = None,
        asked: int = 0,
        bytes_per_entry: int = 512,
        full_step_ms: float | None = None,
        at: int = 0,
        selected: tuple[int, int] = (0, 0),
        title: str | None = None,
    ) -> None:
        if not 1 <= len(columns) <= 3:
            raise ValueError(f"columns must hold 1 to 3 ways, got {len(columns)}")
        levels = [checks.share(f"shares[{i}]", share, zero=False) for i, share in enumerate(shares)]
        if not levels or levels != sorted(set(levels)):
            raise ValueError(f"shares must rise, got {levels}")
        n = checks.whole("length", length, 1)
        m = len(tokens)
        made = [_column(name, column, len(levels), n, m) for name, column in columns.items()]
        layers, heads = made[0][0].shape[1:]
        for name, (lengths, *_) in zip(columns, made, strict=True):
            if lengths.shape[1:] != (layers, heads):
                got = list(lengths.shape[1:])
                raise ValueError(f"lengths of {name!r} must have {layers} layers of {heads} heads, got {got}")
        whole = checks.whole("asked", asked)
        if full_step_ms is not None:
            _checks.between("full_step_ms", full_step_ms, 0)
        super().__init__(
            _shape=[len(levels), layers, heads, m],
            names=list(columns),
            shares=levels,
            lengths=[lengths.tolist() for lengths, *_ in made],
            _kept=b"".join(np.packbits(kept, axis=-1).tobytes() for _, kept, *_ in made),
            answers=[answers for _, _, answers, *_ in made],
            right=[
                [checks.whole(f"right of {name!r}", x, 0, whole) for x in right]
                for name, (*_, right, _) in zip(columns, made, strict=True)
            ],
            asked=whole,
            step_ms=[times for *_, times in made],
            full_step_ms=full_step_ms,
            length=n,
            tokens=checks.strings("tokens", tokens, m),
            fact=_span("fact", fact, m),
            answer=_span("answer", fact if answer is None else answer, m),
            question=question,
            expected=expected,
            bytes_per_entry=checks.whole("bytes_per_entry", bytes_per_entry, 1),
            at=checks.whole("at", at, 0, len(levels) - 1),
            selected=checks.pair("selected", selected, (layers, heads)),
            title=title or "",
        )

    @t.validate("at", "selected")
    def _as_described(self, proposal: Any) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        if name == "at":
            return checks.whole(name, value, 0, self._shape[0] - 1)
        return checks.pair(name, value, (self._shape[1], self._shape[2]))

    def whole(self) -> np.ndarray:
        """How many heads keep the answer whole, `[columns, shares]` int64."""
        shares, layers, heads, m = self._shape
        bits = np.frombuffer(self._kept, dtype=np.uint8).reshape(len(self.names), shares, layers, heads, -1)
        kept = np.unpackbits(bits, axis=-1, count=m)[..., self.answer[0] : self.answer[1]]
        counted: np.ndarray = kept.all(-1).sum((-1, -2))
        return counted

    def describe(self) -> str:
        _, layers, heads, _ = self._shape
        said = "; ".join(
            f"{name} answers {text} ({'right' if right else 'wrong'})"
            + (f" at {times[self.at]:.3g} ms a step" if times else "")
            for name, (right, text), times in zip(
                self.names, [answers[self.at] for answers in self.answers], self.step_ms, strict=True
            )
        )
        if self.full_step_ms is not None:
            said += f"; full cache: {self.full_step_ms:.3g} ms a step"
        return (
            f"SideBySide: {layers} {'layer' if layers == 1 else 'layers'} of {heads} "
            f"KV {'head' if heads == 1 else 'heads'}, {self.length:,} entries; "
            f"at {self.shares[self.at]:.0%} of the bytes: {said}."
        )


def _column(
    name: str, column: Mapping[str, Any], shares: int, n: int, m: int
) -> tuple[np.ndarray, np.ndarray, list[list[Any]], list[int], list[float]]:
    """What one way keeps and answers, checked."""
    if missing := {"lengths", "kept", "answers"} - set(column):
        raise ValueError(
            f"columns[{name!r}] must have lengths, kept and answers, got no {sorted(missing)[0]}"
        )
    lengths = checks.array(f"lengths of {name!r}", column["lengths"], ndim=(3,)).astype(int)
    kept = checks.array(f"kept of {name!r}", column["kept"], ndim=(4,)).astype(bool)
    if len(lengths) != shares or lengths.min() < 0 or lengths.max() > n:
        raise ValueError(f"lengths of {name!r} must be {shares} grids of counts in [0, {n}]")
    if kept.shape != (*lengths.shape, m):
        raise ValueError(f"kept of {name!r} must have shape {[*lengths.shape, m]}, got {list(kept.shape)}")
    answers = [[bool(right), str(text)] for right, text in column["answers"]]
    right, times = list(column.get("right", ())), list(column.get("step_ms", ()))
    if len(answers) != shares or len(right) not in (0, shares):
        raise ValueError(
            f"answers and right of {name!r} must be {shares}, got {len(answers)} and {len(right)}"
        )
    if len(times) not in (0, shares):
        raise ValueError(f"step_ms of {name!r} must be {shares} numbers, got {len(times)}")
    for time in times:
        _checks.between(f"step_ms of {name!r}", time, 0)
    return lengths, kept, answers, right, times


def _span(name: str, span: Sequence[int], m: int) -> list[int]:
    start, end = span
    first = checks.whole(f"{name} start", start, 0, m - 1)
    return [first, checks.whole(f"{name} end", end, first + 1, m)]
