"""A reader who tries all that the widgets of a page offer, by keys or with a finger."""

from __future__ import annotations

import time
from typing import Any

from playwright.sync_api import TimeoutError

HANDS = """() => {
  const CONTROLS = "input, select, button, summary, [role=gridcell]";
  const tried = new Set();
  let control, checked, root, before, value;

  const nameOf = (node) => {
    const spoken = node.matches("summary, .hk-button") ? node.textContent : null;
    const kind = node.dataset.control ?? spoken ?? node.role ?? node.classList[0] ?? node.localName;
    return `${[...document.querySelectorAll(".hk")].indexOf(node.closest(".hk"))} ${kind}`;
  };
  const usable = (node) => !node.disabled && node.checkVisibility() && node.getBoundingClientRect().width > 0;
  const chosen = (node) => node.checked || node.ariaPressed === "true" || node.ariaSelected === "true";
  const middle = (node) => {
    node.scrollIntoView({ block: "center" });
    const { left, top, width, height } = node.getBoundingClientRect();
    return [left + width / 2, top + height / 2];
  };
  const uncovered = (node) => {
    const at = document.elementFromPoint(...middle(node));
    return at === node || node.contains(at);
  };
  // What the widget shows, but for the control itself and what is only said, noted or pointed at.
  const look = () => {
    const copy = root.cloneNode(true);
    copy.querySelectorAll(".hk-tip, script, [role=status]").forEach((node) => node.remove());
    const own = control.isConnected ? control.closest(".hk-control")?.outerHTML : "";
    return own ? copy.innerHTML.replace(own, "") : copy.innerHTML;
  };

  const arrows = ["ArrowRight", "ArrowLeft", "ArrowUp", "ArrowDown"];
  const keysFor = (node) =>
    node.matches("input, [role=gridcell], .hk-dot") ? [...arrows, "Home", "End", "Enter"] : ["Enter"];

  /** The next control that was not tried: where it is, which keys may move it. */
  window.nextControl = (finger) => {
    const open = [...document.querySelectorAll(".hk")].flatMap((one) => [...one.querySelectorAll(CONTROLS)])
      .filter((node) => usable(node) && !tried.has(nameOf(node)));
    if (!open.length) return null;
    const name = nameOf(open[0]);
    tried.add(name);
    const same = open.filter((node) => nameOf(node) === name);
    const roving = same.find((node) => node.tabIndex === 0 && node.matches("[role=gridcell], .hk-dot"));
    checked = same.find((node) => node.checked);
    control = finger
      ? same.find((node) => !chosen(node) && uncovered(node)) ?? same[0]
      : roving ?? same.find((node) => (node.type === "radio") === Boolean(node.checked) && node.ariaPressed !== "true") ?? same[0];
    root = control.closest(".hk");
    const at = middle(control);
    if (!finger) control.focus();
    [before, value] = [look(), control.value];
    const { left, width } = control.getBoundingClientRect();
    return {
      name: `${root.className} ${name}`, kind: control.type ?? control.localName, at, keys: keysFor(control),
      span: [left, left + width], share: (control.value - control.min) / (control.max - control.min),
      options: [...(control.options ?? [])].map((option) => option.value).filter((value) => value !== control.value),
    };
  };
  window.reacted = () => look() !== before;
  window.focusIsSeen = async () => {
    for (const _ of "12") await new Promise(requestAnimationFrame); // what was hidden or disabled has lost the focus
    const focus = document.activeElement;
    if (!root.contains(focus) || !focus.matches(":focus-visible")) return false;
    const ring = (node) => node && getComputedStyle(node).outlineStyle !== "none";
    return focus.type === "range" || ring(focus) || ring(focus.nextElementSibling); // a range draws it round its thumb
  };
  window.choose = (value) => {
    control.value = value;
    control.dispatchEvent(new Event("change", { bubbles: true }));
  };
  /** What was chosen may leave others without an effect. */
  window.goBack = () => {
    if (control.type === "radio") checked?.click();
    if (control.localName === "select") choose(value);
  };
}"""

