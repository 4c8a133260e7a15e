"""The application: help texts, version, how errors are told; and what the tests of all commands share."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import sealign
from sealign.cli import app
from sealign.cli.app import messages, output
from sealign.demonstrations.demonstration import Demonstration
from sealign.errors import SettingError
from sealign.methods.sea_config import FitConfig
from sealign.reproduce.embedded_demo import DEMO_CONFIG
from tests.tiny_models import build_model

CONTEXT = 2048
COMMANDS = (
    "demo",
    "fit",
    "inspect",
    "baseline",
    "generate",
    "chat",
    "evaluate",
    "compare",
    "reproduce",
    "tune",
    "verify",
)

# --- what the tests of all commands share ---


def run(*args: object, stdin: str | bytes | None = None) -> Any:
    """Run the command line in this process."""
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def passed(*args: object, stdin: str | None = None) -> str:
    """Run the command line in this process, and return what it prints; nothing may go to standard error."""
    result = run(*args, stdin=stdin)
    assert (result.exit_code, result.stderr) == (0, ""), result.stderr or result.exception
    return str(result.stdout)


def assert_told(exit_code: int, stdout: str, stderr: str, *words: str) -> None:
    """One sentence on standard error with the words in it, exit code 2, and nothing else."""
    assert exit_code == 2
    assert stdout == ""
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert stderr.endswith("\n")
    assert "Traceback" not in stderr
    for word in words:
        assert word in stderr, (word, stderr)


def refused(*args: object, words: tuple[str, ...], stdin: str | bytes | None = None) -> None:
    """Check that the command line refuses in one sentence."""
    result = run(*args, stdin=stdin)
    assert isinstance(result.exception, SystemExit), result.exception
    assert_told(result.exit_code, result.stdout, result.stderr, *words)


def program(*args: object) -> list[str]:
    """The command line as a process of its own."""
    return [sys.executable, "-m", "sealign", *map(str, args)]


def listing(folder: Path) -> list[str]:
    """Everything below a folder, hidden files too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Write demonstrations, dictionaries or lines as they are to a JSONL file."""

    def line(row: Any) -> str:
        if isinstance(row, str):
            return row
        return json.dumps(row if isinstance(row, dict) else dataclasses.asdict(row))

    path.write_text("\n".join(map(line, rows)), encoding="utf-8")
    return path


def table_rows(text: str) -> list[list[str]]:
    """The cells of the body of every table in a text, row by row."""
    lines = [line for line in text.split("\n") if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def printed_python(text: str) -> str:
    """The lines of Python that load an edit, as a command prints them."""
    start = text.index("import sealign")
    return text[start : text.index("\n\n", start)] + "\n"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A tiny Llama and its tokenizer in a folder."""
    folder = tmp_path_factory.mktemp("model")
    build_model("llama", vocab_size=len(tokenizer), max_position_embeddings=CONTEXT).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def edit_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """An edit of two layers of the tiny Llama, with unequal ranks."""
    model, tokenizer = sealign.load_model(str(model_folder), device="cpu")
    config = FitConfig(rank=(3, 2), layers=(1, 3), strength=0.7, batch_size=4)
    edit = sealign.fit_edit(model, tokenizer, sealign.load_demonstrations("bundled:fairness", limit=6), config=config)
    folder = tmp_path_factory.mktemp("edits") / "edit"
    edit.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from several threads, which only wait for each other where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and tables as wide as a terminal by default."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SEALIGN_CACHE", str(folder))
    monkeypatch.setenv("COLUMNS", "80")
    for console in (output, messages):
        monkeypatch.setattr(console, "width", 80)
    return folder


@pytest.fixture
def rows(tmp_path: Path, demonstrations: list[Demonstration]) -> Path:
    """A file with seven demonstrations."""
    return write_rows(tmp_path / "rows.jsonl", list(demonstrations))


# --- help ---


def _options(command: str) -> dict[str, Any]:
    """The options of a command by their first name."""
    found: Any = typer.main.get_command(app)
    return {param.opts[0]: param for param in found.commands[command].params if param.param_type_name == "option"}


def _defaults(command: str) -> dict[str, str]:
    """The defaults that a command's help texts name in brackets."""
    texts = {name: re.search(r"\[default: (.+)\]$", param.help or "") for name, param in _options(command).items()}
    return {name: match[1] for name, match in texts.items() if match}


def test_help_lists_all_commands() -> None:
    text = passed("--help")
    for command in COMMANDS:
        assert re.search(rf"^│ {command} +[A-Z]", text, re.MULTILINE), command
    assert "sealign demo" in text
    assert run().stdout.strip() == text.strip()  # alone, it helps
    assert passed("-h") == text


