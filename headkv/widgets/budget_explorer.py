"""Who keeps what, as a reader moves the budget (SnapKV scores, uniform or Ada-KV budgets)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import traitlets as t

from headkv.widgets import checks
from headkv.widgets.base import Buffer, Picture, bundle
from headkv.widgets.spans import spans

POOLINGS = ("max", "avg", "none")
ALLOCATORS = ("uniform", "adaptive")
CELLS = ("entries", "attention")
# Free slots that compression leaves behind a row: headkv.cache.ragged.MIN_HEADROOM, as a test holds.
HEADROOM = 64
CONTROLS = ("budget", "allocator", "safeguard", "pooling", "kernel_size", "cells", "slots")


class BudgetExplorer(Picture):
    """The grid, the strip and the bill of one prompt, moved by budget, safeguard, pooling and allocator.

    The page pools the scores, splits each layer's budget over its heads and picks the entries, as
    `headkv.SnapKVScorer` and the uniform and Ada-KV allocators do (SnapKV, arXiv 2404.14469; Ada-KV,
    arXiv 2407.11550, section 3). Scores travel as half floats, scaled by a power of two: `scores` are the
    values that the page uses.

    Args:
        scores: attention of the observation window, before pooling, `[layers, heads, n - window]` or
            `[heads, n - window]`, at least 0. One head is one KV head.
        tokens: the prompt's n tokens as text, shown as the strip.
        facts: `(start, end)` or `(start, end, label)` ranges of entries to underline, end excluded.
        budget: entries a head on average (int) or share of the prompt (float in (0, 1]), window included.
        safeguard: share of the budget that Ada-KV splits evenly, in [0, 1].
        pooling: "max", "avg" or "none".
        kernel_size: odd, 1 to 31.
        window: last entries, which are always kept.
        bytes_per_entry: bytes of one key and one value of one head (512: head dim 64, float32).
        headroom: free slots that a stored cache owns behind each row, striped on the bill; None: as many as headkv
            leaves, or none for a case by hand of fewer entries than that.
        allocator: "adaptive" (Ada-KV) or "uniform" (SnapKV).
        head_names: one name a KV head.
        answers: measured beforehand, shown on the bill: mappings with `budget` (share), `right` and `asked`
            (counts), optional `allocator` ("adaptive") and `text`.
        cells: what the grid shows of each head: "entries" kept, or "attention" that they hold (before the window).
        controls: which controls the reader sees, of "budget", "allocator", "safeguard", "pooling", "kernel_size",
            "cells", and "slots" (the slots given one by one); None: all.
        selected: the chosen (layer, head).
        title: a line above the picture.

    Attributes:
        budgets: entries each head keeps, window included, `[layers][heads]`; the page fills it once shown.
        kept: which entries, packed bits; `kept_mask()` unpacks them.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example:
        >>> A, B = [.60, .20, .10, .05, .03, .02], [.25, .20, .20, .15, .10, .10]
        >>> BudgetExplorer([A, B], budget=3, window=0, pooling="none")
        BudgetExplorer: 1 layer of 2 KV heads over 6 entries, budget 50% ...
    """

    _esm = bundle("budget_explorer.js")

    _scores = Buffer().tag(sync=True)
    _shape = t.List(t.Int()).tag(sync=True)
    _exponent = t.Int().tag(sync=True)
    tokens = t.List(t.Unicode()).tag(sync=True)
    facts: t.List[Any] = t.List().tag(sync=True)
    window = t.Int().tag(sync=True)
    bytes_per_entry = t.Int().tag(sync=True)
    headroom = t.Int().tag(sync=True)
    head_names = t.List(t.Unicode()).tag(sync=True)
    answers = t.List(t.Dict()).tag(sync=True)
    cells = t.Enum(CELLS).tag(sync=True)
    controls = t.List(t.Unicode()).tag(sync=True)
    title = t.Unicode().tag(sync=True)
    budget = t.Float().tag(sync=True)
    safeguard = t.Float().tag(sync=True)
    pooling = t.Enum(POOLINGS).tag(sync=True)
    kernel_size = t.Int().tag(sync=True)
    allocator = t.Enum(ALLOCATORS).tag(sync=True)
    selected = t.List(t.Int()).tag(sync=True)
    budgets: t.List[Any] = t.List().tag(sync=True)
    kept = Buffer().tag(sync=True)

    def __init__(
        self,
        scores: Any,
        *,
        tokens: Sequence[str] | None = None,
        facts: Sequence[Sequence[Any]] | None = None,
        budget: int | float = 0.2,
        safeguard: float = 0.2,
        pooling: str = "max",
        kernel_size: int = 7,
        window: int = 32,
        bytes_per_entry: int = 512,
        headroom: int | None = None,
        allocator: str = "adaptive",
        head_names: Sequence[str] | None = None,
        answers: Sequence[Mapping[str, Any]] | None = None,
        cells: str = "entries",
        controls: Sequence[str] | None = None,
        selected: tuple[int, int] = (0, 0),
        title: str | None = None,
    ) -> None:
        raw = checks.array("scores", scores, ndim=(2, 3))
        raw = raw[None] if raw.ndim == 2 else raw
        if (raw < 0).any():
            raise ValueError(f"scores must be at least 0 (attention), got {raw.min()}")
        layers, heads, m = raw.shape
        if heads * m >= 2**21:
            raise ValueError(f"scores must hold fewer than {2**21} values a layer, got {heads} x {m}")
        n = m + checks.whole("window", window, 0)
        packed, exponent = _pack(raw)
        super().__init__(
            _scores=packed.tobytes(),
            _shape=[layers, heads, m],
            _exponent=exponent,
            tokens=checks.strings("tokens", tokens, n),
            facts=spans(facts, n),
            budget=checks.budget_share(budget, n),
            safeguard=checks.share("safeguard", safeguard),
            pooling=checks.one_of("pooling", pooling, POOLINGS),
            kernel_size=_kernel(kernel_size),
            window=int(window),
            bytes_per_entry=checks.whole("bytes_per_entry", bytes_per_entry, 1),
            headroom=(
                checks.whole("headroom", headroom) if headroom is not None else HEADROOM * (n > HEADROOM)
            ),
            allocator=checks.one_of("allocator", allocator, ALLOCATORS),
            head_names=checks.strings("head_names", head_names, heads),
            answers=[_answer(i, answer) for i, answer in enumerate(answers or ())],
            cells=checks.one_of("cells", cells, CELLS),
            controls=[
                checks.one_of("controls", name, CONTROLS)
                for name in (CONTROLS if controls is None else controls)
            ],
            selected=checks.pair("selected", selected, (layers, heads)),
            title=title or "",
        )

    @t.validate("budget", "safeguard", "kernel_size", "selected")
    def _as_described(self, proposal: Any) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        if name == "selected":
            return checks.pair(name, value, (self._shape[0], self._shape[1]))
        return _kernel(value) if name == "kernel_size" else checks.share(name, value, zero=name != "budget")

    @property
    def scores(self) -> np.ndarray:
        """The raw scores as the page has them, `[layers, heads, n - window]` float32."""
        values = np.frombuffer(self._scores, dtype="<f2").astype(np.float32)
        return np.ldexp(values, -self._exponent).reshape(self._shape)

    def kept_mask(self) -> np.ndarray:
        """Which entries each head keeps, `[layers, heads, n]` bool.

        Raises:
            RuntimeError: no page has shown the widget yet.
        """
        if not self.kept:
            raise RuntimeError("kept is filled by the page: show the widget first")
        layers, heads, m = self._shape
        bits = np.frombuffer(self.kept, dtype=np.uint8).reshape(layers, heads, -1)
        return np.unpackbits(bits, axis=-1, count=m + self.window).astype(bool)

    def describe(self) -> str:
        layers, heads, m = self._shape
        n = m + self.window
        who = "Ada-KV" if self.allocator == "adaptive" else "uniform budgets"
        pooled = "no pooling" if self.pooling == "none" else f"{self.pooling} pooling over {self.kernel_size}"
        full = layers * heads * n * self.bytes_per_entry
        return (
            f"BudgetExplorer: {layers} {'layer' if layers == 1 else 'layers'} of {heads} KV heads over {n:,} "
            f"entries, budget {self.budget:.0%} by {who} (safeguard {self.safeguard:.0%}, {pooled}, "
            f"recent window {self.window}); the full cache is {full:,} bytes."
        )


def _kernel(size: Any) -> int:
    if checks.whole("kernel_size", size, 1, 31) % 2 == 0:
        raise ValueError(f"kernel_size must be odd, in [1, 31], got {size}")
    return int(size)


def _pack(raw: np.ndarray) -> tuple[np.ndarray, int]:
    """Half floats of raw * 2**exponent, the largest near 2**15: eleven decades below stay distinct from 0."""
    top = float(raw.max())
    exponent = 14 - int(np.frexp(top)[1]) if top > 0 else 0
    return np.ldexp(raw, exponent).astype("<f2") + np.float16(0), exponent


def _answer(i: int, answer: Mapping[str, Any]) -> dict[str, Any]:
    missing = {"budget", "right", "asked"} - set(answer)
    if missing:
        raise ValueError(f"answers[{i}] must have budget, right and asked, got {sorted(answer)}")
    share = checks.share(f"answers[{i}] budget", answer["budget"], zero=False)
    asked = checks.whole(f"answers[{i}] asked", answer["asked"], 1)
    right = checks.whole(f"answers[{i}] right", answer["right"], 0, asked)
    allocator = checks.one_of(f"answers[{i}] allocator", answer.get("allocator", "adaptive"), ALLOCATORS)
    text = f"at {share:.0%} the model answers {right} of {asked} right"
    if answer.get("text"):
        text += f" ({answer['text']})"
    return {"share": share, "right": right, "asked": asked, "allocator": allocator, "text": text}
