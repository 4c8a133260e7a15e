"""``sealign export`` and ``sealign verify`` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sealign
from tests.cli import test_app as shared
from tests.cli.test_app import listing, passed, refused, run

cache = shared.cache
edit_folder = shared.edit_folder
model_folder = shared.model_folder
one_thread = shared.one_thread

pytest.importorskip("peft")


@pytest.fixture
def linear(edit_folder: Path, tmp_path: Path) -> Path:
    """The edit of the command line's tests, without rescaling."""
    edit = sealign.Edit.from_pretrained(edit_folder).with_settings(normalization="none")
    edit.save_pretrained(tmp_path / "linear")
    return tmp_path / "linear"


def test_export_and_verify(linear: Path, tmp_path: Path) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    text = passed("export", "lora", "--edit", linear, "--output", adapter)
    assert "tensors carry the edit" in text
    data = json.loads(passed("export", "merged", "--edit", linear, "--output", merged, "--json"))
    assert all(name.endswith("mlp.down_proj.weight") for name in data["changed"])
    assert data["deviation"] is None
    args = ("verify", "--edit", linear, "--against", f"lora={adapter}", "--against", f"merged={merged}")
    found = json.loads(passed(*args, "--json"))
    assert [agreement["name"] for agreement in found] == [f"lora={adapter}", f"merged={merged}"]
    for agreement in found:
        assert agreement["fired"] is agreement["passed"] is True
        assert agreement["largest"] < 1e-3
        assert agreement["same_tokens"] == 1.0
    assert "equal" in passed(*args)


def test_a_deployment_that_differs_fails(linear: Path, model_folder: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    passed("export", "merged", "--edit", linear, "--output", merged, "--strength", 0.3)
    result = run("verify", "--edit", linear, "--against", f"merged={merged}")
    assert result.exit_code == 1
    assert "differs" in result.stdout or "does not edit" in result.stdout
    result = run("verify", "--edit", linear, "--against", f"merged={model_folder}")
    assert result.exit_code == 1
    assert "does not edit" in result.stdout


def test_approximations_are_measured_and_kept(edit_folder: Path, tmp_path: Path) -> None:
    for kind in ("lora", "merged"):
        folder = tmp_path / kind
        refused(
            "export", kind, "--edit", edit_folder, "--output", folder, words=("is rescaled per token", "--approximate")
        )
        assert not folder.exists()
        text = passed("export", kind, "--edit", edit_folder, "--output", folder, "--approximate")
        assert "Without its rescaling the edit differs: KL" in " ".join(text.split())
        kept = json.loads((folder / "deviation.json").read_text())
        assert kept["mean_divergence"] > 0
        assert 0 <= kept["same_top"] <= 1


def test_refusals(linear: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    for kind in ("lora", "merged"):
        refused("export", kind, "--edit", linear, "--output", tmp_path / "thesis", words=("was not written by Sealign",))
    assert listing(tmp_path / "thesis") == ["chapter.tex"]
    refused(
        "verify", "--edit", linear, "--against", "lorry=x", words=("unknown deployment 'lorry'", "did you mean 'lora'")
    )
    refused(
        "verify", "--edit", linear, "--against", f"lora={tmp_path}/no", words=("there is no folder", "check the path")
    )
