"""``sealign export`` and ``sealign verify`` as a user runs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sealign
from sealign.export.gguf_file import open_gguf, value_of
from sealign.models import loading
from tests.cli import test_app as shared
from tests.cli.test_app import listing, passed, refused, replaced, run
from tests.export.made_edits import edit_of, random_edit
from tests.export.tiny_gguf import write_llama
from tests.tiny_models import build_model

cache = shared.cache
edit_folder = shared.edit_folder
model_folder = shared.model_folder
one_thread = shared.one_thread

pytest.importorskip("peft")
gguf = pytest.importorskip("gguf")


@pytest.fixture
def linear(edit_folder: Path, tmp_path: Path) -> Path:
    """The edit of the command line's tests, without rescaling."""
    edit = sealign.Edit.from_pretrained(edit_folder).with_normalization("none")
    edit.save_pretrained(tmp_path / "linear")
    return tmp_path / "linear"


def test_export_and_verify(linear: Path, tmp_path: Path) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    text = passed("export", "lora", "--edit", linear, "--output", adapter)
    assert "tensors carry the edit" in text
    data = json.loads(passed("export", "merged", "--edit", linear, "--output", merged, "--json"))
    assert data["path"] == str(merged)
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
    weak = run(*args, "--strength", "1e-7")
    assert weak.stderr.startswith("note: the edit has next to no effect on these prompts: ")
    assert weak.stderr.endswith("or verify at a larger --strength\n")
    assert weak.stderr.count("\n") == 1
    assert not any(agreement["has_effect"] for agreement in json.loads(run(*args, "--strength", 0, "--json").stdout))


