"""Every option of every command, generated from the application, changes what the command does or is refused."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

import sealign
from sealign.cli.method_options import method_config, method_options
from sealign.methods.registry import METHODS
from tests.cli import test_app as shared
from tests.cli.command_lines import Library, Places, command_lines, other_command_lines
from tests.cli.test_app import commands, listing, refused, run, shared_options, write_rows
from tests.evaluation_data import HARNESS_WARNINGS, planted_results, planted_sweep, write_truthfulqa
from tests.export.tiny_gguf import write_llama
from tests.tiny_models import build_model

cache = shared.cache
edit_folder = shared.edit_folder
model_folder = shared.model_folder
one_thread = shared.one_thread

pytestmark = [
    pytest.mark.slow,
    *HARNESS_WARNINGS,
    pytest.mark.filterwarnings("ignore::sealign.errors.SealignWarning"),
]
for needed in ("gguf", "peft", "lm_eval", "matplotlib", "sklearn", "openai", "uvicorn"):
    pytest.importorskip(needed)

NOWHERE = Places(
    **{field.name: Path() for field in dataclasses.fields(Places) if field.name != "results"}, results=(Path(), Path())
)
"""Places that do not exist, to count command lines."""

WRITING = {name for name, made in commands().items() if "--output" in shared_options(made)}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, edit_folder: Path, tokenizer: Any) -> Places:
    folder = tmp_path_factory.mktemp("places")
    model, _ = sealign.load_model(str(model_folder), device="cpu")
    other = build_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048, num_key_value_heads=4)
    other.save_pretrained(folder / "other")
    tokenizer.save_pretrained(folder / "other")
    items = sealign.load_demonstrations("bundled:fairness", limit=8)
    sealign.Edit.from_pretrained(edit_folder).with_normalization("none").save_pretrained(folder / "linear")
    config = sealign.MeanDifferenceConfig(site="residual", layers=(1, 2), strength=0.5)
    sealign.fit_edit(model, tokenizer, items, config=config).save_pretrained(folder / "shift")
    rows = write_rows(folder / "rows.jsonl", [{**vars(item), "question": item.prompt + "?"} for item in items])
    results = (folder / "first", folder / "second")
    for each, gain in zip(results, (0.05, 0.03), strict=True):
        each.mkdir()
        planted_results(gain).save(each)
    (folder / "sweep").mkdir()
    planted_sweep((0.5, 1.0)).save(folder / "sweep")
    (folder / "prompts.txt").write_text("What is ice?\nWhy?\n")
    write_truthfulqa(folder / "data")
    (folder / "preamble.txt").write_text("Answer in one word.\n")
    from sealign.export.lora import export_lora

    export_lora(model, sealign.Edit.from_pretrained(folder / "linear"), folder / "adapter")
    return Places(
        model=model_folder,
        other_model=folder / "other",
        linear=folder / "linear",
        rescaled=edit_folder,
        shift=folder / "shift",
        adapter=folder / "adapter",
        rows=rows,
        results=results,
        sweep=folder / "sweep",
        prompts=folder / "prompts.txt",
        gguf=write_llama(build_model("llama", vocab_size=len(tokenizer)), folder / "base.gguf"),
    )


@pytest.fixture(scope="module")
def first_result() -> Callable[..., Any]:
    """A function that computes once for each name, for what is slow and not looked at here."""
    known: dict[str, Any] = {}

    def compute(name: str, function: Callable[..., Any], *args: Any, **given: Any) -> Any:
        if name not in known:
            known[name] = function(*args, **given)
        return known[name]

    return compute


@pytest.fixture
def library(
    monkeypatch: pytest.MonkeyPatch, places: Places, tokenizer: Any, first_result: Callable[..., Any]
) -> Library:
    return Library(monkeypatch, places, tokenizer, first_result)


VALUES: dict[str, tuple[object, ...]] = {
    "--revision": ("main",),
    "--attn-implementation": ("eager",),
    "--quantization": ("4bit",),
    "--dtype": ("float64",),
    "--device": ("cpu",),
    "--layers": ("2",),
    "--site": ("attention",),
    "--embedding": ("tsne",),
    "--columns": ("prompt=question",),
    "--demonstrations-limit": (6,),
    "--holdout": (0.5,),
    "--limit": (3,),
    "--max-damage": (0.5,),
    "--max-domain-damage": (0.5,),
    "--max-minutes": (7,),
    "--strength": (0.4,),
    "--tolerance": (1e-9,),
    "--seed": (3,),
    "--temperature": (0.9,),
    "--top-p": (0.5, "--temperature", 0.9),
    "--max-new-tokens": (3,),
    "--prompt": ("Why?",),
    "--prompt-format": ("plain",),
    "--chat-template-arg": ("enable_thinking=false",),
    "--system": ("Be brief.",),
    "--control-seeds": ("4",),
    "--batch-size": (2,),
    "--tasks": ("truthfulqa_mc1",),
    "--judge": ("smollm2",),
    "--judge-url": ("http://x/v1", "--judge", "y"),
    "--method": ("mean_difference",),
    "--methods": ("sea",),
    "--sites": ("mlp",),
    "--tokens": ("last",),
    "--finalists": (2,),
    "--behaviours": ("politeness",),
    "--set": ("seed=4",),
    "--tflops": (5, "--plan"),
    "--max-edits": (9,),
    "--amateur": ("small",),
    "--also": ("other",),
    "--classifier": ("folder",),
    "--scorer": ("repetition",),
    "--aim": ("refusal=lower",),
    "--criterion": ("warmth",),
    "--num-fewshot": (1,),
    "--system-instruction": ("Be brief.",),
    "--name": ("wild",),
    "--host": ("localhost",),
    "--port": (9000,),
    "--server": ("http://127.0.0.1:9",),
    "--kinds": ("history",),
    "--base-model": ("owner/model",),
}
"""Values of options that differ from the default, with the options that they need."""


def changes(command: str, option: str, places: Places, tmp_path: Path) -> tuple[list[object], list[object]]:
    """Return what to add to a command line without the option, and what to add with it, to see its effect."""
    data = places.linear.parent / "data"
    context: list[object] = {
        "--top-p": ["--temperature", 0.9],
        "--tflops": ["--plan", "--tflops", 7],  # without it, the throughput is measured
        "--ignore-mismatch": ["--model", places.other_model],
        "--chat-template-arg": [],
        "--approximate": ["--edit", places.rescaled],
    }.get(option, [])  # type: ignore[assignment]
    if option in ("--classifier", "--scorer", "--aim", "--criterion", "--max-new-tokens") and command == "evaluate":
        context = ["--prompts", places.prompts, "--scorer", "refusal", "--judge", "smollm2"]
    if option in ("--num-fewshot", "--apply-chat-template"):
        context = ["--tasks", "truthfulqa_mc1"]
    if option == "--chat-template-arg" and command == "evaluate":
        context = ["--apply-chat-template"]
    if option == "--seed":
        more = {"generate": ["--temperature", 0.9], "chat": ["--temperature", 0.9]}
        limited = ["--demonstrations-limit", 5] if "--demonstrations" in options(command) else []
        context = list(more.get(command, limited))
    if option in ("--dtype", "--device", "--attn-implementation", "--quantization") and command == "export lora":
        context = ["--edit", places.rescaled, "--approximate"]  # only then is the model loaded
    if option == "--preamble":
        context = ["--prompt-format", "few_shot"]
    if option == "--set" and command == "fit":
        return [], ["--set", "batch_size=3"]
    flag = options(command)[option].is_flag
    special: dict[str, list[object]] = {
        "--model": [places.other_model],
        "--edit": [f"other={places.rescaled}" if command in ("evaluate", "serve", "playground") else places.rescaled],
        "--output": [tmp_path / "elsewhere"],
        "--demonstrations": ["bundled:politeness"],
        "--data-dir": [data],
        "--prompts": [places.prompts],
        "--preamble": [places.linear.parent / "preamble.txt"],
        "--base": [places.gguf.parent / "nowhere.gguf"],
        "--against": [f"merged={places.model}"],
        "--edits-dir": [places.linear.parent],
    }
    value = [] if flag else special.get(option) or list(VALUES[option])
    if option == "--top-p":
        value = [0.5]
    if option == "--tflops":
        value = [5]
    if option == "--data-dir" and command not in ("tune", "evaluate", "reproduce"):
        context = ["--demonstrations", "truthfulqa"]
    return context, [*context, option, *value]


def options(command: str) -> dict[str, Any]:
    return shared_options(commands()[command])


def observe(library: Library, command: str, args: list[object], folder: Path) -> tuple[Any, ...]:
    """Run a command line, and return all that can be seen of it."""
    library.calls.clear()
    stdin = "What is ice?\n" if command == "chat" else None
    result = run(*command.split(), *args, stdin=stdin)
    unknown = result.exception
    assert unknown is None or isinstance(unknown, SystemExit), (args, unknown)
    assert "No such option" not in result.stderr
    return result.exit_code, result.stdout, result.stderr, list(library.calls), listing(folder)


@pytest.mark.parametrize("command", sorted(commands()))
def test_every_option_has_an_effect_or_is_refused(
    command: str, library: Library, places: Places, tmp_path: Path
) -> None:
    base = command_lines(places, tmp_path / "out" / "made")[command]
    assert without_effect(command, base, functools.partial(changes, command), library, places, tmp_path) == []


@pytest.mark.parametrize("number", range(len(other_command_lines(NOWHERE, Path()))))
def test_an_option_that_lacks_what_it_acts_on_is_refused(
    number: int, library: Library, places: Places, tmp_path: Path
) -> None:
    command, base = other_command_lines(places, tmp_path / "out" / "made")[number]

    def alone(option: str, *rest: Any) -> tuple[list[object], list[object]]:
        context, changed = changes(command, option, *rest)
        needed = option in ("--seed", "--ignore-mismatch")  # without, there may be nothing to see
        return (context, changed) if needed else ([], changed[len(context) :])

    found = without_effect(command, base, alone, library, places, tmp_path)
    # A seed stands for what is drawn, if anything is; prompts and demonstrations are in the chat template already.
    assert set(found) <= {"--seed", "--apply-chat-template", *(part for part in base if part in options(command))}


def without_effect(
    command: str,
    base: list[object],
    changes_of: Callable[..., tuple[list[object], list[object]]],
    library: Library,
    places: Places,
    tmp_path: Path,
) -> list[str]:
    """Return the options that change nothing about what a command line does."""
    (tmp_path / "out").mkdir()

    def seen(more: list[object], *, again: bool = False) -> tuple[Any, ...]:
        for made in (tmp_path / "out" / "made", tmp_path / "elsewhere"):
            shutil.rmtree(made, ignore_errors=True)
        for file in (tmp_path / "out").glob("*"):
            if file.is_file():
                file.unlink()
        if again:
            observe(library, command, base, tmp_path)
        found = observe(library, command, [*base, *more], tmp_path)
        return found if "--tflops" in more else _without_durations(found)

    plain = seen([])
    assert plain[0] == 0, plain[2]
    assert plain == seen([]), "the command itself is not repeatable, so that nothing can be seen of its options"
    known: dict[tuple[tuple[str, ...], bool], tuple[Any, ...]] = {((), False): plain}
    ignored = []
    for option in options(command).keys() - {"--help"}:
        without, changed = changes_of(option, places, tmp_path)
        key = (tuple(map(str, without)), option == "--overwrite")
        if key not in known:
            known[key] = seen(without, again=key[1])
        if known[key] == seen(changed, again=key[1]):
            ignored.append(option)
    return ignored


def _without_durations(found: tuple[Any, ...]) -> tuple[Any, ...]:
    """Leave out the lines with durations, and with the hashes that depend on them."""
    lines = [line for line in found[1].splitlines() if not re.search("duration|seconds|SHA-256|TFLOP|collection", line)]
    return (found[0], lines, *found[2:])


def test_every_command_has_a_command_line(places: Places, tmp_path: Path) -> None:
    assert set(command_lines(places, tmp_path)) == set(commands())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_setting_of_a_method_reaches_its_configuration(name: str) -> None:
    """Each option of ``fit --method NAME`` changes one field of the configuration, or is refused."""
    needed = {"amateur": "smollm2"} if name == "cd" else {}
    plain = method_config(name, needed, settings={}, preset=None, seed=0).dump()
    for option in method_options(name):
        if option.kind is Path or option.kind == list[str]:
            continue
        default = plain
        for part in option.setting.split("."):
            default = default[part]
        for value in _other_values(option.kind, default, option):
            try:
                changed = method_config(name, needed | {option.setting: value}, settings={}, preset=None, seed=0).dump()
            except sealign.errors.SealignError:
                continue
            differing = [key for key in plain if plain[key] != changed[key]]
            assert option.setting.split(".")[0] in differing, option.setting
            break
        else:
            raise AssertionError(f"no value of {option.flag} was accepted")


def _other_values(kind: Any, default: Any, option: Any) -> list[Any]:
    """Values that an option may have, other than the default."""

    def literals(annotation: Any) -> list[Any]:
        if get_origin(annotation) is Literal:
            return list(get_args(annotation))
        return [value for part in get_args(annotation) for value in literals(part)]

    if kind is bool:
        return [not default]
    if kind in (int, float):
        return [value for value in (kind(0.5), 2, 3, 0.25) if value != default]
    found = [value for value in literals(option.annotation) if value != default]
    return found or ["few_shot", "other", "0.5", "2", "last:2", "model.layers.{layer}.mlp", "smollm2"]


# --- outputs that cannot be written ---


@pytest.mark.parametrize("command", sorted(WRITING))
def test_an_output_that_cannot_be_written_is_refused_first(
    command: str, library: Library, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    under_a_file = command_lines(places, tmp_path / "file" / "made")[command]
    refused(*command.split(), *under_a_file, words=("file' is a file, but", "choose another output"))
    # Who runs the tests may write everywhere.
    monkeypatch.setattr("sealign.folders.os.access", lambda path, mode, **_: not mode & os.W_OK)
    unwritable = command_lines(places, tmp_path / "folder" / "made")[command]
    refused(*command.split(), *unwritable, words=("is not writable, so", "choose another output"))
    assert not [call for call in library.calls if call[0] != "load_single_edit"]
    assert listing(tmp_path) == ["file"]
