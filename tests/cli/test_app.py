"""The application: help texts, version, errors; and the helpers of the tests of all commands."""

from __future__ import annotations

import dataclasses
import errno
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import sealign
from sealign.cli import options
from sealign.cli.app import ORDER, PANELS, app
from sealign.cli.consoles import messages, output
from sealign.cli.display import track
from sealign.cli.method_options import method_flags, method_options
from sealign.demonstrations.demonstration import Demonstration
from sealign.errors import SealignWarning, SettingError
from sealign.methods import edit_sources
from sealign.methods.registry import METHODS
from tests.tiny_models import build_model

CONTEXT = 2048

# --- what the tests of all commands share ---


def run(*args: object, stdin: str | bytes | None = None) -> Any:
    """Run the command line in this process."""
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def passed(*args: object, stdin: str | None = None) -> str:
    """Run the command line in this process, and return what it prints; only notes on strengths go to standard error."""
    result = run(*args, stdin=stdin)
    told = [line for line in without_progress(result.stderr).splitlines() if not line.startswith("note: strength is ")]
    assert (result.exit_code, told) == (0, []), result.stderr or result.exception
    return str(result.stdout)


def replaced(*args: object) -> str:
    """Run the command line with ``--overwrite``, and return what it prints; it says what it replaces."""
    result = run(*args, "--overwrite")
    assert result.exit_code == 0, result.stderr or result.exception
    told = without_progress(result.stderr).splitlines()
    assert told
    assert all(line.endswith("exists and will be replaced.") for line in told)
    return str(result.stdout)


def without_progress(stderr: str) -> str:
    """What a process says on standard error, without how far it is, which a slow machine says now and then."""
    return re.sub(r"^.*(: \d+ of \d+, about .* left| \.\.\.)\n", "", stderr, flags=re.MULTILINE)


def assert_told(exit_code: int, stdout: str, stderr: str, *words: str) -> None:
    """One sentence on standard error with the words in it, exit code 2, and nothing else."""
    assert exit_code == 2
    assert stdout == ""
    stderr = without_progress(stderr)
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
    config = sealign.SEAConfig(rank=(3, 2), layers=(1, 3), strength=0.7, batch_size=4)
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
    monkeypatch.setattr(messages, "seconds_between_lines", 1e6)
    return folder


@pytest.fixture
def rows(tmp_path: Path, demonstrations: list[Demonstration]) -> Path:
    """A file with seven demonstrations."""
    return write_rows(tmp_path / "rows.jsonl", list(demonstrations))


# --- help ---


@functools.cache
def commands() -> dict[str, Any]:
    """All commands by their words, such as ``plot tsne``; groups are not listed."""
    found: dict[str, Any] = {}
    group: Any = typer.main.get_command(app)

    def walk(group: Any, words: tuple[str, ...]) -> None:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                walk(command, (*words, name))
            else:
                found[" ".join((*words, name))] = command

    walk(group, ())
    return found


def shared_options(command: Any) -> dict[str, Any]:
    """The options of a command by their first name."""
    return {param.opts[0]: param for param in command.params if param.param_type_name == "option"}


def described(param: Any) -> str:
    """The help text of an option without the default, which may differ between commands."""
    return re.sub(r"\s*\\\[default: .+\]$", "", param.help or "")


def test_commands_are_listed_in_the_order_of_work() -> None:
    text = passed("--help")
    listed = re.findall(r"^│ ([a-z]+) +[A-Z]", text, re.MULTILINE)
    assert listed == list(ORDER)
    assert [title for title in re.findall(r"^╭─ (.+?) ─", text, re.MULTILINE) if title != "Options"] == list(PANELS)
    assert run().stdout.strip() == text.strip()  # alone, it helps
    assert passed("-h") == text


