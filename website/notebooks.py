"""Notebooks: running them, and their pages on the site; ``python -m website.notebooks FILE ...`` runs and saves."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_notebook(file: Path) -> dict[str, Any]:
    """Return the content of a notebook.

    Args:
        file: A file of format 4.
    """
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def code_cells(notebook: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Return the cells with code.

    Args:
        notebook: Content of a notebook.
    """
    return (cell for cell in notebook["cells"] if cell["cell_type"] == "code")


def run_cells(cells: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Run cells in one namespace and keep what they print; each is returned after it ran.

    Args:
        cells: Cells with code.
    """
    space: dict[str, Any] = {"__name__": "__main__"}
    for count, cell in enumerate(cells, start=1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"<cell {count}>", "exec"), space)
        text = printed.getvalue().splitlines(keepends=True)
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": text}] if text else []
        cell["execution_count"] = count
        yield cell


def notebook_page(file: Path) -> str:
    """Return a notebook as a Markdown page: its text, its code, and what each cell printed.

    Args:
        file: The notebook.
    """
    parts = []
    for cell in read_notebook(file)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\((?!\w+:)([^)#\s]+)\.ipynb", r"](\1.md", source))
            continue
        parts.append(f"```python\n{source}\n```")
        printed = "".join("".join(output["text"]) for output in cell["outputs"])
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join([*parts, f"*This page is the notebook `docs/notebooks/{file.name}`.*"]) + "\n"


def main(files: list[Path]) -> None:
    """Run notebooks and save them with what their cells printed.

    Args:
        files: The notebooks.
    """
    for file in files:
        notebook = read_notebook(file)
        for _ in run_cells(code_cells(notebook)):
            pass
        file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main([Path(name).resolve() for name in sys.argv[1:]])
