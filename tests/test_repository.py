"""What strangers read first: files in the forms that tools expect, and pages that name only what is there."""

from __future__ import annotations

import re
from pathlib import Path

import check_jsonschema
import pytest

ROOT = Path(__file__).resolve().parents[1]
FORMS = {
    "CITATION.cff": "citation-file-format",
    ".github/workflows/ci.yml": "github-workflows",
    ".github/workflows/wheels.yml": "github-workflows",
    ".github/ISSUE_TEMPLATE/config.yml": "github-issue-config",
    ".github/ISSUE_TEMPLATE/bug.yml": "github-issue-forms",
    ".github/ISSUE_TEMPLATE/chapter.yml": "github-issue-forms",
    ".github/ISSUE_TEMPLATE/method.yml": "github-issue-forms",
}
PAGES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
    "SECURITY.md",
    "kernels/README.md",
    "benchmarks/README.md",
)

COMMAND = re.compile(r"(?:^|`|run: )make ([a-z-]+)", re.MULTILINE)


def check(schema: str, file: Path) -> object:
    """0 if the file has the form; what is wrong with it is printed."""
    with pytest.raises(SystemExit) as ended:
        check_jsonschema.main(["--builtin-schema", f"vendor.{schema}", str(file)])
    return ended.value.code


@pytest.mark.parametrize(("name", "schema"), FORMS.items(), ids=FORMS.keys())
def test_form(name: str, schema: str) -> None:
    assert check(schema, ROOT / name) == 0


def test_every_form_is_checked() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / ".github").rglob("*.yml")}
    assert files | {"CITATION.cff"} == FORMS.keys()


@pytest.mark.parametrize(
    ("name", "whole", "broken"),
    [
        ("CITATION.cff", "cff-version: 1.2.0", "cff-version: 0"),
        (".github/workflows/ci.yml", "runs-on: ubuntu-24.04", "runs_on: ubuntu-24.04"),
        (".github/ISSUE_TEMPLATE/bug.yml", "type: textarea", "type: text"),
    ],
    ids=["citation", "workflow", "issue"],
)
def test_a_broken_form_is_seen(name: str, whole: str, broken: str, tmp_path: Path) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert whole in text
    (tmp_path / "form.yml").write_text(text.replace(whole, broken), encoding="utf-8")
    assert check(FORMS[name], tmp_path / "form.yml") == 1


def test_the_changelog_keeps_its_shape() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions[1:])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for release in re.split(r"^## .+$", text, flags=re.MULTILINE)[1:]:
        headings = re.findall(r"^### (.+)$", release, re.MULTILINE)
        assert set(headings) <= kinds and len(headings) == len(set(headings))


@pytest.mark.parametrize("page", [*PAGES, ".github/workflows/ci.yml", ".github/ISSUE_TEMPLATE/method.yml"])
def test_what_a_page_names_is_there(page: str) -> None:
    """Every `make` target, and every path in backticks that begins with a folder of ours."""
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(COMMAND.findall(text)) <= targets
    folders = "|".join(
        path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    paths = re.findall(rf"`((?:{folders})/[\w./-]*)`", text)
    missing = [path for path in paths if not (ROOT / path).exists() and "your_" not in path]
    assert not missing
