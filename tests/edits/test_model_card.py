from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from huggingface_hub import ModelCard

import sealign
from sealign.edits.model_card import model_card, show_effect, shown_effect
from sealign.edits.record import EditRecord, LayerRecord
from tests.edits.edit_data import make_record


def with_model(record: EditRecord, **changes: Any) -> EditRecord:
    return dataclasses.replace(record, model=dataclasses.replace(record.model, **changes))


def front_matter(card: str) -> dict[str, Any]:
    """The front matter, read as plain YAML."""
    import yaml

    _, text, _ = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def metadata(card: str) -> Any:
    """The front matter as the Hub reads it."""
    from huggingface_hub import ModelCard  # not before the tests are offline

    return ModelCard(card).data


def table(card: str, heading: str) -> list[list[str]]:
    """The rows of the table below a heading, without its header."""
    section = card.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len({len(row) for row in rows}) == 1, "a row has too many or too few cells"
    assert all(set(cell) == {"-"} for cell in rows[1])
    return rows[2:]


def test_the_hub_reads_its_metadata() -> None:
    card = model_card(make_record(method="mean_difference"))
    data = metadata(card)
    assert data.library_name == "sealign"
    assert data.base_model == "owner/tiny-llama"
    assert data.tags == ["sealign", "activation-editing", "mean-difference"]


@pytest.mark.parametrize("name", ["owner/tiny-llama", "no/yes", "1e3/0x10", "a-b/c.d_e", "smollm2", "it's: a #\nmodel"])
def test_the_front_matter_is_valid_for_the_hub(name: str) -> None:
    """Strings where the Hub wants strings, whatever the name looks like, and no key without a value."""
    card = model_card(with_model(make_record(), id=name))
    assert card.startswith("---\n")
    found = front_matter(card)
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    assert list(found) == (["base_model"] if named else []) + ["library_name", "tags", "sealign"]
    assert found.get("base_model") == (name if named else None)
    assert all(type(tag) is str for tag in found["tags"])
    assert metadata(card).to_dict() == found


@pytest.mark.parametrize(
    "name", ["smollm2", "/models/llama", "./models", "../x", "C:\\models", "a/b/c", "Llama", "a/..", "-a/b", "x/y z"]
)
def test_only_a_repository_is_named_as_base_model(name: str) -> None:
    card = model_card(with_model(make_record(), id=name))
    assert metadata(card).base_model is None
    assert f"# sea edit of {name}\n" in card