@pytest.mark.parametrize("width", ["80", "120"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_each_option_with_text(command: str, width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    text = passed(command, "--help")
    assert "…" not in text  # nothing is cut
    flat = "".join(re.sub(r"[│╭╰─╮╯]", " ", text).split())
    for name, param in _options(command).items():
        assert re.search(rf"{name}\b", text), name
        assert len(param.help.split()) >= 3, name
        assert "".join(param.help.replace("\\[", "[").split())[:20] in flat, name
    for name, default in _defaults(command).items():
        assert "".join(f"[default: {default}]".split()) in flat, name


def test_options_are_spelled_as_designed() -> None:
    spelled = {
        "fit": "--model --demonstrations --output --data-dir --explained-variance --normalization --strength --layers "
        "--site --centered --feature-map --combine --seed --dtype --device --reference --json",
        "inspect": "--edit --json",
        "generate": "--model --edit --prompt --strength --dtype --device --ignore-mismatch --json",
        "chat": "--model --edit --strength --dtype --device --ignore-mismatch",
        "demo": "--model --output --strength --seed --dtype --device --json",
        "evaluate": "--model --edit --tasks --data-dir --limit --output --strength --seed --dtype --device --json",
        "compare": "--seed --json",
        "tune": "--model --demonstrations --tasks --max-damage --deployable --data-dir --output --seed --dtype --json",
        "verify": "--edit --against --model --strength --dtype --device --json",
    }
    for command, names in spelled.items():
        assert set(names.split()) <= set(_options(command)), command


def test_defaults_in_help_texts_are_those_of_the_library() -> None:
    config = FitConfig()
    shown = {
        "--explained-variance": config.explained_variance,
        "--centered": "centered" if config.centered else "uncentered",
        "--feature-map": config.feature_map,
        "--site": config.site,
        "--layers": config.layers,
        "--combine": config.combine,
        "--normalization": config.normalization,
        "--strength": f"{config.strength:g}",
        "--token": config.token,
        "--neutral": config.neutral,
        "--max-new-tokens": config.max_new_tokens,
        "--prompt-format": config.prompt_format.style,
        "--batch-size": config.batch_size,
        "--model": "smollm2",
        "--fit-site": "where the edit acts",
    }
    assert config.fit_site is None
    assert config.seed == _options("fit")["--seed"].default
    assert _defaults("fit") == {name: str(value) for name, value in shown.items()}
    assert _defaults("demo") == {"--strength": f"{DEMO_CONFIG.strength:g}", "--model": "smollm2"}
    for command in ("generate", "chat"):
        assert _defaults(command)["--strength"] == "the edit's own"


def test_the_same_option_means_the_same_in_every_command() -> None:
    # Commands that write more than an edit say what, and one takes several edits by name.
    own = {"--output": ("baseline", "evaluate", "reproduce", "tune"), "--edit": ("evaluate",)}
    for name in ("--edit", "--dtype", "--device", "--ignore-mismatch", "--json", "--seed", "--output", "--max-damage"):
        commands = [command for command in COMMANDS if command not in own.get(name, ())]
        texts = {_options(command)[name].help for command in commands if name in _options(command)}
        assert len(texts) == 1, name


def test_version() -> None:
    assert passed("--version") == f"{sealign.__version__}\n"


# --- errors ---


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[BaseException], Any]]:
    """Make ``sealign inspect`` fail with an error, and run it."""

    def fail(error: BaseException) -> Any:
        def raising(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(sealign.Edit, "from_pretrained", raising)
        return run("inspect", "--edit", "x")

    return fail


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            SettingError("k is 2, but it must be [bold]1[/]; try 1"),
            ("error: k is 2, but it must be [bold]1[/]; try 1",),
        ),
        (MemoryError(), ("out of memory", "--dtype bfloat16")),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), ("out of memory",)),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/d/x"),
            ("cannot write '/d/x'", "no space left", "free some"),
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/d/x"), ("'/d/x': permission denied", "check the path")),
        (OSError("strange"), ("cannot read or write: strange",)),
        (KeyboardInterrupt(), ("error: interrupted; nothing was written\n",)),
    ],
)
def test_errors_are_told_in_one_sentence(
    failing: Callable[[BaseException], Any], error: BaseException, words: tuple[str, ...]
) -> None:
    result = failing(error)
    assert isinstance(result.exception, SystemExit)
    assert_told(result.exit_code, result.stdout, result.stderr, *words)


def test_faults_of_our_own_are_not_hidden(failing: Callable[[BaseException], Any]) -> None:
    for error in (RuntimeError("a fault"), ValueError("a fault"), AssertionError("a fault")):
        assert failing(error).exception is error


def test_long_sentences_are_not_wrapped(failing: Callable[[BaseException], Any]) -> None:
    path = "/a" * 100
    assert path in failing(SettingError(f"'{path}' is wrong; check it")).stderr


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["fti"], "fit"),
        (["fit", "--stregth", "1"], "--strength"),
        (["fit", "--output", "x"], "--demonstrations"),
        (["inspect"], "--edit"),
        (["generate", "--edit", "x", "--strength", "abc"], "--strength"),
        (["generate", "--edit", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["fit", "--seed", "1.5"], "--seed"),
    ],
)
def test_wrong_usage(args: list[str], word: str) -> None:
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert word in result.stderr
    assert "Usage: sealign" in result.stderr


# --- as a process of its own ---


def test_as_a_process() -> None:
    version = subprocess.run(program("--version"), capture_output=True, text=True)
    assert (version.returncode, version.stdout, version.stderr) == (0, f"{sealign.__version__}\n", "")
    script = Path(sys.executable).parent / "sealign"
    installed = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert (installed.returncode, installed.stderr) == (0, "")
    assert installed.stdout == passed("--help")


def test_an_error_as_a_process() -> None:
    result = subprocess.run(program("inspect", "--edit", "nowhere"), capture_output=True, text=True)
    assert_told(result.returncode, result.stdout, result.stderr, "there is no folder 'nowhere'", "check the path")
