"""The version of this copy of headkv. It is written in Cargo.toml, and nowhere else."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def find_version(package: Path) -> str:
    """The version of the package in the folder `package`: of its checkout, or else of what is installed.

    A checkout need not be installed, and another version may be, so it is asked first. "unknown" if neither is there.
    """
    manifest = package.parent / "Cargo.toml"
    if manifest.is_file():
        found = re.search(r'^version = "(.+)"', manifest.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1]
    try:
        return version("headkv")
    except PackageNotFoundError:
        return "unknown"
