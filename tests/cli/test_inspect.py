from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sealign
from sealign.cli.consoles import output
from tests.cli import test_app as shared
from tests.cli.test_app import passed, refused, table_rows

cache = shared.cache
edit_folder = shared.edit_folder
model_folder = shared.model_folder
one_thread = shared.one_thread


@pytest.fixture
def copy(edit_folder: Path, tmp_path: Path) -> Path:
    """A copy of the edit that may be spoilt."""
    return shutil.copytree(edit_folder, tmp_path / "edit")


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the record of an edit by hand."""
    path = folder / "edit.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    edit(record)
    path.write_text(json.dumps(record), encoding="utf-8")


def figure(value: float) -> str:
    """A statistic as the table shows it."""
    return f"{value:.0f}" if value == int(value) else f"{value:.4g}"


def test_tables_show_the_record(edit_folder: Path) -> None:
    edit = sealign.load_edit(edit_folder)
    record = edit.record
    printed = {row[0]: row[1:] for row in table_rows(passed("inspect", "--edit", edit_folder))}
    assert list(printed)[-2:] == ["1", "3"]
    for layer, entry in record.layers.items():
        assert printed[layer][:2] == ["3 + 2", f"{entry.relative_change:.4f}"]
        names = ("explained_variance_positive", "explained_variance_negative", "overlap", "net_share")
        figures = [entry.statistics[name] for name in (*names, "signature")]
        assert printed[layer][2:] == list(map(figure, figures))
    assert (printed["method"], printed["site"], printed["strength"]) == (["sea"], ["mlp"], ["0.7"])
    assert (printed["combine"], printed["centered"], printed["rank"]) == (["both"], ["False"], ["[3, 2]"])
    assert printed["prompt_format.style"] == ["chat"]
    assert printed["normalization"] == ["token"]
    assert printed["feature_map"] == ["identity"]
    assert printed["revision"] == ["not known"]
    assert record.demonstrations_hash is not None
    assert printed["demonstrations"] == [f"6 (SHA-256 {record.demonstrations_hash[:16]})"]
    assert printed["tensors"] == [f"SHA-256 {record.tensors_hash[:16]}"]
    assert printed["hash"] == [f"SHA-256 {edit.hash[:16]}"]


def test_statistics_of_another_method(model_folder: Path, tmp_path: Path) -> None:
    source = ("--demonstrations", "bundled:truthfulness", "--demonstrations-limit", 6)
    folder = tmp_path / "edit"
    passed("fit", "--method", "mean_difference", "--model", model_folder, *source, "--layers", "1", "--output", folder)
    text = passed("inspect", "--edit", folder)
    entry = sealign.load_edit(folder).record.layers["1"]
    assert "shift norm" in text
    assert [row for row in table_rows(text) if row[0] == "1"] == [
        ["1", "0", f"{entry.relative_change:.4f}", *(figure(entry.statistics[n]) for n in ("shift_norm", "signature"))]
    ]


def test_a_method_without_layers(model_folder: Path, tmp_path: Path) -> None:
    passed("fit", "--method", "dola", "--model", model_folder, "--output", tmp_path / "dola")
    text = passed("inspect", "--edit", tmp_path / "dola")
    printed = {row[0]: row[1:] for row in table_rows(text)}
    assert (printed["method"], printed["bucket"], printed["demonstrations"]) == (["dola"], ["high"], ["none"])
    assert "strength" not in printed
    assert "Edited layers" not in text


def test_every_part_of_a_composition_is_shown(edit_folder: Path, copy: Path) -> None:
    found = json.loads(passed("inspect", "--edit", f"{edit_folder}+{copy}", "--json"))
    assert [part["method"] for part in found] == ["sea", "sea"]
    assert passed("inspect", "--edit", f"{edit_folder}+{copy}").count("Edited layers") == 2


def test_json_is_the_record_and_the_hash(edit_folder: Path) -> None:
    edit = sealign.load_edit(edit_folder)
    data = json.loads(passed("inspect", "--edit", edit_folder, "--json"))
    assert data.pop("hash") == edit.hash
    assert data == json.loads(json.dumps(dataclasses.asdict(edit.record)))
    assert data == json.loads((edit_folder / "edit.json").read_text())


@pytest.mark.parametrize("width", [80, 120])
def test_tables_are_whole(edit_folder: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(output, "width", width)
    text = passed("inspect", "--edit", edit_folder)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert "Edited layers: model.layers.{layer}.mlp" in text
    header = next(line for line in text.splitlines() if "signature" in line)
    columns = ["layer", "rank", "change", "var. +", "var. -", "overlap", "net share", "signature"]
    assert [cell.strip() for cell in header.strip("┃").split("┃")] == columns


@pytest.mark.parametrize(("share", "warned"), [(0.0499, True), (0.5, False)])
def test_an_edit_that_nearly_cancels_is_warned_of(copy: Path, share: float, warned: bool) -> None:
    def spread(record: dict[str, Any]) -> None:
        for entry, value in zip(record["layers"].values(), (share, 0.6), strict=True):
            entry["statistics"]["net_share"] = value

    change(copy, spread)
    text = " ".join(passed("inspect", "--edit", copy).split())
    sentence = "What the edit keeps and what it drops nearly cancel at 1 of 2 layers: the net share is 0.050 at layer 1"
    assert (sentence in text) == warned
    assert ("nearly cancel" in text) == warned


def test_modules_of_several_patterns_are_all_named(copy: Path) -> None:
    change(copy, lambda record: record["layers"]["3"].update(module="model.layers.3.block_sparse_moe"))
    text = " ".join(passed("inspect", "--edit", copy).split())
    assert "Edited layers: model.layers.{layer}.mlp (1); model.layers.{layer}.block_sparse_moe (3)" in text
    assert "…" not in text


def test_it_needs_no_model(copy: Path) -> None:
    change(copy, lambda record: record["model"].update(id="gone/[bold]for ever[/]"))
    assert "gone/[bold]for ever[/]" in passed("inspect", "--edit", copy)


SPOILT: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no record": (lambda folder: (folder / "edit.json").unlink(), ("has no edit.json", "check the path")),
    "no tensors": (
        lambda folder: (folder / "edit.safetensors").unlink(),
        ("edit.safetensors'", "the folder is incomplete"),
    ),
    "record cut short": (
        lambda folder: os.truncate(folder / "edit.json", 300),
        ("edit.json' is not JSON", "truncated or corrupted", "copy or download it again"),
    ),
    "tensors cut short": (
        lambda folder: os.truncate(folder / "edit.safetensors", 1000),
        ("edit.safetensors' is truncated or corrupted", "copy or download it again"),
    ),
    "empty files": (
        lambda folder: os.truncate(folder / "edit.safetensors", 0),
        ("edit.safetensors' is truncated or corrupted",),
    ),
    "a flipped bit": (
        lambda folder: _flip(folder / "edit.safetensors"),
        ("do not match their hash", "copy or download the edit again"),
    ),
    "a newer format": (
        lambda folder: change(folder, lambda record: record.update(format_version=4)),
        ("has format version 4", "upgrade sealign"),
    ),
    "another format": (
        lambda folder: change(folder, lambda record: record.update(format="gguf")),
        ("is not a sealign.edit file", "'gguf'", "check the path"),
    ),
    "an extra key": (
        lambda folder: change(folder, lambda record: record.update(surprise=1)),
        ("has an unknown key 'surprise'", "copy or download it again"),
    ),
    "an extra setting": (
        lambda folder: change(folder, lambda record: record["model"].update(bias=True)),
        ("has an unknown key 'model.bias'",),
    ),
    "a missing key": (
        lambda folder: change(folder, lambda record: record["model"].pop("tokenizer_hash")),
        ("has no key 'model.tokenizer_hash'",),
    ),
    "a wrong type": (
        lambda folder: change(folder, lambda record: record.update(strength="1")),
        ("has '1' at key 'strength', which must be a valid number",),
    ),
    "an unknown setting": (
        lambda folder: change(folder, lambda record: record.update(normalization="tokn")),
        ("unknown normalization 'tokn' (did you mean 'token'?)",),
    ),
    "another rank": (
        lambda folder: change(folder, lambda record: record["layers"]["1"].update(rank=4)),
        ("layer 1: tensor ", " has shape (", "but must have (", "copy or download"),
    ),
    "not text": (lambda folder: (folder / "edit.json").write_bytes(b"\xff\xfe\x00"), ("is not JSON",)),
}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("command", ["inspect", "generate", "chat"])
@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_edits_are_refused(copy: Path, how: str, command: str) -> None:
    spoil, words = SPOILT[how]
    spoil(copy)
    prompt = ("--prompt", "What is ice?") if command == "generate" else ()
    refused(command, "--edit", copy, *prompt, words=words)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ("nowhere", ("there is no folder 'nowhere'", "check the path", "owner/name")),
        ("/nowhere/at/all", ("there is no folder '/nowhere/at/all'",)),
        ("nobody/nothing", ("'nobody/nothing' is neither a folder nor a repository", "the network")),
    ],
)
def test_edits_that_are_not_there(edit: str, words: tuple[str, ...]) -> None:
    refused("inspect", "--edit", edit, words=words)
