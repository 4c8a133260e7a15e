"""Gated edits: the open tokens are edited as without the gate, the others stay bit for bit."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sealign.edits.edit import Edit
from sealign.edits.gate import Gate
from sealign.edits.layer_edit import LayerEdit
from sealign.errors import EditFileError, ExportError, SettingError
from sealign.export.control_vector import export_control_vector
from sealign.export.lora import export_lora
from sealign.export.merged import export_merged
from sealign.export.requirements import check_exportable
from sealign.files import tensors_hash
from sealign.serving.settings import is_lora
from tests.edits.edit_data import WIDTH, assert_same, draw, make_affine, make_edit, make_projection
from tests.export import made_edits
from tests.tiny_models import build_model

GATE = Gate(draw(WIDTH, seed=9, dtype=torch.float32), 0.3)


def _edits() -> dict[str, LayerEdit]:
    from sealign.methods.sea import projection_edit

    parts = {"shift": True, "scale": 0.3, "center": True, "dtype": torch.float32}
    return {
        "affine": make_affine(**parts),  # type: ignore[arg-type]
        "rescaled": make_affine(normalization="token", dtype=torch.float32),
        "mapped": projection_edit(
            make_projection(feature_map="tanh", centered=True, dtype=torch.float32), normalization="token"
        ),
    }


EDITS = _edits()


def gated(edit: Edit, threshold: float = 0.3, *, first: int = 0) -> Edit:
    """Return an edit with a gate at each layer, from the first one on, of another probe each."""
    layers = {
        layer: dataclasses.replace(found, gate=Gate(draw(found.width, seed=layer, dtype=torch.float32), threshold))
        if layer >= first
        else found
        for layer, found in edit.layer_edits.items()
    }
    made = Edit(layers, edit.record)
    return Edit(layers, dataclasses.replace(edit.record, tensors_hash=tensors_hash(made.tensors())))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strength", [1.0, -0.4])
@pytest.mark.parametrize("name", EDITS)
def test_open_tokens_are_edited_and_the_others_stay(name: str, strength: float, dtype: torch.dtype) -> None:
    edit = dataclasses.replace(EDITS[name], gate=GATE)
    tokens = draw(3, 17, WIDTH, seed=2).to(dtype)
    is_open = (tokens.double() * GATE.probe.double()).sum(-1) > 0.3
    assert 5 < int(is_open.sum()) < 46
    given, found = tokens.clone(), edit(tokens, strength)
    assert torch.equal(found[is_open], EDITS[name](tokens, strength)[is_open])
    assert torch.equal(found[~is_open], tokens[~is_open])
    assert not torch.equal(found[is_open], tokens[is_open])
    assert torch.equal(tokens, given)
    assert edit(tokens, 0) is tokens
    # A token's gate depends on that token alone.
    torch.testing.assert_close(edit(tokens[1, 4], strength), found[1, 4])


def test_autocast_and_gradients() -> None:
    edit, weight = dataclasses.replace(EDITS["affine"], gate=GATE), torch.eye(WIDTH, requires_grad=True)
    tokens = draw(9, WIDTH, seed=2, dtype=torch.float32)
    expected = edit(tokens, 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(edit(tokens, 0.7), expected)
    is_open = GATE.is_open(tokens)[:, 0]
    (gradient,) = torch.autograd.grad(edit(tokens @ weight, 0.7)[~is_open].sum(), weight)
    torch.testing.assert_close(gradient, tokens[~is_open].sum(0)[:, None].expand(WIDTH, WIDTH))


@pytest.mark.parametrize("name", EDITS)
def test_controls_and_copies_keep_the_gate(name: str) -> None:
    edit = dataclasses.replace(EDITS[name], gate=GATE)
    tokens = draw(12, WIDTH, seed=2, dtype=torch.float32)
    others = [edit.randomized(3), edit.reversed(), pickle.loads(pickle.dumps(edit))]
    if name == "affine":
        others.append(edit.scaled(0.5))  # type: ignore[attr-defined]
    for other in others:
        changed = (other(tokens) != tokens).any(-1)
        assert torch.equal(changed, GATE.is_open(tokens)[:, 0])


def test_what_does_not_go_with_a_gate() -> None:
    with pytest.raises(SettingError, match="a gate edits single tokens, but normalization is 'feature'"):
        dataclasses.replace(EDITS["affine"], gate=GATE, normalization="feature")
    with pytest.raises(SettingError, match=rf"probe of the gate has shape \(3,\), but the edit has {WIDTH} features"):
        dataclasses.replace(EDITS["affine"], gate=Gate(torch.ones(3), 0.0))


@pytest.mark.parametrize("feature_map", ["identity", "elu"])
def test_a_saved_edit_keeps_its_gate(feature_map: str, tmp_path: Path) -> None:
    plain = make_edit(feature_map=feature_map)
    edit = gated(plain)
    assert (edit.is_gated, edit.is_affine, plain.is_gated) == (True, False, False)
    assert "gated=True" in repr(edit)
    assert "gated" not in repr(plain)
    assert len({plain.hash, edit.hash, gated(plain, 0.4).hash}) == 3
    edit.save_pretrained(tmp_path / "edit")
    loaded = Edit.from_pretrained(tmp_path / "edit")
    assert_same(loaded, edit)
    tokens = {layer: draw(9, WIDTH, seed=layer, dtype=torch.float32) for layer in edit.layers}
    for layer, found in loaded.apply_to(tokens).items():
        assert torch.equal(found, edit.apply_to(tokens)[layer])
    tensors = load_file(tmp_path / "edit" / "edit.safetensors")
    del tensors["layers.3.gate_threshold"]
    record = dataclasses.replace(edit.record, tensors_hash=tensors_hash(tensors))
    with pytest.raises(EditFileError, match=r"layer 3: missing tensors: \['gate_threshold'\]"):
        Edit.from_record(record, tensors)
    tensors["layers.3.gate_threshold"] = torch.tensor(float("nan"))
    with pytest.raises(EditFileError, match="tensor gate_threshold holds NaN"):
        Edit.from_record(record, tensors)


def test_no_export_takes_a_gate(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    words = "the edit has a gate: .* which weights and constant vectors cannot express; serve it with sealign serve"
    edit = gated(made_edits.random_edit(llama, tokenizer))
    shift = gated(made_edits.random_edit(llama, tokenizer, site="residual", rank=0, shift=True))
    llama.save_pretrained(tmp_path / "base")
    with pytest.raises(ExportError, match=words):
        check_exportable(edit, approximate=True)
    with pytest.raises(ExportError, match=words):
        export_lora(llama, edit, tmp_path / "lora")
    with pytest.raises(ExportError, match=words):
        export_merged(tmp_path / "base", edit, tmp_path / "merged")
    with pytest.raises(ExportError, match=words):
        export_control_vector(shift, tmp_path / "shift.gguf", architecture="llama")
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]
    assert is_lora(made_edits.random_edit(llama, tokenizer))
    assert not is_lora(edit), "the server must not take it for a LoRA"


@torch.no_grad()
def test_hooks_edit_the_open_tokens(tokenizer: Any) -> None:
    """At the edited module; the model's own run of the same tokens as oracle."""
    import sealign

    model = build_model("llama", vocab_size=len(tokenizer))
    plain = made_edits.random_edit(model, tokenizer, layers=[2])
    edit = gated(plain)
    ids = torch.tensor([[5, 9, 31, 7, 22, 40, 8, 3, 17]])
    outputs: list[torch.Tensor] = []
    module = model.model.layers[2].mlp

    def run(one: Edit | None) -> torch.Tensor:
        outputs.clear()
        if one is None:
            hook = module.register_forward_hook(lambda *parts: outputs.append(parts[-1].clone()))
            model(ids)
        else:
            with sealign.apply_edit(model, one):
                hook = module.register_forward_hook(lambda *parts: outputs.append(parts[-1].clone()))
                model(ids)
        hook.remove()
        return outputs[0]

    before, whole, found = run(None), run(plain), run(edit)
    gate = edit.layer_edits[2].gate
    assert gate is not None
    is_open = gate.is_open(before)
    assert 0 < int(is_open.sum()) < 9
    assert torch.equal(found, torch.where(is_open, whole, before))
