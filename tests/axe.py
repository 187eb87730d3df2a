"""What axe-core finds in a page that keeps some reader out."""

from __future__ import annotations

from typing import Any

from axe_playwright_python.base import AXE_SCRIPT

RUN = """async (leaveOut) => {
  const { violations } = await axe.run({ exclude: leaveOut.map((one) => [one]) }, { resultTypes: ["violations"] });
  return violations.filter(({ impact }) => impact === "serious" || impact === "critical")
    .flatMap(({ id, help, nodes }) => nodes.map(({ target, html }) => `${id}: ${help}: ${target} ${html.slice(0, 120)}`));
}"""


def findings(page: Any, leave_out: tuple[str, ...] = ()) -> list[str]:
    """Findings of impact serious or critical, outside what the selectors `leave_out` name."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE_SCRIPT)
    return page.evaluate(RUN, list(leave_out))
