"""Changes of matrices: setting the new weight and bias does what the hooks do, on every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sealign
from sealign.errors import ExportError, FingerprintError
from sealign.export.matrix_changes import MatrixChange, matrix_changes
from sealign.models.output_matrices import OutputMatrix
from tests.export.made_edits import affine, edit_of, random_edit
from tests.tiny_models import CONFIGS, build_model, logits

MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v3")


@torch.no_grad()
def set_change(change: MatrixChange) -> None:
    """Write the new weight and bias into the model."""
    module: Any = change.matrix.module
    weight = module.weight.T if change.matrix.transposed else module.weight
    new = change.new_weight(weight)
    if change.bias is not None:
        module.bias.copy_(change.new_bias(module.bias))
    module.weight.copy_(new.T if change.matrix.transposed else new)


@pytest.mark.parametrize("site", ["mlp", "attention"])
@pytest.mark.parametrize("name", CONFIGS)
def test_new_weights_do_what_the_hooks_do(tokenizer: Any, name: str, site: Any) -> None:
    model = build_model(name, vocab_size=len(tokenizer))
    if name not in MIXTURES:  # whose grouped products do not run in float64
        model = model.double()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.1)
    edit = random_edit(model, tokenizer, layers=(1, 2), site=site, scale=0.2)
    if site == "mlp" and name in MIXTURES:
        with pytest.raises(ExportError, match="not the output of a single matrix, for example because"):
            matrix_changes(model, edit)
        return
    changes = matrix_changes(model, edit)
    assert [change.matrix.layer for change in changes] == [1, 2]
    if all(change.bias is not None for change in changes):
        edit = random_edit(model, tokenizer, layers=(1, 2), site=site, scale=0.2, shift=True, center=True)
        changes = matrix_changes(model, edit)
    with sealign.apply_edit(model, edit):
        expected = logits(model, tokenizer)
    assert float((logits(model, tokenizer) - expected).abs().max()) > 1e-2
    for change in changes:
        set_change(change)
    # Norms round to float32 inside, so that a difference of 1e-16 may become one of 1e-7.
    tolerance = 1e-4 if name in MIXTURES else 1e-6
    torch.testing.assert_close(logits(model, tokenizer), expected, atol=tolerance, rtol=tolerance)


def test_parts_of_a_change() -> None:
    matrix = OutputMatrix(0, "m", torch.nn.Linear(3, 4, bias=False))
    edit = affine(4, scale=0.5, shift=True, center=True)
    change = MatrixChange(matrix, edit, 0.6)
    assert change.bias is None
    assert change.changes_weight
    constant = edit.constant_part()
    assert change.shift is not None
    assert constant is not None
    torch.testing.assert_close(change.shift, 0.6 * constant)
    x = torch.randn(4)
    torch.testing.assert_close(change.new_bias(x), edit(x.double(), 0.6))
    off = MatrixChange(matrix, edit, 0.0)
    assert off.shift is None
    assert not off.changes_weight
    pure = MatrixChange(matrix, sealign.AffineEdit.constant(torch.ones(4)), 2.0)
    assert not pure.changes_weight
    torch.testing.assert_close(pure.shift, torch.full((4,), 2.0, dtype=torch.float64))


def test_on_the_meta_device(llama: Any, tokenizer: Any) -> None:
    with torch.device("meta"):
        empty = type(llama)(llama.config)
    found = matrix_changes(empty, random_edit(llama, tokenizer))
    assert [change.matrix.path for change in found] == [f"model.layers.{layer}.mlp.down_proj" for layer in (1, 3)]


def test_the_residual_stream_is_refused_with_what_can_carry_it(llama: Any, tokenizer: Any) -> None:
    with pytest.raises(ExportError, match=r"is a sum and not the output .*; serve it with sealign serve, or fit one"):
        matrix_changes(llama, random_edit(llama, tokenizer, site="residual", center=True))
    shift = edit_of(llama, tokenizer, {1: sealign.AffineEdit.constant(torch.ones(48))}, site="residual")
    with pytest.raises(ExportError, match="export it with sealign export control-vector, or serve it"):
        matrix_changes(llama, shift)


def test_another_model(llama: Any, tokenizer: Any) -> None:
    edit = random_edit(llama, tokenizer)
    with pytest.raises(FingerprintError):
        matrix_changes(build_model("opt", vocab_size=len(tokenizer)), edit)
    wider = build_model("llama", vocab_size=len(tokenizer), intermediate_size=96)
    with pytest.raises(FingerprintError):
        matrix_changes(wider, edit)
    assert len(matrix_changes(wider, edit, ignore_mismatch=True)) == 2
