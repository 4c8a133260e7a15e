"""The check of distributions, on archives made by hand."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.package.contents import ROOT, package_files, sdist_faults, wheel_faults

METADATA = [f"sealign-1.0.dist-info/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt")]
LICENCE = "sealign-1.0.dist-info/licenses/LICENSE"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("src/sealign/__init__.py", "src/sealign/py.typed", "src/sealign/page/page.css"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "src/sealign/__pycache__").mkdir()
    (tmp_path / "src/sealign/__pycache__/__init__.cpython-311.pyc").touch()
    return tmp_path


def write_wheel(folder: Path, names: list[str]) -> Path:
    file = folder / "sealign-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return file


def write_sdist(folder: Path, names: list[str]) -> Path:
    file = folder / "sealign-1.0.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(f"sealign-1.0/{name}"), io.BytesIO())
    return file


def test_a_whole_wheel_has_no_fault(root: Path) -> None:
    package = ["sealign/__init__.py", "sealign/py.typed", "sealign/page/page.css"]
    assert wheel_faults(write_wheel(root, [*package, *METADATA, LICENCE]), root) == []


def test_what_is_missing_in_a_wheel_and_what_should_not_be_there_are_named(root: Path) -> None:
    wheel = write_wheel(root, ["sealign/__init__.py", "sealign/py.typed", "tests/conftest.py", *METADATA])
    assert wheel_faults(wheel, root) == [
        f"{wheel.name} lacks {LICENCE}",
        f"{wheel.name} lacks sealign/page/page.css",
        f"{wheel.name} has tests/conftest.py, which does not belong there",
    ]


def test_a_source_distribution_has_the_sources_and_no_tests(root: Path) -> None:
    package = [f"src/{name}" for name in package_files(root)]
    top = ["pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "PKG-INFO", ".gitignore"]
    assert sdist_faults(write_sdist(root, [*package, *top]), root) == []
    sdist = write_sdist(root, [*package[1:], *top, "tests/conftest.py"])
    assert sdist_faults(sdist, root) == [
        f"{sdist.name} lacks {package[0]}",
        f"{sdist.name} has tests/conftest.py, which does not belong there",
    ]


def test_the_package_has_its_types_templates_data_and_page() -> None:
    found = package_files(ROOT)
    for name in (
        "py.typed",
        "__init__.pyi",
        "figures/templates/report.html.jinja",
        "demonstrations/data/behaviours/positivity.jsonl",
        "playground/page/index.html",
    ):
        assert f"sealign/{name}" in found
