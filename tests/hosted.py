"""A widget in a real Chromium, hosted by the plain contract `render({model, el})` and nothing else."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

HOST = """
const bytes = (text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
const state = JSON.parse(document.getElementById("state").textContent,
  (_, value) => typeof value?.bytes === "string" ? bytes(value.bytes) : value);
const handlers = {};
const same = (a, b) => a === b || (!(a instanceof DataView) && JSON.stringify(a) === JSON.stringify(b));
window.model = {
  saves: 0,
  get: (name) => state[name],
  set(name, value) {
    if (same(state[name], value)) return;
    state[name] = value;
    [...(handlers[`change:${name}`] ?? [])].forEach((handler) => handler());
  },
  save_changes() { this.saves += 1; },
  on(event, handler) { (handlers[event] ??= []).push(handler); },
  off(event, handler) { handlers[event] = (handlers[event] ?? []).filter((other) => other !== handler); },
  watched: () => Object.values(handlers).flat().length,
};
const source = new Blob([document.getElementById("module").textContent], { type: "text/javascript" });
const module = await import(URL.createObjectURL(source));
window.stop = await module.default.render({ model, el: document.getElementById("widget") });
window.ready = true;
"""


def page_of(widget: Any, theme: str) -> str:
    """A page that hosts one widget."""
    state = {
        name: {"bytes": base64.b64encode(value).decode()} if isinstance(value, bytes) else value
        for name, value in widget.get_state().items()
        if name not in ("_esm", "_css", "layout")
    }
    inline = json.dumps(state).replace("</", "<\\/")
    return f"""<!doctype html><html lang="en" data-theme="{theme}"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{type(widget).__name__}</title>
<link rel="icon" href="data:,">
<style>body {{ margin: 8px }}</style><style>{widget._css}</style><div id="widget"></div>
<script type="application/json" id="state">{inline}</script>
<script type="text/plain" id="module">{widget._esm}</script><script type="module">{HOST}</script></html>"""


@dataclass
class Shown:
    """A hosted widget: the page, and what its model says."""

    page: Any

    def get(self, name: str) -> Any:
        return self.page.evaluate("(name) => model.get(name)", name)

    def set(self, **values: Any) -> None:
        self.page.evaluate("(all) => Object.entries(all).forEach(([k, v]) => model.set(k, v))", values)

    def state(self) -> dict[str, Any]:
        return json.loads(self.page.locator("script.hk-state").text_content())

    def settled(self, milliseconds: int = 160) -> None:
        """Until timers that are due by then have run: the page's own clock, which a busy machine makes late with them."""
        self.page.evaluate("(due) => new Promise((done) => setTimeout(done, due))", milliseconds)

    def kept(self, heads: tuple[int, int], n: int) -> np.ndarray:
        """All masks `[layers, heads, n]`, once the page has sent those of the present setting."""
        self.settled()
        data = self.page.evaluate("Array.from(new Uint8Array(model.get('kept').buffer))")
        packed = np.array(data, dtype=np.uint8).reshape(*heads, -1)
        return np.unpackbits(packed, axis=-1, count=n).astype(bool)


@contextmanager
def shown(
    chromium: Any, widget: Any, *, width: int = 1000, theme: str = "light", touch: bool = False
) -> Iterator[Shown]:
    """Host `widget`; fails on any console error and on any request that leaves the page. `touch`: as on a phone."""
    page = chromium.new_page(
        viewport={"width": width, "height": 900},
        reduced_motion="no-preference",
        has_touch=touch,
        is_mobile=touch,
    )
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))

    def answer(route: Any) -> None:
        if route.request.url == "http://widget.invalid/":
            return route.fulfill(body=page_of(widget, theme), content_type="text/html")
        wrong.append(f"asked for {route.request.url}")
        return route.abort()

    page.route("http*://**", answer)
    page.goto("http://widget.invalid/")
    page.wait_for_function("window.ready === true")
    yield Shown(page)
    page.close()
    assert wrong == []