PICTURES = (
    "bill-bar", "column", "curve", "grid", "lines-frame", "pool-slots", "range", "rank-plot", "strip", "timeline-rows",
    "track", "weight-set", "work-plot",
)  # fmt: skip
TOLD = (
    "[data-tip]",
    "[role=gridcell]",
    ".hk-dot",
    ".hk-track",
    "[data-rank]",
    ".hk-strip .hk-token",
    ".hk-segment",
)
FIND = """async (which) => {
  const found = [...document.querySelectorAll(`.hk ${which}`)].find((node) => node.checkVisibility());
  if (!found) return null;
  found.scrollIntoView({ block: "center" });
  await new Promise(requestAnimationFrame);
  const { left, top, width, height } = found.getBoundingClientRect();
  window.picture = found;
  return [left + width / 2, top + height / 2];
}"""


def try_controls(page: Any, *, finger: bool = False) -> list[str]:
    """Work one control of each kind in each widget; answers those to which the picture does not react.

    By keys the focus has to stay in sight as well. A finger drags sliders; what a list offers is drawn by the system,
    so that the choice itself is made for it.
    """
    page.evaluate(HANDS)
    silent = []
    touch = page.context.new_cdp_session(page) if finger else None
    while control := page.evaluate("(finger) => nextControl(finger)", finger):
        for act in _acts(page, touch, control):
            act()
            if page.evaluate("reacted()"):
                break
        else:
            try:
                page.wait_for_function("reacted()", timeout=1500)
            except TimeoutError:
                silent.append(f"{control['name']}: nothing changes")
        if not finger and not page.evaluate("focusIsSeen()"):
            silent.append(f"{control['name']}: the focus is lost")
        page.evaluate("goBack()")
    return silent


def _acts(page: Any, touch: Any, control: dict[str, Any]) -> list[Any]:
    """What may move a control, one after the other."""
    if control["kind"] == "select-one":
        return [
            lambda value=value: page.evaluate("(value) => choose(value)", value)
            for value in control["options"]
        ]
    if touch is None:
        return [lambda key=key: page.keyboard.press(key) for key in control["keys"]]
    x, y = control["at"]
    if control["kind"] == "range":
        left, right = control["span"]
        to = left + (right - left) * (0.2 if control["share"] > 0.5 else 0.8)
        start = left + 10 + (right - left - 20) * control["share"]
        return [lambda: swipe(touch, (start, y), (to, y))]
    typed = ("ControlOrMeta+a", "7", "Enter") if control["kind"] == "number" else ()
    return [lambda: page.touchscreen.tap(x, y), *(lambda key=key: page.keyboard.press(key) for key in typed)]


def without_way_past(page: Any) -> list[str]:
    """Pictures at which a finger that goes upward moves neither them nor the page, or turns a slider."""
    touch = page.context.new_cdp_session(page)
    page.evaluate("document.body.style.paddingBottom = '2000px'")
    stuck = []
    for name in PICTURES:
        if not (at := page.evaluate(FIND, f".hk-{name}")):
            continue
        before = page.evaluate("[scrollY + picture.scrollTop, picture.value]")
        swipe(touch, at, (at[0], at[1] - 120))
        for _ in range(40):  # a busy page scrolls late
            page.wait_for_timeout(25)
            moved, value = page.evaluate("[scrollY + picture.scrollTop, picture.value]")
            if moved - before[0] >= 20:
                break
        if moved - before[0] < 20 or value != before[1]:
            stuck.append(name)
    return stuck


def told_to_the_mouse_alone(page: Any) -> list[str]:
    """Things that say something where the mouse stands on them, and not when they are tapped."""
    alone = []
    for which in TOLD:
        if not (at := page.evaluate(FIND, which)):
            continue
        page.mouse.move(*at)
        told = page.locator(".hk-tip").is_visible()
        page.mouse.move(0, 0)
        if told:
            page.touchscreen.tap(*at)
            if not page.locator(".hk-tip").is_visible():
                alone.append(which)
    return alone


def swipe(touch: Any, start: tuple[float, float], end: tuple[float, float], steps: int = 5) -> None:
    """One finger goes from `start` to `end`; `touch` is a CDP session of the page."""
    for i in range(steps + 1):
        x, y = (a + (b - a) * i / steps for a, b in zip(start, end, strict=True))
        kind = "touchMove" if i else "touchStart"
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
    time.sleep(0.06)  # it rests before it leaves, so that nothing goes on by itself
    touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [{"x": end[0], "y": end[1]}]})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
