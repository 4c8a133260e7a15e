"""What ``sealign serve`` plans and tells its processes."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

import sealign
from sealign.errors import ExportError, ServingError, UnknownEditError
from sealign.export.lora import lora_factors
from sealign.serving.settings import (
    BankPlan,
    ServerSettings,
    check_name,
    find_in_library,
    is_lora,
    lora_rank,
    plan_bank,
)


def changed(edit: sealign.Edit, **settings: Any) -> sealign.Edit:
    record = dataclasses.replace(edit.record, settings=dataclasses.replace(edit.settings, **settings))
    return dataclasses.replace(edit, record=record)


def test_the_plan_has_places_on_every_layer(small_edit: sealign.Edit) -> None:
    layers = {
        layer: dataclasses.replace(entry, module=f"model.layers.{layer}")
        for layer, entry in small_edit.record.layers.items()
    }
    stream = changed(small_edit, site="residual")
    stream = dataclasses.replace(stream, record=dataclasses.replace(stream.record, layers=layers))
    plan = plan_bank({"a": small_edit, "b": stream, "c": changed(small_edit, feature_map="elu")}, max_edits=2)
    assert plan == BankPlan(("model.layers.*.mlp",), ("model.layers.*",), 3, 5, ("elu",))
    assert plan_bank({"a": small_edit}, max_edits=6).size.edits == 6


def test_the_plan_passes_through_the_engine_s_configuration(small_edit: sealign.Edit) -> None:
    plan = plan_bank({"a": changed(small_edit, feature_map="tanh")}, max_edits=4)
    config = json.loads(json.dumps(plan.as_config() | {"other": 1}))
    assert BankPlan.from_config(config) == plan
    assert BankPlan.from_config({"other": 1}) is None
    assert BankPlan.from_config(None) is None


def test_settings_pass_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ServerSettings("smollm2", {"mild": "/edits/mild = 1"}, None, "/cache")
    monkeypatch.delenv("SEALIGN_SERVING", raising=False)
    with pytest.raises(ServingError, match="start the server with sealign serve"):
        ServerSettings.from_environment()
    for name, value in settings.to_environment().items():
        monkeypatch.setenv(name, value)
    assert ServerSettings.from_environment() == settings


def test_the_route_is_that_of_the_export(llama: Any, small_edit: sealign.Edit) -> None:
    """What is said to be a LoRA can be exported as one, and nothing else can."""
    combines = ("both", "positive", "negative", "average", "reversed")
    for combine, normalization, feature_map in itertools.product(combines, ("token", "none"), ("identity", "tanh")):
        edit = changed(small_edit, combine=combine, normalization=normalization, feature_map=feature_map)
        try:
            lora_factors(llama, edit)
            exported = True
        except ExportError:
            exported = False
        assert is_lora(edit) == exported, (combine, normalization, feature_map)
    plain = changed(small_edit, normalization="none")
    assert is_lora(plain)
    assert not is_lora(changed(plain, centered=True))
    assert not is_lora(changed(plain, site="residual"))


def test_ranks_are_those_that_the_engine_makes_room_for(small_edit: sealign.Edit) -> None:
    assert lora_rank([small_edit]) == 8
    wide = small_edit.projections[1]
    many = dataclasses.replace(wide, positive=wide.positive.new_zeros(wide.width, 600))
    with pytest.raises(ServingError, match="rank 602, but the server's LoRAs are of rank 512"):
        lora_rank([dataclasses.replace(small_edit, projections={1: many})])


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", "a\\b", "a b", "a\n", "-a", "é", "x" * 101])
def test_names_are_never_paths(name: str, tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="cannot name an edit"):
        check_name(name)
    with pytest.raises(ServingError, match="cannot name an edit"):
        find_in_library(tmp_path, name)


def test_the_library(tmp_path: Path) -> None:
    (tmp_path / "mild").mkdir()
    (tmp_path / "file").write_text("")
    assert find_in_library(tmp_path, "mild") == tmp_path / "mild"
    for name in ("file", "absent"):
        with pytest.raises(UnknownEditError, match="which has: mild"):
            find_in_library(tmp_path, name)
    with pytest.raises(ServingError, match="start it with --edits-dir"):
        find_in_library(None, "mild")