@pytest.mark.parametrize("width", ["80", "120"])
@pytest.mark.parametrize("command", sorted(commands()))
def test_help_names_each_option_with_its_text(command: str, width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    text = passed(*command.split(), "--help")
    assert "…" not in text  # nothing is cut
    assert "<bool>" not in text
    assert not re.search("[{}]", next(line for line in text.splitlines() if "Usage:" in line))
    flat = "".join(re.sub(r"[│╭╰─╮╯]", " ", text).split())
    for name, param in shared_options(commands()[command]).items():
        assert re.search(rf"{name}\b", text), name
        assert len(param.help.split()) >= 3, name
        assert "".join(described(param).replace("\\[", "[").split())[:20] in flat, name
        default = re.search(r"\\\[default: (.+)\]$", param.help)
        if default:
            assert "".join(f"[default: {default[1]}]".split()) in flat, name


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", sorted(commands()))
def test_paragraphs_of_help_are_whole(command: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line ends early only where the next word would not have fitted, or at the end of a paragraph."""
    monkeypatch.setenv("COLUMNS", str(width))
    text = passed(*command.split(), "--help")
    lines = [line.strip() for line in text[: text.index("╭")].splitlines()]
    for line, after in itertools.pairwise(lines):
        if line and after and not line.startswith("Usage"):
            assert len(line) + 1 + len(after.split()[0]) > width - 2, line


SEVERAL: dict[str, tuple[str, ...]] = {
    "--edit": (
        "evaluate",
        "playground",
        "serve",
        "export lora",
        "export merged",
        "export gguf",
        "export control-vector",
    ),
    "--edits-dir": ("evaluate", "playground"),
    "--server": ("playground",),
    "--method": ("evaluate",),
    "--tasks": ("tune",),
    "--max-damage": ("fit", "tune"),
    "--strength": ("evaluate", "generate", "chat"),
    "--seed": ("generate", "chat"),
    "--output": ("fit",),
    "--demonstrations": ("fit", "evaluate"),
    "--max-new-tokens": ("evaluate",),
    "--behaviours": ("reproduce",),
}
"""Options that some commands take several times and with a name, or restrict; their help texts begin alike."""


def _meaning(param: Any) -> tuple[object, ...]:
    kind = param.type_descriptor.annotation if hasattr(param, "type_descriptor") else param.type.name
    return described(param), kind, param.metavar, param.is_flag, param.secondary_opts, getattr(param, "min", None)


def test_one_option_means_one_thing_in_all_commands() -> None:
    seen: dict[str, dict[str, Any]] = {}
    for command, made in commands().items():
        for name, param in shared_options(made).items():
            seen.setdefault(name, {})[command] = param
    shared = {name: found for name, found in seen.items() if len(found) > 1}
    assert {"--edit", "--model", "--output", "--limit", "--demonstrations-limit", "--data-dir"} <= set(shared)
    for name, found in shared.items():
        alike = {command: param for command, param in found.items() if command not in SEVERAL.get(name, ())}
        wanted = next(iter(alike.values()))
        assert {command: _meaning(param) for command, param in alike.items()} == dict.fromkeys(alike, _meaning(wanted))
        for command in set(found) - set(alike):
            start = re.split("[.;]", described(wanted))[0]
            assert described(found[command]).startswith(start), f"{name} of {command}"


def test_items_and_demonstrations_are_limited_by_options_of_two_names() -> None:
    assert "items of each task" in shared_options(commands()["evaluate"])["--limit"].help
    assert "demonstrations per source" in shared_options(commands()["evaluate"])["--demonstrations-limit"].help
    for command, made in commands().items():
        names = set(shared_options(made))
        if "--demonstrations" in names:
            assert "--demonstrations-limit" in names, command
        if "--tasks" in names:
            assert "--limit" in names, command
        assert not names & {"--task-limit", "--learn-from"}


def test_a_model_is_loaded_with_the_same_options_by_every_command() -> None:
    for command, made in commands().items():
        names = set(shared_options(made))
        if "--device" in names:
            assert {"--model", "--dtype", "--revision", "--trust-remote-code", "--attn-implementation"} <= names, (
                command
            )


def test_what_is_printed_can_be_json() -> None:
    without = {command for command, made in commands().items() if "--json" not in shared_options(made)}
    assert without == {"chat", "playground", "serve"}


def test_options_are_spelled_as_designed() -> None:
    spelled = {
        "fit": "--method --model --demonstrations --output --data-dir --set --seed --dtype --device --plan --json",
        "inspect": "--edit --json",
        "generate": "--model --edit --prompt --strength --dtype --device --ignore-mismatch --json",
        "playground": "--model --edit --edits-dir --host --port --dtype --device --ignore-mismatch",
        "chat": "--model --edit --strength --dtype --device --ignore-mismatch",
        "demo": "--model --output --strength --seed --dtype --device --json",
        "evaluate": "--model --edit --tasks --data-dir --limit --output --strength --seed --dtype --device --json",
        "compare": "--seed --json",
        "tune": "--model --demonstrations --tasks --max-damage --deployable --data-dir --output --seed --dtype --json",
        "verify": "--edit --against --model --strength --dtype --device --json",
    }
    for command, names in spelled.items():
        assert set(names.split()) <= set(shared_options(commands()[command])), command


def test_texts_of_shared_options_are_those_of_the_settings_of_methods() -> None:
    """What ``plot --site`` or ``generate --strength`` means is what the setting of a method means."""
    shared = {
        "--strength": options.STRENGTH_HELP,
        "--prompt-format": options.PROMPT_FORMAT_HELP,
        "--layers": described(shared_options(commands()["plot effect"])["--layers"]),
        "--batch-size": described(shared_options(commands()["evaluate"])["--batch-size"]),
    }
    own = {option.flag: option.help for option in method_options("sea")}
    own["--layers"] = own["--layers"].replace(" signature:L (the L layers of highest signature);", "")  # only in fits
    for name, text in shared.items():
        assert own[name] == text, name
    assert own["--site"].endswith(" in each layer: mlp, attention or residual.")
    assert described(shared_options(commands()["plot effect"])["--site"]).endswith(own["--site"].split("edit", 1)[1])
    tokens = described(shared_options(commands()["generate"])["--max-new-tokens"])
    assert own["--max-new-tokens"] == tokens.replace("tokens.", "tokens with --neutral generated.", 1)
    for name in METHODS:
        assert re.search(rf"\b{name}\b", options.METHOD_HELP), name


def test_defaults_that_help_texts_name_are_those_of_the_library() -> None:
    for command, value in (("demo", "the largest within the damage budget"), ("generate", "the edit's own")):
        assert shared_options(commands()[command])["--strength"].help.endswith(f"[default: {value}]")


def test_version() -> None:
    assert passed("--version") == f"{sealign.__version__}\n"


# --- errors ---


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], Any]:
    """Make ``sealign inspect`` fail with an error, and run it."""

    def fail(error: BaseException) -> Any:
        def raising(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(edit_sources, "load_edit_source", raising)
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


@pytest.mark.filterwarnings("always::sealign.errors.SealignWarning")
def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = " ".join(["mind the [gap];"] * 20)

    def warn(*_: object) -> Any:
        warnings.warn(sentence, SealignWarning, stacklevel=2)
        raise SettingError("wrong")

    monkeypatch.setattr(edit_sources, "load_edit_source", warn)
    assert run("inspect", "--edit", "x").stderr == f"warning: {sentence}\nerror: wrong\n"


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
        (["tune", "--output", "x", "--tasks", "y"], "--demonstrations"),
        (["inspect"], "--edit"),
        (["generate", "--edit", "x", "--temperature", "abc"], "--temperature"),
        (["generate", "--edit", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["fit", "--seed", "1.5"], "--seed"),
    ],
)
def test_wrong_usage(args: list[str], word: str) -> None:
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert word in result.stderr
    assert "Usage: sealign" in result.stderr


# --- progress off a terminal ---


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which passes only in the test."""
    now = [100.0]
    monkeypatch.setattr("sealign.cli.display.time.monotonic", lambda: now[0])
    monkeypatch.setattr(messages, "seconds_between_lines", 15.0)
    return now


def test_progress_is_a_line_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    for item in track(["a", "b", "c", "d", "e"], "Scoring [x]", 5):
        seen.append(item)
        clock[0] += 10
    assert seen == ["a", "b", "c", "d", "e"]
    expected = "Scoring [x]: 2 of 5, about 30 s left\nScoring [x]: 4 of 5, about 10 s left\n"
    assert capsys.readouterr() == ("", expected)


@pytest.mark.usefixtures("clock")
def test_what_is_quick_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(3), "Scoring", 3)) == [0, 1, 2]
    assert list(track([], "Scoring", 0)) == []
    with messages.status("Loading the model"):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_slow_step_says_what_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(messages, "seconds_between_lines", 0.01)
    with messages.status("Loading the model"):
        deadline = time.monotonic() + 60
        while not (said := capsys.readouterr().err) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert said == "Loading the model ...\n"


