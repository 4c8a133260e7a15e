"""The command line that the engine is started with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sealign
from sealign.cli import app
from sealign.cli.serve import named_edits
from sealign.errors import EditFileError, ServingError, SettingError
from sealign.serving.launch import server_command
from sealign.serving.settings import BankPlan, ServerSettings


@pytest.fixture
def folders(small_edit: sealign.Edit, tmp_path: Path) -> Path:
    small_edit.save_pretrained(tmp_path / "rescaled")
    small_edit.with_settings(normalization="none").save_pretrained(tmp_path / "linear")
    small_edit.with_settings(strength=0.1).save_pretrained(tmp_path / "library" / "mild")
    (tmp_path / "library" / "notes").mkdir()
    (tmp_path / "model").mkdir()
    return tmp_path


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_both_routes(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver,sealign")
    edits = {"a": str(folders / "rescaled"), "b": str(folders / "linear")}
    command, variables = server_command(
        str(folders / "model"), edits, folders / "library", max_edits=3, arguments=["--port", "8001"]
    )
    assert value(command, "--model") == value(command, "--served-model-name") == str(folders / "model")
    plan = BankPlan.from_config(json.loads(value(command, "--additional-config")))
    assert plan == BankPlan(("model.layers.*.mlp",), (), 3, 5, ())
    assert value(command, "--worker-extension-cls") == "sealign.serving.worker.EditWorker"
    assert (value(command, "--max-lora-rank"), value(command, "--max-loras")) == ("8", "3")
    assert command[-2:] == ["--port", "8001"]
    assert variables["VLLM_PLUGINS"] == "lora_filesystem_resolver,sealign"
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    settings = ServerSettings.from_environment()
    assert settings.edits == edits
    assert settings.library == str((folders / "library").resolve())
    assert settings.model == str(folders / "model")


def test_no_more_than_is_needed(folders: Path) -> None:
    command, _ = server_command(str(folders / "model"), {"a": str(folders / "rescaled")}, None, max_edits=1)
    assert "--enable-lora" not in command  # which costs plain requests something
    command, _ = server_command(str(folders / "model"), {"b": str(folders / "linear")}, None, max_edits=1)
    plan = BankPlan.from_config(json.loads(value(command, "--additional-config")))
    assert plan is not None
    assert plan.outputs == plan.streams == ()


def test_loras_by_the_plug_in(folders: Path) -> None:
    edits = {"b": str(folders / "linear")}
    command, _ = server_command(str(folders / "model"), edits, None, max_edits=1, loras=False)
    assert "--enable-lora" not in command
    plan = BankPlan.from_config(json.loads(value(command, "--additional-config")))
    assert plan is not None
    assert plan.outputs == ("model.layers.*.mlp",)


def test_refusals(folders: Path) -> None:
    model, edits = str(folders / "model"), {"a": str(folders / "rescaled")}
    with pytest.raises(ServingError, match="there is no edit to serve"):
        server_command(model, {}, None, max_edits=1)
    with pytest.raises(ServingError, match="there is no folder"):
        server_command(model, edits, folders / "gone", max_edits=1)
    with pytest.raises(EditFileError):
        server_command(model, {"a": str(folders / "model")}, None, max_edits=1)
    for argument in ("--enable-lora", "--additional-config={}", "--worker-extension-cls"):
        with pytest.raises(ServingError, match="is set by sealign serve itself"):
            server_command(model, edits, None, max_edits=1, arguments=["--port", "1", argument])


def test_edits_have_names() -> None:
    assert named_edits(["a=x=y", "b=owner/name"]) == {"a": "x=y", "b": "owner/name"}
    for given, says in ((["x"], "has no name; write --edit NAME=x"), (["a="], "has no name"), (["a=x", "a=y"], "two")):
        with pytest.raises(SettingError, match=says):
            named_edits(given)
    with pytest.raises(ServingError, match="cannot name an edit"):
        named_edits(["a/b=x"])


def test_without_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sealign.serving.command.find_spec", lambda _: None)
    result = CliRunner().invoke(app, ["serve", "--edit", "a=x"])
    assert result.exit_code == 2
    assert "pip install vllm" in result.stderr
