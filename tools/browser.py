"""Find a Chromium for the page tests, or try to install one: `python tools/browser.py [--install]`."""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
MAC_APPS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
HINT = "no Chromium was found; install one with: playwright install chromium   (or: apt-get install chromium)"


def find_chromium() -> str | None:
    """Path of a Chromium: `$HEADKV_CHROMIUM`, one on the path, or Playwright's own. None if there is none."""
    asked = os.environ.get("HEADKV_CHROMIUM")
    if asked:
        return asked if Path(asked).exists() else None
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or next((app for app in MAC_APPS if Path(app).exists()), None) or _playwrights_own()


def _playwrights_own() -> str | None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else None


def install_chromium() -> str | None:
    """Try Playwright's download, then (as root) the system's package; neither is an error if it fails."""
    _attempt([sys.executable, "-m", "playwright", "install", "chromium"], seconds=180)
    found = find_chromium()
    if found is None and shutil.which("apt-get") and os.geteuid() == 0:
        _attempt(["apt-get", "update", "-qq"], seconds=120)
        _attempt(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"], seconds=300)
        found = find_chromium()
    return found


def _attempt(command: list[str], seconds: int) -> None:
    print("headkv: trying", " ".join(command[-3:]), flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"headkv: that failed ({type(error).__name__})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--install", action="store_true", help="try to install one if none is found")
    options = parser.parse_args()
    found = find_chromium() or (install_chromium() if options.install else None)
    print(f"headkv: page tests use {found}" if found else f"headkv: page tests will be skipped: {HINT}")


if __name__ == "__main__":
    main()
