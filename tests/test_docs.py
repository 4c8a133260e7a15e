"""Every command and every piece of Python in the documents, run in the order in which a reader meets them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.edit_server import engine_command

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs" / "results" / "README.md"]
OTHERS = (
    "--no-deps",
    "--tensor-parallel-size",
    "--help",
    "--only",
    "--rounds",
    "--calls",
    "--modes",
    "--batches",
    "--dtypes",
    "--plot",
    "--enforce-eager",
    "--model_args",
    "--port",
    "--silent",
    "--fail",
    "--header",
    "--standalone",
    "--nproc-per-node",
)
"""Options of all commands, of torchrun, of pip, of the benchmarks, of the harness, of vLLM and of curl."""
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def _blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def _command(folder: Path) -> Path:
    """``sealign`` as a reader has it who serves: one command; here the engines have an environment of their own."""
    folder.mkdir()
    own = Path(sys.executable).parent / "sealign"
    script = f'#!/bin/sh\n[ "$1" = serve ] && exec {engine_command("sealign")} "$@"\nexec {own} "$@"\n'
    (folder / "sealign").write_text(script)
    (folder / "sealign").chmod(0o755)
    return folder


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _marked(page: Path) -> object:
    serves = "sealign serve" in page.read_text(encoding="utf-8")
    return pytest.param(page, id=page.name, marks=[pytest.mark.vllm] if serves else [])


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("page", [_marked(page) for page in PAGES if _blocks(page)])
def test_commands_run(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    text = page.read_text(encoding="utf-8")
    if "--data-dir data" in text:
        (tmp_path / "data").symlink_to(request.getfixturevalue("data_dir").resolve())
    serves = "sealign serve" in text
    first = _command(tmp_path / "bin") if serves else Path(sys.executable).parent
    path = os.pathsep.join([str(first), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    port = str(_free_port())
    groups: list[int] = []
    try:
        for language, block in _blocks(page):
            if re.match(r"make\b", block):
                continue  # the commands that run this test
            _run_block(language, block.replace("8000", port) if serves else block, tmp_path, environment, groups)
    finally:
        for group in groups:  # a server that a block left running
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


def _run_block(language: str, text: str, folder: Path, environment: dict[str, str], groups: list[int]) -> None:
    python = [sys.executable, "-W", "error::UserWarning:sealign", "-c", text]
    command = python if language == "python" else ["bash", "-ec", text]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    groups.append(process.pid)
    printed, complained = process.communicate("/quit\n")
    log = folder / "server.log"
    more = log.read_text()[-4000:] if log.is_file() else ""
    assert process.returncode == 0, f"{text}\n{printed}\n{complained}\n{more}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_options_in_the_documents_exist() -> None:
    import inspect

    from sealign.cli import chat, demo, evaluate, export, fit, generate, options, plot, reproduce, serve, tune
    from sealign.cli import loading as methods

    modules = (options, fit, generate, chat, demo, evaluate, export, methods, plot, reproduce, serve, tune)
    text = "".join(inspect.getsource(module) for module in modules)
    for page in PAGES:
        for option in set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", page.read_text(encoding="utf-8"))):
            assert option in text or option in OTHERS, f"{page.name}: {option}"
