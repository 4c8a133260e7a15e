"""The notebooks of the documents run from the first cell to the last, and hold what an earlier run printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from website.notebooks import code_cells, read_notebook, run_cells

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = {file.stem: file for file in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))}


@pytest.mark.slow
@pytest.mark.usefixtures("embedded_stand_in")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_cells_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = [*run_cells(code_cells(read_notebook(NOTEBOOKS[name])))]
    assert any(cell["outputs"] for cell in cells)
    assert [bool(cell["outputs"]) for cell in cells] == [_prints(cell) for cell in cells]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stored_outputs_are_of_one_whole_run(name: str) -> None:
    cells = [*code_cells(read_notebook(NOTEBOOKS[name]))]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert [bool(cell["outputs"]) for cell in cells] == [_prints(cell) for cell in cells]
    printed = [text for cell in cells for output in cell["outputs"] for text in output["text"]]
    assert not re.search(r"Traceback|/tmp/|/root/|/home/", "".join(printed))


def _prints(cell: dict[str, Any]) -> bool:
    return "print(" in "".join(cell["source"])
