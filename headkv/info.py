"""What runs here: versions, backends, and what is missing with the line that installs it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from headkv.cache import rust, triton

PACKAGES = ("torch", "transformers", "triton", "headkv-kernels", "numpy", "matplotlib", "anywidget")
OPTIONAL = {
    # what it is for -> (modules, how to install them)
    "plots": (("matplotlib",), "pip install 'headkv[plots]'"),
    "widgets": (("anywidget", "ipywidgets"), "pip install 'headkv[widgets]'"),
    "eval": (("lm_eval", "pyarrow"), "pip install 'headkv[eval]'"),
    "eval on several workers": (("ray",), "pip install 'headkv[ray]'"),
}


def info(headkv_version: str) -> dict[str, Any]:
    """Plain values: `versions` (None where a package is missing), `backends`, `missing`.

    `backends` says of each whether it is `available`, and a `detail`: the instruction sets of the Rust backend, the
    best first, or the cards of the Triton backend; of one that is not available, why. `missing` maps what can not be
    done to the line that installs what it needs.
    """
    versions: dict[str, str | None] = {"headkv": headkv_version, "python": platform.python_version()}
    versions |= {"platform": platform.platform(), **{name: _version(name) for name in PACKAGES}}
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    isas = rust.extension().instruction_sets() if rust.available() else []
    kernels = all(find_spec(module) is not None for module in ("headkv_kernels", "triton"))
    why = "torch sees no CUDA device" if not cards else "headkv-kernels or triton is not installed"
    backends = {
        "reference": _backend(True, "plain torch, on any device"),
        "rust": _backend(rust.available(), ", ".join(isas) or "the compiled extension is not there"),
        "triton": _backend(
            triton.available(), (", ".join(cards) or "Triton's interpreter") if triton.available() else why
        ),
    }
    missing = {}
    if not rust.available():
        missing["rust backend (fast on a CPU)"] = rust.INSTALL
    if cards and not kernels:
        missing["triton backend (fast on a GPU)"] = triton.INSTALL
    for purpose, (modules, line) in OPTIONAL.items():
        if any(find_spec(module) is None for module in modules):
            missing[purpose] = line
    return {"versions": versions, "backends": backends, "missing": missing}


def as_text(found: dict[str, Any]) -> str:
    """What `info` found, for reading."""
    lines = [f"{name:15} {value or '-'}" for name, value in found["versions"].items()]
    lines += ["", "backends"]
    for name, backend in found["backends"].items():
        lines.append(f"  {name:13} {'yes' if backend['available'] else 'no '}  {backend['detail']}")
    lines += ["", "missing" if found["missing"] else "nothing is missing"]
    lines += [f"  {what}: {line}" for what, line in found["missing"].items()]
    return "\n".join(lines)


def _backend(available: bool, detail: str) -> dict[str, Any]:
    return {"available": available, "detail": detail}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
