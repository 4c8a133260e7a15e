"""The command that the server is started with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sealign.cli.app import app
from sealign.cli.serve import parse_named_edits
from sealign.edits.affine_edit import AffineEdit
from sealign.edits.edit import Edit
from sealign.errors import EditFileError, ServingError, SettingError
from sealign.serving.launch import server_command
from sealign.serving.settings import ServerSettings, SlotPlan


@pytest.fixture
def folders(small_edit: Edit, tmp_path: Path) -> Path:
    small_edit.save_pretrained(tmp_path / "rescaled")
    small_edit.with_normalization("none").save_pretrained(tmp_path / "linear")
    small_edit.with_strength(0.1).save_pretrained(tmp_path / "library" / "mild")
    (tmp_path / "library" / "notes").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_both_routes(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver,sealign")
    edits = {"a": str(folders / "rescaled"), "b": str(folders / "linear")}
    command, variables = server_command(
        str(folders / "model"), edits, edits_dir=folders / "library", max_edits=3, arguments=["--port", "8001"]
    )
    assert value(command, "--model") == value(command, "--served-model-name") == str(folders / "model")
    plan = SlotPlan.from_config(json.loads(value(command, "--additional-config")))
    assert plan == SlotPlan(("model.layers.*.mlp",), (), 3, 5, ())
    assert value(command, "--worker-extension-cls") == "sealign.serving.worker.EditWorker"
    assert (value(command, "--max-lora-rank"), value(command, "--max-loras")) == ("8", "3")
    assert command[-2:] == ["--port", "8001"]
    assert variables["VLLM_PLUGINS"] == "lora_filesystem_resolver,sealign"
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    settings = ServerSettings.from_environment()
    assert settings.edits == edits
    assert settings.edits_dir == str((folders / "library").resolve())
    assert settings.model == str(folders / "model")


def test_the_weights_are_those_that_the_edit_was_fitted_on(
    folders: Path, small_edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the revision that the edit records."""
    asked: list[tuple[str, str | None]] = []

    def find(name: str, *, revision: str | None = None) -> Path:
        asked.append((name, revision))
        return folders / "model"

    monkeypatch.setattr("sealign.serving.launch.checkpoint_folder", find)
    model = dataclasses.replace(small_edit.base_model, id="owner/name", revision="c0ffee")
    record = dataclasses.replace(small_edit.record, model=model)
    dataclasses.replace(small_edit, record=record).save_pretrained(folders / "remote")
    command, _ = server_command(None, {"a": str(folders / "remote")}, max_edits=1)
    server_command("other/name", {"a": str(folders / "remote")}, max_edits=1)
    assert value(command, "--served-model-name") == "owner/name"
    assert asked == [("owner/name", "c0ffee"), ("other/name", None)]


def test_no_more_than_is_needed(folders: Path) -> None:
    command, _ = server_command(str(folders / "model"), {"a": str(folders / "rescaled")}, max_edits=1)
    assert "--enable-lora" not in command  # which costs plain requests something
    command, _ = server_command(str(folders / "model"), {"b": str(folders / "linear")}, max_edits=1)
    plan = SlotPlan.from_config(json.loads(value(command, "--additional-config")))
    assert plan is not None
    assert plan.outputs == plan.streams == ()


def test_edits_of_other_methods_get_slots(folders: Path, small_edit: Edit) -> None:
    shifts = {layer: AffineEdit.constant(torch.ones(small_edit.width)) for layer in small_edit.layers}
    layers = {layer: dataclasses.replace(entry, rank=0, groups=()) for layer, entry in small_edit.record.layers.items()}
    record = dataclasses.replace(small_edit.record, method="mean_difference", normalization="none", layers=layers)
    Edit(shifts, record).save_pretrained(folders / "shift")
    command, _ = server_command(str(folders / "model"), {"a": str(folders / "shift")}, max_edits=1)
    assert "--enable-lora" not in command
    plan = SlotPlan.from_config(json.loads(value(command, "--additional-config")))
    assert plan == SlotPlan(("model.layers.*.mlp",), (), 1, 1, ())


def test_loras_by_the_plug_in(folders: Path) -> None:
    edits = {"b": str(folders / "linear")}
    command, _ = server_command(str(folders / "model"), edits, max_edits=1, loras=False)
    assert "--enable-lora" not in command
    plan = SlotPlan.from_config(json.loads(value(command, "--additional-config")))
    assert plan is not None
    assert plan.outputs == ("model.layers.*.mlp",)


def test_refusals(folders: Path) -> None:
    model, edits = str(folders / "model"), {"a": str(folders / "rescaled")}
    with pytest.raises(ServingError, match="there is no edit to serve"):
        server_command(model, {}, max_edits=1)
    with pytest.raises(ServingError, match="there is no folder"):
        server_command(model, edits, edits_dir=folders / "gone", max_edits=1)
    with pytest.raises(EditFileError):
        server_command(model, {"a": str(folders / "model")}, max_edits=1)
    for argument in ("--enable-lora", "--additional-config={}", "--worker-extension-cls"):
        with pytest.raises(ServingError, match="is set by sealign serve itself"):
            server_command(model, edits, max_edits=1, arguments=["--port", "1", argument])


def test_edits_have_names() -> None:
    assert parse_named_edits(["a=x=y", "b=owner/name"]) == {"a": "x=y", "b": "owner/name"}
    for given, says in ((["x"], "has no name; write --edit NAME=x"), (["a="], "has no name"), (["a=x", "a=y"], "two")):
        with pytest.raises(SettingError, match=says):
            parse_named_edits(given)
    with pytest.raises(ServingError, match="cannot name an edit"):
        parse_named_edits(["a/b=x"])


def test_without_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sealign.serving.launch.find_spec", lambda _: None)
    result = CliRunner().invoke(app, ["serve", "--edit", "a=x"])
    assert result.exit_code == 2
    assert "pip install 'vllm==" in result.stderr
