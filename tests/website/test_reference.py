"""The pages of the interface against the names that the modules have at run time."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import sealign
from website.reference import reference_pages

PACKAGE = Path(sealign.__file__).parent
PAGES = reference_pages(PACKAGE)
MODULES = ["sealign", *(f"sealign.{path.parent.name}" for path in sorted(PACKAGE.glob("*/__init__.pyi")))]
SETTINGS = Path(__file__).parents[2] / "mkdocs.yml"


def _described(page: str) -> list[str]:
    return [name for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE) if name not in MODULES]


def _found(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_each_module_with_public_names_has_a_page_in_the_navigation() -> None:
    assert list(PAGES) == MODULES
    listed = re.findall(r"reference/(\S+)\.md", SETTINGS.read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_each_public_name_is_described_or_linked(module: str) -> None:
    described = _described(PAGES[module])
    paths = described + re.findall(r"\[`(\S+)`\]\[\]", PAGES[module])
    package = importlib.import_module(module)
    assert sorted(path.rpartition(".")[2] for path in paths) == sorted({*package.__all__} - {"__version__"})
    for path in paths:
        assert _found(path) is getattr(package, path.rpartition(".")[2])


def test_nothing_is_described_twice() -> None:
    described = [name for page in PAGES.values() for name in _described(page)]
    assert len({*described}) == len(described)
    assert "sealign.Edit" in described
    assert "sealign.edits.Edit" not in described
    assert "[`sealign.Edit`][]" in PAGES["sealign.edits"]
