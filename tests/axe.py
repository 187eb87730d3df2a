"""What keeps some reader out of a page: what axe-core finds, and text too faint for its ground."""

from __future__ import annotations

from typing import Any

from axe_playwright_python.base import AXE_SCRIPT

# Docutils gives its list of citations entries whose role, doc-biblioentry, axe does not take for that of an item.
LEAVE_OUT = (".citation-list",)
COLOURS, MODERATE = ("color-contrast", "link-in-text-block"), ("region",)  # what takes axe longest
RUN = """async ([leaveOut, leftOut]) => {
  const rules = Object.fromEntries(leftOut.map((rule) => [rule, { enabled: false }]));
  const options = { preload: false, resultTypes: ["violations"], rules };
  const { violations } = await axe.run({ exclude: leaveOut.map((one) => [one]) }, options);
  return violations.filter(({ impact }) => impact === "serious" || impact === "critical")
    .flatMap(({ id, help, nodes }) => nodes.map(({ target, html }) => `${id}: ${help}: ${target} ${html.slice(0, 120)}`));
}"""
# Colours that are on their way from one theme to another are judged where they end.
ARRIVE = """() => {
  const ends = (one) => one.playState === "running" && one.effect.getComputedTiming().endTime < Infinity;
  for (let round = 0, moving; round < 9 && (moving = document.getAnimations().filter(ends)).length; round++) {
    for (const one of moving) one.finish(); // which may set out what inherits the colour
  }
}"""
FAINT = """(within) => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const known = new Map();
  const read = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const rgb = (color) => known.get(color) ?? known.set(color, read(color)).get(color);
  const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const over = (ink, ground, share) => ground.map((under, i) => share * ink[i] + (1 - share) * under);
  const ground = (node) => {
    if (!node) return [255, 255, 255];
    const color = rgb(getComputedStyle(node).backgroundColor);
    return color[3] === 255 ? color.slice(0, 3) : over(color, ground(node.parentElement), color[3] / 255);
  };
  const opacity = (node) => (node ? getComputedStyle(node).opacity * opacity(node.parentElement) : 1);
  const faint = [];
  for (const node of document.querySelectorAll(`${within} *`)) {
    const text = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    const seen = node.checkVisibility({ visibilityProperty: true, opacityProperty: true });
    if (!text || !seen || node.closest("script, style, option, mjx-container, .hk-hidden, :disabled")) continue;
    const [ink, under] = [rgb(getComputedStyle(node).color), ground(node)];
    const [a, b] = [light(over(ink, under, (ink[3] / 255) * opacity(node))), light(under)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) faint.push(`${node.className} "${node.textContent.slice(0, 20)}" ${ratio.toFixed(2)}`);
  }
  return faint;
}"""


def findings(page: Any, *, colours: bool = True) -> list[str]:
    """Findings of impact serious or critical; without `colours` in a third of the time."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE_SCRIPT)
    page.evaluate(ARRIVE)
    return page.evaluate(RUN, [LEAVE_OUT, MODERATE if colours else COLOURS + MODERATE])


def faint(page: Any, within: str = "body") -> list[str]:
    """Text with a contrast below 4.5 to the colour behind it: signs too, and on stripes, which axe does not judge."""
    page.evaluate(ARRIVE)
    return page.evaluate(FAINT, within)
