"""What tests share: a skip with its reason where a device is missing, and a browser that forgives nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
MOST = 1.5  # seconds until a page's first picture: all take less than one on a quiet core, which others may slow down
# Nothing is known but this machine: a request that leaves it fails, as it would without a network.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]
WIDGETS_READY = """() => {
  const views = document.querySelectorAll('script[type="application/vnd.jupyter.widget-view+json"]');
  return [...views].every(view => ['ready', 'failed'].includes(view.nextElementSibling?.dataset.state));
}"""

FIRST_READY = """() => document.readyState !== "loading" &&
  ['ready', 'failed', undefined].includes(document.querySelector(".widget-host")?.dataset.state)"""

# The browser takes requests in their order: what the page asked for before is known, or over, when this one is.
FENCE = """async () => {
  await window.MathJax?.startup?.promise;
  await document.fonts.ready;
  await (await fetch(location.href)).text();
  return true;
}"""


def computed(session: Any) -> float:
    """Seconds that a page's main thread has computed: script, layout, painting, whatever else the machine does."""
    metrics = session.send("Performance.getMetrics")["metrics"]
    return next(one["value"] for one in metrics if one["name"] == "TaskDuration")


def counting(page: Any) -> Any:
    """A session with the page's browser in which `computed` can be asked."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    return session


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason shown, where there is no CUDA device or no Triton.

    Files with slow tests come first, so that no worker waits at the end for one that has just begun such a file.
    """
    reason = _why_no_gpu() if any("gpu" in item.keywords for item in items) else None
    for item in items:
        if reason and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)


def _why_no_gpu() -> str | None:
    from importlib.util import find_spec

    if not torch.cuda.is_available():
        return "needs a CUDA device; torch sees none"
    return None if find_spec("triton") else "needs Triton: pip install triton"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium (Playwright's Browser), shared by the session; skipped where none is installed."""
    import browser as tool
    from playwright.sync_api import sync_playwright

    path = tool.find_chromium()
    if path is None:
        pytest.skip(tool.HINT)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield launched
        launched.close()


def _seconds_to_first_picture(page: Any, session: Any, address: str) -> float:
    """Goes there; computing until the first widget is drawn, 0 on a page without one."""
    page.goto(address, wait_until="commit")
    page.wait_for_function(FIRST_READY)
    return computed(session) if page.locator(".widget-host").count() else 0.0


def _alone(chromium: Any, screen: dict[str, Any], address: str) -> float:
    """The same in a browser that has seen nothing yet."""
    with chromium.new_context(**screen) as context:
        page = context.new_page()
        return _seconds_to_first_picture(page, counting(page), address)


@pytest.fixture(scope="session")
def serve_folder() -> Callable[[Path], AbstractContextManager[str]]:
    """`with serve_folder(folder) as address:` serves the folder on localhost, on a free port."""
    from serve import make_server

    @contextmanager
    def serve(folder: Path) -> Iterator[str]:
        with make_server(folder) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}"
            server.shutdown()

    return serve


@pytest.fixture
def page_checker(chromium: Any) -> Callable[..., AbstractContextManager[Any]]:
    """`with page_checker(address, "cost.html") as page:` opens a page, widgets ready, and hands it over.

    On leaving, the test fails for any request that left the local server, any answer of 400 or more, any
    console error and any uncaught exception, all from the first byte on, and for a first picture that takes `MOST`
    seconds of computing. `theme` is "light" or "dark"; `touch` makes it a phone.
    """

    @contextmanager
    def check(
        address: str,
        path: str = "index.html",
        *,
        width: int = 1280,
        theme: str = "light",
        touch: bool = False,
    ) -> Iterator[Any]:
        faults: list[str] = []
        pending: set[Any] = set()
        screen = {"viewport": {"width": width, "height": 900}, "has_touch": touch, "is_mobile": touch}
        context = chromium.new_context(**screen, color_scheme=theme)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda m: faults.append(f"console: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(f"uncaught: {error}"))
        page.on("response", lambda r: faults.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
        page.on("requestfailed", lambda r: faults.append(f"failed: {r.url}"))
        page.on("request", lambda r: pending.add(r))
        page.on("request", lambda r: faults.extend(_leaving(r.url, address)))
        for over in ("requestfinished", "requestfailed"):
            page.on(over, lambda r: pending.discard(r))
        session = counting(page)
        try:
            seconds = _seconds_to_first_picture(page, session, f"{address}/{path}")
            if seconds > MOST:  # a busy core computes at half its speed: the least of three visits counts
                seconds = min(seconds, *(_alone(chromium, screen, f"{address}/{path}") for _ in range(2)))
            if seconds > MOST:
                faults.append(f"{seconds:.2f} s of computing until the first picture")
            page.wait_for_function(WIDGETS_READY)
            _settle(page, pending)
            yield page
            _settle(page, pending)
        finally:
            context.close()
            assert not faults, "\n".join([f"{path} ({width} px, {theme}):", *faults])

    return check


def _settle(page: Any, pending: set[Any]) -> None:
    """Waits until formulas and fonts are there, and every request that the page has made has its answer."""
    page.wait_for_load_state("load")
    page.wait_for_function(FENCE)
    while pending:
        page.wait_for_event("requestfinished")


def _leaving(url: str, address: str) -> list[str]:
    return [] if url.startswith((address, "blob:", "data:")) else [f"left the local server: {url}"]
