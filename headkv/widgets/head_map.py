"""The heads by any profile, and for the chosen one: where it looks in a text, and what methods keep of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import traitlets as t

from headkv.widgets import checks
from headkv.widgets.base import Buffer, Picture, bundle
from headkv.widgets.spans import spans

STEPS = 65535  # of a weight from 0 to 1


class HeadMap(Picture):
    """A grid of heads, the chosen head's attention on the text, and what each method keeps of it.

    Args:
        profiles: for each, by its name, its scores `[layers, heads]`, one a KV head; the first is shown first.
        attention: of the tokens that look, `[layers, heads, n]`, in [0, 1]: one weight an entry.
        tokens: the text, as n strings.
        kept: for each method, by its name, the entries that it keeps, `[layers, heads, n]` bool.
        facts: `(start, end)` or `(start, end, label)` ranges of entries to underline, end excluded.
        looking: who looks, in words.
        selected: the chosen (layer, head).
        title: a line above the picture.

    Attributes:
        selected: `[layer, head]`, kept in step with the page.
        profile: which one the grid shows, by its place in `names`; likewise.
        method: whose kept entries the text shows, by its place in `methods`, or -1 for all entries; likewise.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example:
        >>> HeadMap({"induction": [[0.9, 0.1]]}, [[[0.2, 0.8], [0.5, 0.5]]], ["is ", "7"],
        ...         kept={"SnapKV": [[[False, True], [True, False]]]})
        HeadMap: 1 layer of 2 KV heads, 2 entries; layer 0, head 0 looks most at '7' (0.80). SnapKV keeps 1, 80% of it.
    """

    _esm = bundle("head_map.js")

    _shape = t.List(t.Int()).tag(sync=True)
    names = t.List(t.Unicode()).tag(sync=True)
    _scores: t.List[Any] = t.List().tag(sync=True)
    _attention = Buffer().tag(sync=True)
    _kept = Buffer().tag(sync=True)
    methods = t.List(t.Unicode()).tag(sync=True)
    tokens = t.List(t.Unicode()).tag(sync=True)
    facts: t.List[Any] = t.List().tag(sync=True)
    looking = t.Unicode().tag(sync=True)
    profile = t.Int().tag(sync=True)
    method = t.Int().tag(sync=True)
    selected = t.List(t.Int()).tag(sync=True)
    title = t.Unicode().tag(sync=True)

    def __init__(
        self,
        profiles: Mapping[str, Any],
        attention: Any,
        tokens: Sequence[str],
        *,
        kept: Mapping[str, Any] | None = None,
        facts: Sequence[Sequence[Any]] | None = None,
        looking: str = "the last token",
        selected: tuple[int, int] = (0, 0),
        title: str | None = None,
    ) -> None:
        if not profiles:
            raise ValueError("profiles must hold one list of scores or more, got none")
        weights = checks.array("attention", attention, ndim=(3,))
        if weights.min() < 0 or weights.max() > 1:
            raise ValueError(f"attention must lie in [0, 1], got {weights.min():g} to {weights.max():g}")
        layers, heads, n = weights.shape
        scores = {name: checks.array(f"scores of {name!r}", x, ndim=(2,)) for name, x in profiles.items()}
        for name, array in scores.items():
            if array.shape != (layers, heads):
                raise ValueError(f"scores of {name!r} must be {[layers, heads]}, got {list(array.shape)}")
        masks = {
            name: checks.array(f"kept of {name!r}", mask, ndim=(3,)).astype(bool)
            for name, mask in (kept or {}).items()
        }
        for name, mask in masks.items():
            if mask.shape != weights.shape:
                raise ValueError(f"kept of {name!r} must be {[layers, heads, n]}, got {list(mask.shape)}")
        super().__init__(
            _shape=[layers, heads, n],
            names=list(scores),
            _scores=[array.round(6).tolist() for array in scores.values()],
            _attention=(weights * STEPS).round().astype("<u2").tobytes(),
            _kept=b"".join(np.packbits(mask, axis=-1).tobytes() for mask in masks.values()),
            methods=list(masks),
            tokens=checks.strings("tokens", tokens, n),
            facts=spans(facts, n),
            looking=looking,
            profile=0,
            method=-1,
            selected=checks.pair("selected", selected, (layers, heads)),
            title=title or "",
        )

    @t.validate("profile", "method", "selected")
    def _as_described(self, proposal: Any) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        if name == "selected":
            return checks.pair(name, value, (self._shape[0], self._shape[1]))
        low, most = (0, len(self.names) - 1) if name == "profile" else (-1, len(self.methods) - 1)
        return checks.whole(name, value, low, most)

    @property
    def attention(self) -> np.ndarray:
        """The weights as the page has them, `[layers, heads, n]` float32."""
        return (np.frombuffer(self._attention, "<u2") / np.float32(STEPS)).reshape(self._shape)

    def kept_mask(self, method: str) -> np.ndarray:
        """What a method keeps, `[layers, heads, n]` bool."""
        at = self.methods.index(checks.one_of("method", method, tuple(self.methods)))
        bits = np.frombuffer(self._kept, np.uint8).reshape(len(self.methods), *self._shape[:2], -1)[at]
        return np.unpackbits(bits, axis=-1, count=self._shape[2]).astype(bool)

    def describe(self) -> str:
        layers, heads, n = self._shape
        layer, head = self.selected
        look = self.attention[layer, head]
        best = int(look.argmax())
        said = (
            f"HeadMap: {layers} {'layer' if layers == 1 else 'layers'} of {heads} KV heads, {n:,} entries; "
            f"layer {layer}, head {head} looks most at {self.tokens[best].strip()!r} ({look[best]:.2f})."
        )
        for method in self.methods:
            mask = self.kept_mask(method)[layer, head]
            said += f" {method} keeps {mask.sum():,}, {look[mask].sum() / max(look.sum(), 1e-9):.0%} of it."
        return said
