"""Edit: its properties, copies, controls and hash."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import sealign
from sealign.edits.affine_edit import AffineEdit
from sealign.edits.edit import Edit
from sealign.edits.feature_map_edit import FeatureMapEdit
from sealign.edits.layer_edit import LayerEdit
from sealign.errors import ActivationError, SettingError, SiteError
from sealign.spectral.projection import COMBINES, NORMALIZATIONS
from tests.edits.edit_data import WIDTH, assert_same, bits, draw, make_affine, make_edit, make_record


def test_properties() -> None:
    edit = make_edit(normalization="feature", site="attention")
    assert (edit.layers, edit.site, edit.strength, edit.normalization) == ([1, 3], "attention", 0.7, "feature")
    assert edit.modules == ["model.layers.1.mlp", "model.layers.3.mlp"]
    assert (edit.feature_map, edit.width, edit.rank, edit.method) == ("identity", WIDTH, 5, "sea")
    assert (edit.is_affine, edit.is_causal) == (True, False)
    assert make_edit(normalization="token").is_causal
    assert make_edit(normalization="none").is_causal
    assert edit.affine_edits == edit.layer_edits
    assert edit.parts == (edit,)


def test_an_edit_with_a_feature_map_is_not_affine() -> None:
    edit = make_edit(feature_map="tanh")
    assert (edit.is_affine, edit.feature_map, edit.rank) == (False, "tanh", 5)
    message = "the edit uses the feature map 'tanh', so it is not affine; fit one with feature_map='identity'"
    with pytest.raises(SettingError, match=message):
        _ = edit.affine_edits


def test_layers_of_edits_and_record_must_agree() -> None:
    edit = make_edit()
    message = r"layer_edits has layers \[1\], but the record has \['1', '3'\]; they must be the same"
    with pytest.raises(SettingError, match=message):
        Edit({1: edit.layer_edits[1]}, edit.record)


@pytest.mark.parametrize(
    ("layers", "shown"), [([4], "4"), ([0, 1], "0-1"), ([3, *range(9, 30)], "3, 9-29"), ([2, 4, 6], "2, 4, 6")]
)
def test_layers_in_the_representation(layers: list[int], shown: str) -> None:
    entry, one = make_record().layers["1"], make_affine(rank=5)
    record = make_record(layers={str(layer): entry for layer in layers})
    assert f"layers='{shown}'," in repr(Edit(dict.fromkeys(layers, one), record))


@pytest.mark.parametrize("feature_map", ["identity", "tanh"])
def test_copies(feature_map: str) -> None:
    edit = make_edit(feature_map=feature_map, center=True)
    tokens = {layer: draw(3, WIDTH, dtype=torch.float32) for layer in edit.layers}
    _ = edit.hash
    expected = edit.apply_to(tokens)  # prepares the layers
    for same in (copy.deepcopy(edit), copy.copy(edit), pickle.loads(pickle.dumps(edit))):
        assert_same(same, edit)
        assert all(torch.equal(found, expected[layer]) for layer, found in same.apply_to(tokens).items())


def test_with_strength() -> None:
    edit = make_edit()
    before = dataclasses.asdict(edit.record), edit.hash
    changed = edit.with_strength(-0.5)
    assert changed.strength == -0.5
    assert changed.layer_edits is edit.layer_edits
    assert dataclasses.replace(changed.record, strength=edit.strength) == edit.record
    assert edit.with_strength(0.0).strength == 0
    assert edit.with_strength(0.7).record == edit.record
    for bad, message in (
        (float("nan"), r"strength is nan, but it must be finite; try a value in \[0, 1\]"),
        (float("-inf"), "strength is -inf, but it must be finite"),
    ):
        with pytest.raises(SettingError, match=message):
            edit.with_strength(bad)
    assert (dataclasses.asdict(edit.record), edit.hash) == before


@pytest.mark.parametrize("feature_map", ["identity", "tanh"])
def test_with_normalization(feature_map: str) -> None:
    edit = make_edit(feature_map=feature_map)
    changed = edit.with_normalization("none")
    assert (changed.normalization, edit.normalization) == ("none", "token")
    assert [found.normalization for found in changed.layer_edits.values()] == ["none", "none"]
    assert dataclasses.replace(changed.record, normalization="token") == edit.record
    assert_same(changed.with_normalization("token"), edit)
    with pytest.raises(SettingError, match=r"unknown normalization 'tokens' \(did you mean 'token'\?\)"):
        edit.with_normalization("tokens")  # type: ignore[arg-type]


def test_some_layers_only() -> None:
    edit = make_edit()
    one = edit.with_layers([3])
    assert one.layers == [3]
    assert one.modules == ["model.layers.3.mlp"]
    assert one.layer_edits[3] is edit.layer_edits[3]
    assert one.record.layers == {"3": edit.record.layers["3"]}
    both = edit.with_layers([3, 1, 3])
    assert_same(both, edit)
    assert list(both.record.layers) == ["1", "3"]
    assert edit.layers == [1, 3]


def test_layers_that_are_refused() -> None:
    for layers, named in (([0, 1], [0]), ([-1], [-1]), ([9, 3, 2], [9, 2])):
        message = rf"layers \[{', '.join(map(str, named))}\] are not part of the edit, which has layers \[1, 3\]"
        with pytest.raises(SiteError, match=message):
            make_edit().with_layers(layers)
    with pytest.raises(SiteError, match=r"layers is empty, but an edit needs at least 1; the edit has layers \[1, 3\]"):
        make_edit().with_layers([])


def test_applied_to_activations() -> None:
    edit = make_edit(shift=True)
    tokens = {layer: draw(4, WIDTH, seed=layer, dtype=torch.float32) for layer in (0, 1, 3)}
    found = edit.apply_to(tokens)
    assert list(found) == [1, 3]
    for layer in (1, 3):
        assert torch.equal(found[layer], edit.layer_edits[layer](tokens[layer], 0.7))
        assert torch.equal(edit.apply_to(tokens, strength=-1)[layer], edit.layer_edits[layer](tokens[layer], -1.0))
        assert edit.apply_to(tokens, strength=0)[layer] is tokens[layer]
    with pytest.raises(SettingError, match="must be finite"):
        edit.apply_to(tokens, strength=float("nan"))
    message = r"there are no activations of layers \[3\], but the edit has layers \[1, 3\]; collect them too"
    with pytest.raises(ActivationError, match=message):
        edit.apply_to({1: tokens[1]})


@pytest.mark.parametrize("feature_map", ["identity", "tanh"])
def test_the_random_control(feature_map: str) -> None:
    edit = make_edit(feature_map=feature_map, center=True, shift=True)
    control = edit.randomized(2)
    assert control.record is edit.record
    assert control.layers == edit.layers
    for layer in edit.layers:
        assert type(control.layer_edits[layer]) is type(edit.layer_edits[layer])
        assert control.layer_edits[layer].rank == edit.layer_edits[layer].rank
        for name in ("center", "mean"):
            if name in edit.layer_edits[layer].tensors():
                assert control.layer_edits[layer].tensors()[name] is edit.layer_edits[layer].tensors()[name]
    assert_same(edit.randomized(2), control)
    assert len({edit.hash, *(edit.randomized(seed).hash for seed in (0, 1, 2, 3, -1, 2**63 - 1, 10**30))}) == 8


@pytest.mark.parametrize("feature_map", ["identity", "tanh"])
def test_the_random_control_differs_between_layers(feature_map: str) -> None:
    """Equal layers are rotated differently, by rotations that no other seed gives to a neighbour."""
    one = make_edit(feature_map=feature_map).layer_edits[1]
    entry = make_record().layers["1"]
    alike = Edit(dict.fromkeys(range(8), one), make_record(layers={str(layer): entry for layer in range(8)}))
    found = [
        str(bits(tensor))
        for seed in range(4)
        for name, tensor in alike.randomized(seed).tensors().items()
        if name.endswith(("left", "positive"))
    ]
    assert len(set(found)) == len(found) == 32


@pytest.mark.parametrize("feature_map", ["identity", "tanh"])
def test_the_reversal(feature_map: str) -> None:
    edit = make_edit(feature_map=feature_map, center=True, shift=True)
    back = edit.reversed()
    assert_same(back.reversed(), edit)
    assert back.hash != edit.hash
    assert (back.strength, back.layers, back.modules) == (edit.strength, edit.layers, edit.modules)
    tokens = {layer: draw(3, WIDTH, dtype=torch.float32) for layer in edit.layers}
    for layer, found in back.apply_to(tokens).items():
        assert torch.equal(found, edit.layer_edits[layer].reversed()(tokens[layer], 0.7))
    # The record says what the layers are, so that it can be saved.
    scales = [back.record.layers[name].scale for name in ("1", "3")]
    assert scales == ([0.0, 0.5] if feature_map == "identity" else [0.0, 0.0])


def test_the_reversal_of_a_fit_exchanges_positives_and_negatives(
    llama: Any, tokenizer: Any, demonstrations: list[sealign.Demonstration], small_edit: Edit
) -> None:
    exchanged = [sealign.Demonstration(item.prompt, item.negative, item.positive) for item in demonstrations]
    config = sealign.SEAConfig(rank=(2, 3), layers=(1, 3), strength=0.7, batch_size=4)
    other = sealign.fit_edit(llama, tokenizer, exchanged, config=config)
    tokens = {layer: draw(5, small_edit.width, dtype=torch.float32) for layer in (1, 3)}
    first, second = small_edit.reversed().apply_to(tokens), other.apply_to(tokens)
    for layer in (1, 3):
        torch.testing.assert_close(first[layer], second[layer])


def nudged(edit: Edit, layer: int, name: str) -> Edit:
    """Return an edit with the last bit of one number of one tensor changed."""
    tensors = edit.layer_edits[layer].tensors()
    tensor = tensors[name].clone()
    tensor.view(-1)[-1] = torch.nextafter(tensor.view(-1)[-1], torch.tensor(9.0))
    found: Any = edit.layer_edits[layer]
    changed: LayerEdit
    if isinstance(found, FeatureMapEdit):
        projection: Any = found.projection
        changed = dataclasses.replace(found, projection=dataclasses.replace(projection, **{name: tensor}))
    else:
        changed = dataclasses.replace(found, **{name: tensor})
    return dataclasses.replace(edit, layer_edits=dict(edit.layer_edits) | {layer: changed})


def variants(base: Edit) -> Sequence[Edit]:
    """Edits that differ from one another in one thing that changes what they do."""
    edits = [
        base.with_normalization(name)  # type: ignore[arg-type]
        for name in NORMALIZATIONS
        if name != base.normalization
    ]
    edits += [base.with_strength(value) for value in (0.0, 0.7000000000000001, 1.0)]
    edits += [base.with_layers([1]), base.with_layers([3]), base.randomized(0), base.reversed()]
    edits += [nudged(base, layer, name) for layer in base.layers for name in base.layer_edits[layer].tensors()]
    edits.append(dataclasses.replace(base, record=dataclasses.replace(base.record, site="residual")))
    moved = dataclasses.replace(base.record.layers["1"], module="model.layers.2.mlp")
    layers = dict(base.record.layers) | {"1": moved}
    edits.append(dataclasses.replace(base, record=dataclasses.replace(base.record, layers=layers)))
    return edits


def rescaled(base: Edit) -> Edit:
    """Return an affine edit with another scale at one layer."""
    edits = dict(base.layer_edits) | {1: dataclasses.replace(base.affine_edits[1], scale=0.25)}
    return dataclasses.replace(base, layer_edits=edits)


def test_hash_changes_with_whatever_changes_the_edit() -> None:
    base = make_edit(shift=True, center=True)
    edits = [base, *variants(base), rescaled(base)]
    edits += [make_edit(shift=shift, center=center) for shift, center in ((False, True), (True, False), (False, False))]
    assert len({edit.hash for edit in edits}) == len(edits)
    assert make_edit(shift=True, center=True).hash == base.hash


def test_hash_changes_with_whatever_changes_an_edit_with_a_feature_map() -> None:
    base = make_edit(feature_map="tanh", center=True)
    edits = [base, *variants(base), make_edit(feature_map="tanh"), make_edit(feature_map="elu", center=True)]
    edits += [make_edit(feature_map="tanh", center=True, combine=name) for name in COMBINES if name != "both"]
    assert len({edit.hash for edit in edits}) == len(edits)
    assert make_edit(feature_map="tanh", center=True).hash == base.hash


def test_hash_does_not_change_with_provenance() -> None:
    base = make_edit()
    record = dataclasses.replace(
        base.record, config={}, fitted_on=["0" * 33], versions={}, tensors_hash="ee" * 32, fit_seconds=9.0
    )
    assert dataclasses.replace(base, record=record).hash == base.hash


def test_hash_does_not_depend_on_the_layout_of_memory() -> None:
    base = make_edit()
    columns = {
        layer: AffineEdit(found.left.T.contiguous().T, found.right, found.scale, normalization="token")
        for layer, found in base.affine_edits.items()
    }
    assert dataclasses.replace(base, layer_edits=columns).hash == base.hash


def test_whole_numbers_for_strength_are_the_same_edit(tmp_path: Any) -> None:
    whole = make_edit().with_strength(1)
    assert whole.hash == make_edit().with_strength(1.0).hash == make_edit(strength=1).hash
    whole.save_pretrained(tmp_path / "edit")
    assert Edit.from_pretrained(tmp_path / "edit").hash == whole.hash
    assert make_edit().with_strength(-0.0).hash == make_edit().with_strength(0).hash
