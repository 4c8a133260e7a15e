"""What commands may replace: nothing that Sealign did not write, nothing they read, and the rest only if asked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import sealign
from sealign.models import loading
from tests.cli import test_app as shared
from tests.cli.test_app import commands, listing, passed, refused, run

cache = shared.cache
edit_folder = shared.edit_folder
model_folder = shared.model_folder
one_thread = shared.one_thread
rows = shared.rows

WRITING = {name for name, command in commands().items() if any("--output" in param.opts for param in command.params)}


@pytest.fixture
def base(model_folder: Path, tmp_path: Path) -> Path:
    """A base model that may be lost."""
    folder = tmp_path / "base"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def linear(edit_folder: Path, tmp_path: Path) -> Path:
    edit = sealign.Edit.from_pretrained(edit_folder).with_normalization("none")
    edit.save_pretrained(tmp_path / "linear")
    return tmp_path / "linear"


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("loaded before the output was checked")

    for name in ("load_model", "checkpoint_folder"):
        monkeypatch.setattr(loading, name, load)


def _contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in listing(folder) if (folder / name).is_file()}


def test_every_command_that_writes_can_overwrite() -> None:
    assert {"fit", "tune", "evaluate", "reproduce", "demo", "export merged", "plot tsne"} < WRITING
    for name in WRITING:
        assert any("--overwrite" in param.opts for param in commands()[name].params), name


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("path", ["base", "link", "linear/../base"])
@pytest.mark.parametrize("kind", ["lora", "merged"])
def test_the_base_model_is_never_replaced(
    kind: str, path: str, base: Path, linear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("base")
    (base / "adapter_config.json").write_text("{}")  # a folder that looks like every kind of output
    before = _contents(base)
    args = ("export", kind, "--edit", linear, "--model", base, "--output", path)
    for more in ((), ("--overwrite",)):
        refused(*args, *more, words=(f"'{path}'", "is not replaced; choose a"))
    assert _contents(base) == before
    assert sorted(os.listdir(tmp_path)) == ["base", "linear", "link"]


def test_no_export_replaces_the_merged_checkpoint_that_it_reads(base: Path, linear: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    passed("export", "merged", "--edit", linear, "--model", base, "--output", merged)
    before = _contents(merged)
    for kind in ("lora", "merged"):
        args = ("export", kind, "--edit", linear, "--model", merged, "--output", merged, "--overwrite")
        refused(*args, words=("is the folder that is read from",))
    assert _contents(merged) == before


def test_an_earlier_export_is_replaced_whole(edit_folder: Path, linear: Path, base: Path, tmp_path: Path) -> None:
    """No file of the first export stays beside the second one, and the user's stay."""
    for kind in ("lora", "merged"):
        folder = tmp_path / kind
        args: list[Any] = ["export", kind, "--model", base, "--output", folder]
        passed(*args, "--edit", edit_folder, "--approximate")
        assert (folder / "deviation.json").is_file()
        (folder / "notes.md").write_text("mine")
        before = _contents(folder)
        refused(*args, "--edit", linear, words=("exists already, and is replaced only with --overwrite",))
        assert _contents(folder) == before
        result = run(*args, "--edit", linear, "--overwrite")
        assert result.exit_code == 0
        assert result.stderr == f"'{folder}' exists and will be replaced.\n"
        assert listing(folder) == sorted(before.keys() - {"deviation.json"})
        assert (folder / "notes.md").read_text() == "mine"


@pytest.mark.usefixtures("no_loading")
def test_edits_and_figures_are_not_replaced(
    edit_folder: Path, model_folder: Path, rows: Path, tmp_path: Path, linear: Path
) -> None:
    before = _contents(linear)
    words = ("exists already, and is replaced only with --overwrite",)
    refused("fit", "--model", model_folder, "--demonstrations", rows, "--output", linear, words=words)
    shutil.copytree(linear, tmp_path / "edits" / "truthfulness")
    refused("demo", "--model", model_folder, "--output", tmp_path / "edits", words=words)
    refused("export", "lora", "--edit", linear, "--output", linear, words=("is the folder that is read from",))
    assert _contents(linear) == before
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    (tmp_path / "rows.csv").write_text("prompt,positive,negative\na,b,c\n")
    plot = ("plot", "effect", "--edit", edit_folder, "--demonstrations", tmp_path / "rows.csv", "--output")
    refused(*plot, tmp_path / "rows", words=("rows.csv' is the file that is read from",))
    refused(*plot, tmp_path / "rows", "--overwrite", words=("rows.csv' is the file that is read from",))
    (tmp_path / "figure.png").write_text("mine")
    refused(*plot, tmp_path / "figure", words=("figure.png' exists already",))


@pytest.mark.usefixtures("no_loading")
def test_gguf_files_are_not_replaced(linear: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    base, link = tmp_path / "base.gguf", tmp_path / "link.gguf"
    base.write_bytes(b"weights")
    link.symlink_to(base)
    args = ("export", "gguf", "--edit", linear, "--base", base, "--overwrite", "--output")
    for more in ((), ("--lora",)):
        refused(*args, link, *more, words=("link.gguf' is the file that is read from",))
    refused("export", "control-vector", *args[2:], base, words=("base.gguf' is the file that is read from",))
    for command in ("gguf", "control-vector"):
        own = linear / "edit.json"
        refused("export", command, *args[2:], own, words=("edit.json' is the file that is read from",))
    assert base.read_bytes() == b"weights"


@pytest.mark.usefixtures("no_loading")
def test_files_of_others_in_the_folder_of_a_run(model_folder: Path, linear: Path, rows: Path, tmp_path: Path) -> None:
    for module in ("lm_eval", "matplotlib"):
        pytest.importorskip(module)
    (tmp_path / "mine").mkdir()
    for name in ("report.html", "evaluation"):
        (tmp_path / "mine" / name).write_text("mine")
    common = ("--tasks", "truthfulqa_mc1", "--output", tmp_path / "mine", "--overwrite")
    refused("evaluate", "--edit", linear, *common, words=("report.html' was not written by Sealign",))
    args = ("tune", "--model", model_folder, "--demonstrations", rows, *common)
    refused(*args, words=("evaluation' was not written by Sealign",))
    assert listing(tmp_path / "mine") == ["evaluation", "report.html"]