def test_a_folder_that_looks_like_a_repository(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert metadata(model_card(with_model(make_record(), id="models/llama"))).base_model is None
    assert metadata(model_card(with_model(make_record(), id="models/other"))).base_model == "models/other"


def test_settings_and_layers_are_those_of_the_record() -> None:
    card = model_card(make_record(site="attention", strength=0.35, feature_map="tanh", combine="negative"))
    rows = dict(table(card, "Settings"))
    assert rows == {
        "method": "sea",
        "site": "attention",
        "normalization": "token",
        "feature map": "tanh",
        "strength": "0.35",
        "rank": "[3, 2]",
        "prompt format.style": "chat",
        "prompt format.preamble": "not set",
        "seed": "0",
    }
    assert table(card, "Layers") == [
        ["1", "`model.layers.1.mlp`", "3 + 2", "0.0625", "0.25", "12.25"],
        ["3", "`model.layers.3.mlp`", "3", "0.5000", "", "1e+06"],
    ]
    assert "| layer | module | rank | relative change | overlap | signature |" in card
    assert "A tanh edit of the attention outputs of 2 layers, fitted with the method sea from 7 demonstrations." in card
    assert "A low-rank affine edit of the mlp outputs of 2 layers" in model_card(make_record())


def test_settings_that_could_break_a_table() -> None:
    card = model_card(make_record(config={"pattern": "a|b", "text": "two\nlines", "long": "x" * 300}))
    rows = dict(table(card, "Settings"))
    assert (rows["pattern"], rows["text"], rows["long"]) == ("a\\|b", "two lines", "x" * 197 + "...")


def test_what_was_learned_is_a_setting_too() -> None:
    rows = dict(table(model_card(make_record(config={"heads": 2}, learned={"selected": [[0, 1]]})), "Settings"))
    assert (rows["heads"], rows["selected"]) == ("2", "[[0, 1]]")


def test_a_setting_of_the_fit_does_not_replace_that_of_the_edit() -> None:
    rows = dict(table(model_card(make_record(config={"strength": 1.0, "site": "residual"})), "Settings"))
    assert (rows["strength"], rows["site"]) == ("0.7", "mlp")


def test_the_effect_is_said_or_shown() -> None:
    card = model_card(make_record())
    assert "\n## Effect\n\nNot evaluated." in card
    first = show_effect(card, "**Helps** by \\1.\n\n| a |\n| --- |\n| 1 |", verdict="helps", loss_increase=0.01234)
    assert "\n## Effect\n\n**Helps** by \\1.\n\n| a |\n| --- |\n| 1 |\n\n## Settings\n" in first
    assert "Not evaluated" not in first
    assert shown_effect(first) == "**Helps** by \\1.\n\n| a |\n| --- |\n| 1 |"
    facts = {"method": "sea", "verdict": "helps", "loss_increase": 0.0123}
    assert ModelCard(first).data.to_dict() == ModelCard(card).data.to_dict() | {"sealign": facts}
    harms: dict[str, Any] = {"verdict": "harms: a 'colon'", "loss_increase": 1.0}
    second = show_effect(first, "**Harms.**", **harms)
    assert second == show_effect(card, "**Harms.**", **harms)
    assert ModelCard(second).data.to_dict()["sealign"]["verdict"] == "harms: a 'colon'"
    assert table(second, "Settings") == table(card, "Settings")
    assert show_effect("# My own card\n", "**Harms.**", **harms) == "# My own card\n"
    assert shown_effect("# My own card\n") == ""


def test_a_method_that_does_not_edit_activations() -> None:
    card = model_card(make_record(method="icl", site=None, strength=None, layers={}, config={"shots": 4}))
    assert "# icl edit of owner/tiny-llama\n" in card
    assert "An intervention fitted with the method icl from 7 demonstrations." in card
    assert dict(table(card, "Settings")) == {"method": "icl", "shots": "4"}
    assert "## Layers" not in card


def test_a_pure_shift() -> None:
    layer = LayerRecord(module="model.layers.1", rank=0, scale=0.0, relative_change=0.5, statistics={})
    assert table(model_card(make_record(layers={"1": layer})), "Layers") == [["1", "`model.layers.1`", "0", "0.5000"]]


def test_provenance() -> None:
    rows = dict(table(model_card(make_record()), "Provenance"))
    assert rows == {
        "base model": "owner/tiny-llama",
        "revision": "0f3c",
        "demonstrations": "7, SHA-256 " + "cc" * 32,
        "held out": "none",
        "tensors": "SHA-256 " + "dd" * 32,
        "versions": "sealign 0.1.0, torch 2.13.0",
    }


def test_unknown_provenance() -> None:
    record = with_model(make_record(demonstrations_hash=None, fitted_on=[]), revision=None)
    rows = dict(table(model_card(record), "Provenance"))
    assert (rows["revision"], rows["demonstrations"]) == ("not known", "none")


@pytest.mark.parametrize("name", ["owner/the-model", 'C:\\new"models', "/models/x"])
def test_its_code_is_python_with_names_that_exist(name: str) -> None:
    card = model_card(with_model(make_record(), id=name))
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 1
    code = compile(blocks[0], "card", "exec")
    assert name in code.co_consts
    names = set(re.findall(r"sealign\.(\w+)", blocks[0]))
    assert names == {"load_model", "load_edit", "apply_edit"}
    assert names <= set(sealign.__all__)


def test_the_card_of_a_fit_is_saved_beside_it(small_edit: sealign.Edit, tmp_path: Any) -> None:
    small_edit.save_pretrained(tmp_path / "edit")
    saved = (tmp_path / "edit" / "README.md").read_text(encoding="utf-8")
    loaded = sealign.Edit.from_pretrained(tmp_path / "edit")
    assert saved == model_card(loaded.record)
    assert [row[:3] for row in table(saved, "Layers")] == [
        ["1", "`model.layers.1.mlp`", "3 + 2"],
        ["3", "`model.layers.3.mlp`", "3 + 2"],
    ]
    assert loaded.record.tensors_hash in saved


def test_a_gate_is_said() -> None:
    words = "acts only on tokens that a probe selects"
    assert words in model_card(make_record(config={"gate": 0.1}))
    assert words not in model_card(make_record(config={"gate": None}))