@pytest.mark.usefixtures("clock")
def test_what_the_library_does_is_printed_where_it_is_asked_for(model_folder: Path, tmp_path: Path) -> None:
    args: tuple[object, ...] = ("fit", "--model", model_folder, "--demonstrations", "bundled:fairness")
    args += ("--demonstrations-limit", 4, "--method", "difference_operator", "--layers", 2, "--overwrite")
    args += ("--output", tmp_path / "edit")
    told = {}
    for given in ((), ("--verbose",), ("-vv",), ("--quiet",)):
        result = run(*given, *args)
        assert result.exit_code == 0, result.stderr
        told[given] = [re.sub(r"^[\d:]{8} ", "", line) for line in result.stderr.splitlines() if "replaced" not in line]
    assert told[()] == told["--quiet",] == []
    assert told["--verbose",][:3] == [
        f"sealign.models.loading: loaded {model_folder} from {model_folder} as torch.float32 on cpu",
        "sealign.methods.registry: fitting difference_operator on 4 demonstrations",
        "sealign.fitting.collector: collected activations of 4 demonstrations at residual [2]; 0 of 1 batches were "
        "kept from an earlier run",
    ]
    assert told["--verbose",][3].startswith("sealign.evaluation.strength_choice: chose strength 0.")
    assert set(told["-vv",]) > set(told["--verbose",])
    refused("-q", "-v", "inspect", "--edit", "x", words=("--verbose and --quiet exclude each other; leave out one",))


