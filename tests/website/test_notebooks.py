"""Notebooks run and shown as pages, on a notebook of a few cells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from website.notebooks import code_cells, main, notebook_page, read_notebook


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    def code(*lines: str) -> dict[str, object]:
        source = "\n".join(lines).splitlines(keepends=True)
        return {"cell_type": "code", "metadata": {}, "source": source, "outputs": [], "execution_count": None}

    links = "# Words\n\nSee [another](other.ipynb), [a page](../page.md) and [one elsewhere](https://x.org/a.ipynb)."
    words = {"cell_type": "markdown", "metadata": {}, "source": links.splitlines(keepends=True)}
    cells = [
        words,
        code("x = 20", "y = 3"),
        code("print(x + y)", "print('end')"),
        code("print(x - y)"),
    ]
    file = tmp_path / "sum.ipynb"
    file.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return file


def test_cells_run_in_one_namespace_and_keep_what_they_print(notebook: Path) -> None:
    main([notebook])
    cells = [*code_cells(read_notebook(notebook))]
    assert [cell["execution_count"] for cell in cells] == [1, 2, 3]
    assert [cell["outputs"] for cell in cells] == [
        [],
        [{"name": "stdout", "output_type": "stream", "text": ["23\n", "end\n"]}],
        [{"name": "stdout", "output_type": "stream", "text": ["17\n"]}],
    ]


def test_a_page_has_text_code_and_output(notebook: Path) -> None:
    main([notebook])
    page = notebook_page(notebook)
    assert "[another](other.md), [a page](../page.md) and [one elsewhere](https://x.org/a.ipynb)" in page
    assert "```python\nx = 20\ny = 3\n```\n\n```python\nprint(x + y)" in page
    assert "```text\n23\nend\n```" in page
    assert page.count("```text") == 2
