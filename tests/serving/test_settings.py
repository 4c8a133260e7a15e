"""What ``sealign serve`` plans and passes to its processes."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sealign
from sealign.edits.affine_edit import AffineEdit
from sealign.edits.edit import Edit
from sealign.edits.layer_edit import LayerEdit
from sealign.errors import ExportError, ServingError, UnknownEditError
from sealign.export.lora import lora_factors
from sealign.methods.sea import projection_edit
from sealign.serving.settings import (
    ServerSettings,
    SlotPlan,
    check_name,
    find_in_edits_dir,
    is_lora,
    lora_rank,
    plan_slots,
)
from sealign.spectral.projection import COMBINES, Projection


def with_layer_edit(edit: Edit, layer_edit: LayerEdit, **changes: Any) -> Edit:
    """The same layers, all with one edit."""
    changes = {"normalization": layer_edit.normalization, "feature_map": layer_edit.feature_map} | changes
    return Edit(dict.fromkeys(edit.layers, layer_edit), dataclasses.replace(edit.record, **changes))


def factors(width: int, rank: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(width, rank), torch.randn(rank, width)


def projection(width: int, *, centered: bool = False, feature_map: str = "identity") -> Projection:
    basis = torch.linalg.qr(torch.randn(width, 5))[0]
    mean = torch.randn(width) if centered else None
    return Projection(basis[:, :3].contiguous(), basis[:, 3:].contiguous(), mean, feature_map)


def stream(edit: Edit) -> Edit:
    layers = {
        layer: dataclasses.replace(entry, module=f"model.layers.{layer}") for layer, entry in edit.record.layers.items()
    }
    return Edit(edit.layer_edits, dataclasses.replace(edit.record, layers=layers, site="residual"))


def test_the_plan_has_slots_on_every_layer(small_edit: Edit) -> None:
    elu = with_layer_edit(small_edit, projection_edit(projection(small_edit.width, feature_map="elu")), combine="both")
    plan = plan_slots({"a": small_edit, "b": stream(small_edit), "c": elu}, max_edits=2)
    assert plan == SlotPlan(("model.layers.*.mlp",), ("model.layers.*",), 3, 5, ("elu",))
    assert plan_slots({"a": small_edit}, max_edits=6).sizes.edits == 6


def test_the_plan_passes_through_the_engine_s_configuration(small_edit: Edit) -> None:
    tanh = with_layer_edit(small_edit, projection_edit(projection(small_edit.width, feature_map="tanh")))
    plan = plan_slots({"a": tanh, "b": stream(small_edit)}, max_edits=4)
    config = json.loads(json.dumps(plan.to_config() | {"other": 1}))
    assert SlotPlan.from_config(config) == plan
    assert SlotPlan.from_config({"other": 1}) is None
    assert SlotPlan.from_config(None) is None


def test_settings_pass_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ServerSettings("smollm2", {"mild": "/edits/mild = 1"}, None, "/cache")
    monkeypatch.delenv("SEALIGN_SERVING", raising=False)
    with pytest.raises(ServingError, match="start the server with sealign serve"):
        ServerSettings.from_environment()
    for name, value in settings.to_environment().items():
        monkeypatch.setenv(name, value)
    assert ServerSettings.from_environment() == settings


def affine_edits(width: int) -> dict[str, tuple[LayerEdit, bool]]:
    """Edits of every method's form, and whether each is exactly a LoRA."""
    left, right = factors(width)
    vector, zero = torch.randn(width), torch.zeros(width)
    found: dict[str, tuple[LayerEdit, bool]] = {
        "low rank": (AffineEdit(left, right), True),
        "shift": (AffineEdit.constant(vector), False),
        "low rank and shift": (AffineEdit(left, right, shift=vector), False),
        "about a center": (AffineEdit(left, right, center=vector), False),
        "scale": (AffineEdit(left, right, 0.5), False),
        "rescaled": (AffineEdit(left, right, normalization="token"), False),
        "rescaled per feature": (AffineEdit(left, right, normalization="feature"), False),
        "a shift of zero": (AffineEdit(left, right, shift=zero), True),
    }
    for combine, centered, feature_map in itertools.product(COMBINES, (False, True), ("identity", "tanh")):
        fitted: Any = projection(width, centered=centered, feature_map=feature_map)
        edit = projection_edit(fitted, combine=combine, normalization="none")  # type: ignore[arg-type]
        is_low_rank = combine in ("both", "negative", "reversed") and not centered and feature_map == "identity"
        found[f"{combine} {centered} {feature_map}"] = edit, is_low_rank
    return found


def test_the_route_is_decided_by_the_numbers_and_is_that_of_the_export(llama: Any, small_edit: Edit) -> None:
    """What is said to be a LoRA can be exported as one, and nothing else can."""
    for name, (layer_edit, expected) in affine_edits(small_edit.width).items():
        edit = with_layer_edit(small_edit, layer_edit, combine="both")
        assert is_lora(edit) == expected, name
        assert not is_lora(stream(edit)), name
        if layer_edit.normalization == "feature":
            continue
        try:
            lora_factors(llama, edit)
            exported = True
        except ExportError:
            exported = False
        assert exported == expected, name


def test_one_layer_that_is_no_lora_decides_for_all(small_edit: Edit) -> None:
    plain = with_layer_edit(small_edit, AffineEdit(*factors(small_edit.width)))
    mixed = dict(plain.layer_edits) | {3: AffineEdit.constant(torch.ones(small_edit.width))}
    assert is_lora(plain)
    assert not is_lora(Edit(mixed, plain.record))


def test_ranks_are_those_of_the_engine(small_edit: sealign.Edit) -> None:
    assert lora_rank([small_edit]) == 8
    wide = with_layer_edit(small_edit, AffineEdit(*factors(small_edit.width, 602)))
    assert lora_rank([small_edit, with_layer_edit(small_edit, AffineEdit(*factors(small_edit.width, 512)))]) == 512
    assert lora_rank([with_layer_edit(small_edit, AffineEdit(*factors(small_edit.width, 1)))]) == 1
    with pytest.raises(ServingError, match="rank 602, but vLLM's LoRAs have rank 512"):
        lora_rank([wide])


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", "a\\b", "a b", "a\n", "-a", "é", "x" * 101])
def test_names_are_never_paths(name: str, tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="cannot name an edit"):
        check_name(name)
    with pytest.raises(ServingError, match="cannot name an edit"):
        find_in_edits_dir(tmp_path, name)


def test_an_edit_is_not_named_like_a_part_of_a_message() -> None:
    """vLLM looks for adapters of these names wherever a message has such a part."""
    for name in ("text", "image", "audio"):
        with pytest.raises(ServingError, match="would apply it to every message"):
            check_name(name)
    assert check_name("texts") == "texts"


def test_edits_that_may_be_loaded_later(tmp_path: Path) -> None:
    (tmp_path / "mild").mkdir()
    (tmp_path / "file").write_text("")
    assert find_in_edits_dir(tmp_path, "mild") == tmp_path / "mild"
    for name in ("file", "absent"):
        with pytest.raises(UnknownEditError, match="which holds: mild"):
            find_in_edits_dir(tmp_path, name)
    with pytest.raises(ServingError, match="restart it with --edits-dir"):
        find_in_edits_dir(None, "mild")
