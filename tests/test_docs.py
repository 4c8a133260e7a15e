"""Every command and every piece of Python in the documents, run in the order in which a reader meets them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from sealign.cli.app import app
from sealign.cli.method_options import method_options
from sealign.methods.registry import METHODS
from tests.edit_server import engine_command
from tests.embedded_package import replace_embedded_model

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
    "--behaviour",
    "--pairs",
    "--enforce-eager",
    "--model_args",
    "--port",
    "--silent",
    "--fail",
    "--header",
    "--standalone",
    "--nproc-per-node",
    "--lora-scaled",
    "--lora-init-without-apply",
    "--control-vector-scaled",
    "--outfile",
    "--outtype",
    "--file",
    "--model-path",
    "--enable-lora",
    "--max-model-len",
    "--lora-paths",
    "--gpus",
    "--shm-size",
    "--model-id",
)
"""Options of all commands, of torchrun, of pip, of the benchmarks, of the harness, of the engines and of curl."""
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
STDIN = "/quit\n"
"""What a reader types; it ends a chat."""


def _blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def _own_commands(block: str) -> list[list[str]] | None:
    """Return the arguments of each command of a block of plain ``sealign`` lines, or None where it needs a shell."""
    commands = []
    for line in block.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
            tokens = list(shlex.shlex(line, posix=True, punctuation_chars=True))
        except ValueError:  # a quotation that goes on in the next line
            return None
        if words:
            if words[0] != "sealign" or words[1] == "serve" or set("$`*~") & set(line):
                return None
            if any(set(token) <= set("();<>|&") for token in tokens if token):
                return None
            commands.append(words[1:])
    return commands


def _run_block(language: str, block: str, shell: Shell) -> None:
    """Run a block in this process where it can be."""
    commands = _own_commands(block) if language == "sh" else []
    if commands is None:
        shell.run(block)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for command in commands:
            result = CliRunner().invoke(app, command, input=STDIN)
            assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
        if language == "python":
            warnings.filterwarnings("error", category=UserWarning, module="sealign")
            exec(compile(block, "<document>", "exec"), {"__name__": "__main__"})


class Shell:
    """Runs blocks that need a shell, with ``sealign`` as a reader has it; ends what they leave running."""

    def __init__(self, folder: Path, *, serves: bool) -> None:
        self.folder = folder
        own = Path(sys.executable).parent
        folders = [str(own), os.environ["PATH"]]
        if serves:  # the engines have an environment of their own here
            (folder / "bin").mkdir()
            command = folder / "bin" / "sealign"
            serve = f'[ "$1" = serve ] && exec {engine_command("sealign")} "$@"'
            command.write_text(f'#!/bin/sh\n{serve}\nexec {own / "sealign"} "$@"\n', encoding="utf-8")
            command.chmod(0o755)
            folders.insert(0, str(folder / "bin"))
        settings = {"PATH": os.pathsep.join(folders), "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        self.environment = os.environ | settings
        self.groups: list[int] = []

    def run(self, text: str) -> None:
        process = subprocess.Popen(
            ["bash", "-ec", text],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.groups.append(process.pid)
        printed, complained = process.communicate(STDIN)
        log = self.folder / "server.log"
        more = log.read_text()[-4000:] if log.is_file() else ""
        assert process.returncode == 0, f"{text}\n{printed}\n{complained}\n{more}"

    def end(self) -> None:
        for group in self.groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


@pytest.fixture
def embedded_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``smollm2`` be a stand-in in every process, an engine's too."""
    for name, value in replace_embedded_model(tmp_path).items():
        monkeypatch.setenv(name, value, prepend=os.pathsep if name == "PYTHONPATH" else None)
    monkeypatch.syspath_prepend(tmp_path / "package")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _serves(page: Path) -> bool:
    return any("sealign serve" in block for _, block in _blocks(page))


def _marked(page: Path) -> object:
    return pytest.param(page, id=page.name, marks=[pytest.mark.engines] if _serves(page) else [])


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("page", [_marked(page) for page in PAGES if _blocks(page)])
def test_commands_run(
    page: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page.read_text(encoding="utf-8")
    if "--data-dir data" in text:
        (tmp_path / "data").symlink_to(request.getfixturevalue("data_dir").resolve())
    monkeypatch.chdir(tmp_path)
    serves, port = _serves(page), str(_free_port())
    request.getfixturevalue("embedded_package" if serves or "torchrun" in text else "embedded_stand_in")
    shell = Shell(tmp_path, serves=serves)
    try:
        for language, block in _blocks(page):
            if not re.match(r"make\b", block):  # the commands that run this test
                _run_block(language, block.replace("8000", port) if serves else block, shell)
    finally:
        shell.end()


def test_blocks_that_need_a_shell_are_told_from_those_of_commands_alone() -> None:
    plain = 'sealign fit --set "a b" \\\n  --output x  # why\nsealign inspect --edit a=b+c'
    assert _own_commands(plain) == [["fit", "--set", "a b", "--output", "x"], ["inspect", "--edit", "a=b+c"]]
    for text in (
        "sealign inspect > out",
        "sealign inspect &",
        "sealign fit | tee log",
        "sealign inspect --edit $edit",
        "sealign serve --edit a=b",
        "for model in a b; do\n    sealign fit\ndone",
        "sealign export; true",
        "echo 'a\nb'",
        "torchrun -m sealign fit",
    ):
        assert _own_commands(text) is None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def _options(command: Any) -> set[str]:
    """Return the options of a command and of its subcommands."""
    found = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    return found.union(*(_options(inner) for inner in getattr(command, "commands", {}).values()))


def test_options_in_the_documents_exist() -> None:
    known = _options(typer.main.get_command(app)) | set(OTHERS) | {"--preset"}
    known |= {name for method in METHODS for option in method_options(method) for name in option.names}
    for page in PAGES:
        for option in set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", page.read_text(encoding="utf-8"))):
            assert option in known, f"{page.name}: {option}"
