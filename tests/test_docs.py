"""Every command and every piece of Python in the documents, run in the order in which a reader meets them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def _blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page)], ids=lambda page: page.name)
def test_commands_run(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if "--data-dir data" in page.read_text(encoding="utf-8"):
        (tmp_path / "data").symlink_to(request.getfixturevalue("data_dir").resolve())
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}
    for language, text in _blocks(page):
        if re.match(r"make\b", text):
            continue  # the commands that run this test
        command = (
            [sys.executable, "-W", "error::UserWarning:sealign", "-c", text]
            if language == "python"
            else ["bash", "-ec", text]
        )
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, input="/quit\n")
        assert result.returncode == 0, f"{text}\n{result.stdout}\n{result.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_options_in_the_documents_exist() -> None:
    import inspect

    from sealign.cli import chat, demo, evaluate, export, fit, generate, options, tune

    modules = (options, fit, generate, chat, demo, evaluate, export, tune)
    text = "".join(inspect.getsource(module) for module in modules)
    for page in PAGES:
        for option in set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", page.read_text(encoding="utf-8"))):
            assert option in text or option in ("--no-deps", "--model_args"), f"{page.name}: {option}"