def test_quiet_shows_no_progress(clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(messages, "shows_progress", False)
    for terminal in (False, True):
        monkeypatch.setattr(messages, "_force_terminal", terminal)
        for _ in track(range(3), "Scoring", 3):
            clock[0] += 100
        with messages.status("Loading the model"):
            messages.say("Measuring")
    assert capsys.readouterr() == ("", "")


# --- as a process of its own ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "spins"), [({}, 0), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "7"}, 7)]
)
def test_threads_do_not_spin_unless_they_are_told_to(given: dict[str, str], spins: int | None) -> None:
    """What the OpenMP library of torch says of itself."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    environment |= given | {"OMP_DISPLAY_ENV": "verbose"}
    result = subprocess.run(program("inspect", "--edit", "nowhere"), capture_output=True, text=True, env=environment)
    found = re.search(r"GOMP_SPINCOUNT = '(\w+)'", result.stderr)
    if found is None:
        pytest.skip("this torch is not built with an OpenMP library that says how it waits")
    assert int(found[1]) == spins if spins is not None else int(found[1]) > 1000


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


# --- spelling ---


def other_spelling(name: str) -> str:
    """The British spelling of an American name, or the other way round; the name itself if there is one spelling."""
    pairs = [("behaviour", "behavior"), ("centred", "centered"), ("ization", "isation"), ("ized", "ised")]
    for pair in pairs:
        for one, other in (pair, pair[::-1]):
            if one in name:
                return name.replace(one, other)
    return name


def test_options_are_found_in_both_spellings_and_listed_in_one() -> None:
    methods = {f"fit --method {name}": names for name, names in ((m, method_flags(m)) for m in METHODS)}
    options = {command: set(shared_options(made)) for command, made in commands().items()}
    found = set()
    for command, flags in (options | methods).items():
        for flag in sorted(flags):
            other = other_spelling(flag)
            if other == flag:
                continue
            found.add((command, flag))
            assert other not in flags
            listed = passed(*command.split(), "--help")
            assert flag in listed
            assert other not in listed
            missing = run(*command.split(), "--no-such-option")
            assert "No such option" in missing.stderr
            assert "No such option" not in run(*command.split(), f"{other}=x").stderr, (command, other)
    assert {
        ("demo", "--behaviours"),
        ("evaluate", "--quantization"),
        ("plot spectrum", "--centered"),
        ("fit --method sea", "--centered"),
        ("fit --method sea", "--normalization"),
    } <= found


@pytest.mark.parametrize(
    "given", [["--centred"], ["--set", "centred=true"], ["--centered"], ["--set", "centered=true"]]
)
def test_a_setting_in_either_spelling_is_the_same(
    given: list[str], model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    args = ("fit", "--model", model_folder, "--demonstrations", rows, "--rank", 1, "--strength", 1)
    passed(*args, *given, "--output", tmp_path / "edit")
    assert sealign.load_edit(tmp_path / "edit").settings["centered"] is True


def test_a_list_is_given_by_one_option(rows: Path, tmp_path: Path) -> None:
    """The first values would be left out without a word."""
    words = ("--strength is given 2 times; give it once, with commas between the values",)
    refused("generate", "--edit", "x", "--prompt", "a", "--strength", 1, "--strength=2", words=words)
    args = ("--demonstrations", rows, "--output", tmp_path / "search")
    refused("tune", *args, "--methods", "sea", "--methods", "iti", words=("--methods is given 2 times",))


def test_a_setting_in_both_spellings_is_refused(rows: Path, tmp_path: Path) -> None:
    args = ("fit", "--demonstrations", rows, "--output", tmp_path / "edit")
    refused(*args, "--centred", "--set", "centered=true", words=("centered is given by --centered and by --set",))
    refused(*args, "--set", "centred=1", "--set", "centered=1", words=("centered", "twice"))
    refused(*args, "--method", "iti", "--centred", words=("--centered is not an option of iti, but of sea",))
    with pytest.raises(SettingError, match="centered is given twice, also as centred; leave one out"):
        sealign.SEAConfig(centred=True, centered=True)  # type: ignore[call-arg]
    assert sealign.SEAConfig(normalisation="none") == sealign.SEAConfig(normalization="none")  # type: ignore[call-arg]
