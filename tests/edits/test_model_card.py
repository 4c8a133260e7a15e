from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

import sealign
from sealign.edits.model_card import model_card
from sealign.edits.record import EditRecord
from tests.edits.test_record import make_record


def with_model(record: EditRecord, **changes: Any) -> EditRecord:
    return dataclasses.replace(record, model=dataclasses.replace(record.model, **changes))


def metadata(card: str) -> Any:
    """The front matter as the Hub reads it."""
    from huggingface_hub import ModelCard  # not before the tests are offline

    return ModelCard(card).data


def table(card: str, heading: str) -> list[list[str]]:
    """The rows of the table below a heading, without its head."""
    section = card.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in rows}) == 1, "a row has too many or too few cells"
    assert all(set(cell) == {"-"} for cell in rows[1])
    return rows[2:]


def test_the_hub_reads_its_metadata() -> None:
    data = metadata(model_card(make_record()))
    assert data.library_name == "sealign"
    assert data.base_model == "owner/tiny-llama"
    assert data.tags == ["sealign", "spectral-editing", "activation-editing"]


@pytest.mark.parametrize("name", ["smollm2", "/models/llama", "./models", "../x", "C:\\models", "a/b/c", "Llama"])
def test_only_a_repository_is_named_as_base_model(name: str) -> None:
    card = model_card(with_model(make_record(), id=name))
    assert metadata(card).base_model is None
    assert f"# Spectral edit of {name}\n" in card


def test_settings_and_layers_are_those_of_the_record() -> None:
    settings = {
        "site": "attention",
        "combine": "negative",
        "normalization": "none",
        "strength": 0.35,
        "feature_map": "tanh",
        "centered": True,
    }
    card = model_card(make_record(**settings))
    rows = dict(table(card, "Settings"))
    assert rows == {name.replace("_", " "): str(value) for name, value in settings.items()}
    assert table(card, "Layers") == [
        ["1", "`model.layers.1.mlp`", "3", "2", "0.0625", "12.25"],
        ["3", "`model.layers.3.mlp`", "1", "4", "0.5000", "1e+06"],
    ]
    assert "the attention outputs of 2 layers" in card
    assert "from 7 demonstrations" in card


def test_provenance() -> None:
    rows = dict(table(model_card(make_record()), "Provenance"))
    assert rows == {
        "base model": "owner/tiny-llama",
        "revision": "0f3c",
        "demonstrations": "7, SHA-256 " + "cc" * 32,
        "tensors": "SHA-256 " + "dd" * 32,
        "versions": "sealign 0.1.0, torch 2.13.0",
    }


def test_what_is_not_known_is_said() -> None:
    record = dataclasses.replace(with_model(make_record(), revision=None), tensors_hash="")
    rows = dict(table(model_card(record), "Provenance"))
    assert rows["revision"] == "not known"
    assert rows["tensors"] == "SHA-256 not saved"


def test_its_code_is_python_with_names_that_exist() -> None:
    card = model_card(with_model(make_record(), id="owner/the-model"))
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 1
    compile(blocks[0], "card", "exec")
    assert 'load_model("owner/the-model")' in blocks[0]
    names = set(re.findall(r"sealign\.(\w+)", blocks[0]))
    assert names == {"load_model", "Edit", "apply_edit"}
    assert names <= set(sealign.__all__)
    assert hasattr(sealign.Edit, "from_pretrained")


def test_the_card_of_a_fit_is_saved_beside_it(small_edit: sealign.Edit, tmp_path: Any) -> None:
    small_edit.save_pretrained(tmp_path / "edit")
    saved = (tmp_path / "edit" / "README.md").read_text(encoding="utf-8")
    loaded = sealign.Edit.from_pretrained(tmp_path / "edit")
    assert saved == model_card(loaded.record)
    assert [row[:4] for row in table(saved, "Layers")] == [
        ["1", "`model.layers.1.mlp`", "3", "2"],
        ["3", "`model.layers.3.mlp`", "3", "2"],
    ]
    assert loaded.record.tensors_hash in saved