def test_a_lora_is_exported_without_loading_the_model(
    linear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the checkpoint is not in safetensors, or the model is needed to measure a deviation."""
    folder = tmp_path / "model"
    shutil.copytree(sealign.Edit.from_pretrained(linear).base_model.id, folder)
    loaded: list[object] = []
    load = loading.load_model

    def counting(*args: Any, **settings: Any) -> Any:
        loaded.append(args)
        return load(*args, **settings)

    monkeypatch.setattr(loading, "load_model", counting)
    args: tuple[object, ...] = ("export", "lora", "--edit", linear, "--model", folder, "--output")
    passed(*args, tmp_path / "read")
    assert loaded == []
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    passed(*args, tmp_path / "loaded")
    assert len(loaded) == 1
    read, written = (tmp_path / name / "adapter_model.safetensors" for name in ("read", "loaded"))
    assert read.read_bytes() == written.read_bytes()


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


def test_a_model_that_the_edit_was_not_fitted_on(linear: Path, tokenizer: Any, tmp_path: Path) -> None:
    other, merged = tmp_path / "other", tmp_path / "merged"
    build_model("llama", vocab_size=len(tokenizer), intermediate_size=96).save_pretrained(other)
    tokenizer.save_pretrained(other)
    command: tuple[object, ...] = ("export", "merged", "--edit", linear, "--model", other, "--output", merged)
    refused(*command, words=("intermediate_size is 96 instead of 80", "--ignore-mismatch"))
    passed(*command, "--ignore-mismatch")
    check: tuple[object, ...] = ("verify", "--edit", linear, "--model", other, "--against", f"merged={merged}")
    refused(*check, words=("intermediate_size is 96 instead of 80", "--ignore-mismatch"))
    (agreement,) = json.loads(passed(*check, "--ignore-mismatch", "--json"))
    assert agreement["passed"]
    assert agreement["effect"] > 0


def test_an_approximation_for_another_model_is_measured_on_it(
    edit_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    build_model("llama", vocab_size=len(tokenizer), intermediate_size=96).save_pretrained(other)
    tokenizer.save_pretrained(other)
    for kind in ("lora", "merged"):
        command = ("export", kind, "--edit", edit_folder, "--model", other, "--output", tmp_path / kind)
        data = json.loads(passed(*command, "--approximate", "--ignore-mismatch", "--json"))
        assert data["deviation"]["mean_divergence"] > 0


def test_a_shift_of_the_residual_stream(model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = sealign.load_model(str(model_folder), device="cpu")
    shift = edit_of(model, tokenizer, {2: sealign.AffineEdit.constant(torch.ones(48))}, site="residual")
    shift.save_pretrained(tmp_path / "shift")
    command = ("export", "control-vector", "--edit", tmp_path / "shift", "--output", tmp_path / "vector.gguf")
    data = json.loads(passed(*command, "--strength", 0.25, "--json"))
    assert data["changed"] == ["direction.2"]
    reader = open_gguf(tmp_path / "vector.gguf")
    np.testing.assert_array_equal(reader.tensors[0].data, np.full(48, 0.25, np.float32))
    assert value_of(reader, "controlvector.model_hint") == "llama"
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "1 tensors carry the edit" in replaced(*command, "--base", tmp_path / "base.gguf")
    assert value_of(open_gguf(tmp_path / "vector.gguf"), "controlvector.model_hint") == "qwen2"
    refused(
        "export", "merged", "--edit", tmp_path / "shift", "--output", tmp_path / "merged",
        words=("acts on the residual stream", "sealign export control-vector"),
    )  # fmt: skip


def test_gguf_files(tokenizer: Any, tmp_path: Path) -> None:
    """The model comes from a folder, the weights from a GGUF file that is named."""
    model = build_model("llama", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model, _ = sealign.load_model(str(tmp_path / "model"), device="cpu")
    base = write_llama(model, tmp_path / "base.gguf")
    random_edit(model, tokenizer, normalization="token").save_pretrained(tmp_path / "edit")
    command: tuple[object, ...] = ("export", "gguf", "--edit", tmp_path / "edit", "--output", tmp_path / "out.gguf")
    refused(*command, "--approximate", words=("not loaded from a GGUF file; name its GGUF file with --base",))
    refused(*command, "--base", base, words=("rescaled per token", "--approximate"))
    text = " ".join(passed(*command, "--base", base, "--approximate").split())
    assert "Wrote the GGUF model" in text
    assert "Without its rescaling the edit differs: KL" in text
    assert "Types of these tensors: F32. After rounding, 100% of the edit is left." in text
    data = json.loads(replaced(*command, "--base", base, "--approximate", "--lora", "--json"))
    assert data["changed"] == ["blk.1.ffn_down.weight", "blk.3.ffn_down.weight"]
    assert data["rewritten"] == []
    assert value_of(open_gguf(tmp_path / "out.gguf"), "general.type") == "adapter"


def test_several_edits_are_exported_one_after_another_and_verified_together(linear: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    both = f"{linear}+{linear}"
    refused("export", "merged", "--edit", both, "--output", second, words=("names 2 edits, but only one",))
    passed("export", "merged", "--edit", linear, "--output", first)
    passed("export", "merged", "--edit", linear, "--model", first, "--ignore-mismatch", "--output", second)
    (agreement,) = json.loads(passed("verify", "--edit", both, "--against", f"merged={second}", "--json"))
    assert agreement["passed"]
    assert run("verify", "--edit", both, "--against", f"merged={first}").exit_code == 1


def test_refusals(linear: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    for kind in ("lora", "merged"):
        refused(
            "export",
            kind,
            "--edit",
            linear,
            "--output",
            tmp_path / "thesis",
            words=("has no sealign.json written by Sealign",),
        )
    assert listing(tmp_path / "thesis") == ["chapter.tex"]
    refused(
        "verify", "--edit", linear, "--against", "lorry=x", words=("unknown deployment 'lorry'", "did you mean 'lora'")
    )
    refused(
        "verify", "--edit", linear, "--against", f"lora={tmp_path}/no", words=("there is no folder", "check the path")
    )
    refused("verify", "--edit", linear, "--against", f"gguf={tmp_path}", words=("there is no file", "check the path"))
    refused(
        "verify", "--edit", linear, "--against", "vllm=http://x", words=("names no edit; write vllm=http://x#NAME",)
    )


def test_a_gated_edit_is_shown_and_not_exported(model_folder: Path, tmp_path: Path) -> None:
    args: list[object] = ["fit", "--model", model_folder, "--demonstrations", "bundled:fairness", "--output"]
    args += [tmp_path / "edit", "--demonstrations-limit", 8, "--strength", 1, "--method", "targeted_shift"]
    passed(*args, "--site", "mlp", "--layers", "1,2", "--set", "gate=0.2")
    shown = passed("inspect", "--edit", tmp_path / "edit")
    assert ["0.2"] in [row[1:] for row in shared.table_rows(shown) if row[0] == "gate"]
    record = json.loads(passed("inspect", "--edit", tmp_path / "edit", "--json"))
    assert record["layers"]["2"]["statistics"]["gate_neutral_share"] < 0.4
    for kind in ("lora", "merged"):
        words = ("the edit has a gate", "serve it with sealign serve")
        refused("export", kind, "--edit", tmp_path / "edit", "--output", tmp_path / kind, words=words)
    refused(*args[:-1], "mean_difference", "--gate", "2", "--overwrite", words=("gate is 2.0", "in (0, 1)"))
    assert listing(tmp_path) == ["edit", *(f"edit/{name}" for name in listing(tmp_path / "edit"))]
