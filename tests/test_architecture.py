"""What `import headkv` costs, and that wrong import arrows are found."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "headkv"

# What loads with torch alone. Who may import whom stands in .importlinter, which `make lint` runs.
TENSORS = ("logits.py", "prefill.py", "cache", "attention", "scorers", "allocators", "heads", "methods")


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
    path = PACKAGE / part
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("part", TENSORS)
def test_part_loads_with_torch_alone(part: str) -> None:
    """What is imported inside a function is free."""
    wrong = [
        f"{module.relative_to(ROOT)} imports {name} when it is loaded"
        for module in modules(part)
        for name in imports(ast.parse(module.read_text()), eager=True)
        if name.split(".")[0] not in {"headkv", "torch", *sys.stdlib_module_names}
    ]
    assert not wrong, "\n".join(wrong)


def test_both_lists_of_public_names_agree() -> None:
    """`headkv/__init__.py` says every name twice: for type checkers, and where it is loaded from."""
    import headkv

    checked = {
        alias.asname: f"{node.module}"
        for block in ast.parse((PACKAGE / "__init__.py").read_text()).body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert checked.pop("widgets") == "headkv"
    assert checked == headkv._HOME
    assert all(getattr(headkv, name) is not None for name in headkv.__all__)


CIRCLE = {
    "up": ("headkv/logits.py", "from headkv.cache.rows import Rows\n"),
    "for type checkers alone": ("headkv/cache/rows.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from headkv.cache.ragged import RaggedLayer\n"),
    "the root": ("headkv/scorers/base.py", "import headkv\n"),
    "kernels": ("kernels/headkv_kernels/rows.py", "import headkv.logits\n"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("path, line", CIRCLE.values(), ids=CIRCLE)
def test_a_wrong_arrow_is_found(path: str, line: str, tmp_path: Path) -> None:
    """The contracts of .importlinter see what they are for."""
    pytest.importorskip("importlinter")
    for folder in ("headkv", "kernels/headkv_kernels"):
        shutil.copytree(
            ROOT / folder,
            tmp_path / folder,
            ignore=shutil.ignore_patterns("*.so", "__pycache__", "static"),
        )
    shutil.copy(ROOT / ".importlinter", tmp_path)
    module = tmp_path / path
    module.write_text(
        module.read_text().replace(
            "from __future__ import annotations\n", f"from __future__ import annotations\n{line}", 1
        )
    )
    found = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{tmp_path / 'kernels'}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 1 and "BROKEN" in found.stdout, found.stdout + found.stderr


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
