"""Who may know whom: the import arrows of the package, and what `import headkv` costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "headkv"

# A part of the package may import itself, the helpers `headkv._*`, and these (for type checkers: anything).
TENSORS = {"cache", "attention", "scorers", "allocators", "heads", "methods"}
ARROWS = {
    "data": set(),
    "cache": set(),
    "attention": {"cache"},
    "scorers": set(),
    "allocators": set(),
    "heads": {"data"},
    "methods": {"scorers", "allocators", "heads"},
    "models": set(),
    "integrations": TENSORS - {"allocators", "heads"},
    "evaluation": TENSORS | {"data", "models", "integrations"},
    "widgets": set(),
}


def imports(tree: ast.AST, *, eager: bool) -> Iterator[str]:
    """Dotted names that a module imports: all of them, or only those that run when it is loaded (eager)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for branch in node.orelse:
                yield from imports(branch, eager=eager)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (eager and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            yield from imports(node, eager=eager)


def modules(part: str) -> list[Path]:
    return sorted((PACKAGE / part).rglob("*.py"))


def part_of(name: str, lazy: dict[str, str]) -> str | None:
    """The part of headkv that a dotted name belongs to; None for a helper, or for another package."""
    first, _, rest = name.partition(".")
    if first != "headkv" or not rest:
        return None
    head = rest.split(".")[0]
    home = lazy.get(head, f"headkv.{head}").split(".")[1]
    return None if home.startswith("_") else home


@pytest.fixture(scope="module")
def lazy() -> dict[str, str]:
    """Where each public name of `headkv` lives."""
    import headkv

    return headkv._HOME


def test_every_part_is_listed() -> None:
    parts = {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()}
    assert parts <= ARROWS.keys(), "a new part needs its arrows here, and in the README's tree"


@pytest.mark.parametrize("part", ARROWS)
def test_arrows_point_one_way(part: str, lazy: dict[str, str]) -> None:
    wrong = [
        f"{module.relative_to(ROOT)} imports {name}"
        for module in modules(part)
        for name in imports(ast.parse(module.read_text()), eager=False)
        if part_of(name, lazy) not in {None, part, *ARROWS[part]}
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("part", sorted(TENSORS))
def test_part_loads_with_torch_alone(part: str) -> None:
    """What is imported inside a function is free."""
    wrong = [
        f"{module.relative_to(ROOT)} imports {name} when it is loaded"
        for module in modules(part)
        for name in imports(ast.parse(module.read_text()), eager=True)
        if name.split(".")[0] not in {"headkv", "torch", *sys.stdlib_module_names}
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_never_import_headkv() -> None:
    folder = ROOT / "kernels"
    wrong = [
        f"{module.relative_to(ROOT)} imports {name}"
        for module in folder.rglob("*.py")
        if "build" not in module.relative_to(folder).parts
        for name in imports(ast.parse(module.read_text()), eager=False)
        if name.split(".")[0] == "headkv"
    ]
    assert not wrong, "\n".join(wrong)


USE = """
import json, sys, time
import torch
loaded = set(sys.modules)
begin = time.perf_counter()
import headkv
layer = headkv.RaggedLayer.from_rows([[(torch.randn(3, 4), torch.randn(3, 4))]])
headkv.ragged_decode(torch.randn(1, 2, 4), layer, backend="reference")
headkv.AdaKV(budget=0.2), headkv.SnapKVScorer()
seconds = time.perf_counter() - begin
print(json.dumps([seconds, sorted({name.split(".")[0] for name in set(sys.modules) - loaded})]))
"""


def test_import_needs_torch_alone_and_is_quick() -> None:
    """Not only `import headkv`: a layer, attention over it and a method too, with nothing else installed."""
    run = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    seconds, loaded = json.loads(run.stdout)
    # What torch loads on first use, numpy among it, is torch's; headkv adds itself and the standard library.
    foreign = set(loaded) - sys.stdlib_module_names - {"headkv", "torch", "numpy"}
    assert not {name for name in foreign if not name.startswith("_")}, loaded
    assert seconds < 2
