"""Which edits weights can carry, by which matrix, on every architecture."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import sealign
from sealign.edits.linear_change import linear_change
from sealign.errors import ExportError
from sealign.export.linearity import check_linear, output_matrices
from sealign.models.output_matrices import OutputMatrix, read_weight
from tests.tiny_models import CONFIGS, build_model


def test_what_is_not_linear(small_edit: sealign.Edit) -> None:
    with pytest.raises(ExportError, match="rescaled per token, which is not linear.*--approximate"):
        check_linear(small_edit)
    check_linear(small_edit, approximate=True)
    check_linear(small_edit.with_settings(normalization="none"))
    settings = dataclasses.replace(small_edit.settings, feature_map="tanh")
    mapped = dataclasses.replace(small_edit, record=dataclasses.replace(small_edit.record, settings=settings))
    with pytest.raises(ExportError, match="feature map 'tanh', which no change of weights can express"):
        check_linear(mapped, approximate=True)


MIXTURES = ("mixtral", "qwen3_moe")


@pytest.mark.parametrize("site", ["mlp", "attention"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_matrix_behind_a_site(tokenizer: Any, tiny_model: Any, demonstrations: Any, name: str, site: Any) -> None:
    """Changing the matrix that was found changes the module's output in just that way."""
    model = tiny_model(name)
    config = sealign.FitConfig(rank=2, layers=(1, 2), site=site, normalization="none", batch_size=4)
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=config)
    if site == "mlp" and name in MIXTURES:
        with pytest.raises(ExportError, match="not that of a single matrix, as in a mixture of experts"):
            output_matrices(model, edit)
        return
    try:
        matrices = output_matrices(model, edit)
    except ExportError:
        assert name == "deepseek_v3"  # its later layers are mixtures
        assert site == "mlp"
        return
    assert [matrix.layer for matrix in matrices] == [1, 2]
    ids = torch.tensor([tokenizer.encode("The town lies by the river.")])
    with torch.no_grad(), sealign.apply_edit(model, edit):
        expected = model(ids).logits
    weights = [(matrix.module.weight, matrix.module.weight.detach().clone()) for matrix in matrices]
    biases = [(bias, bias.detach().clone()) for m in matrices if (bias := getattr(m.module, "bias", None)) is not None]
    with torch.no_grad():
        for matrix in matrices:
            change = linear_change(edit.projections[matrix.layer], edit.settings)
            weight = read_weight(matrix).double()
            new = (weight + change(weight)).float()
            matrix.module.weight.copy_(new.T if matrix.transposed else new)  # type: ignore[operator, union-attr]
            bias = getattr(matrix.module, "bias", None)
            if bias is not None:
                bias += change(bias.double()[:, None])[:, 0].float()
        try:
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
        finally:
            for parameter, value in (*weights, *biases):
                parameter.copy_(value)  # type: ignore[operator, union-attr]


def test_on_the_meta_device(small_edit: sealign.Edit, llama: Any, tokenizer: Any) -> None:
    with torch.device("meta"):
        empty = type(llama)(llama.config)
    found = output_matrices(empty, small_edit)
    assert [matrix.path for matrix in found] == [f"model.layers.{layer}.mlp.down_proj" for layer in (1, 3)]


def test_the_residual_stream(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    edit = sealign.fit_edit(
        llama, tokenizer, demonstrations, config=sealign.FitConfig(rank=2, site="residual", layers=(1,))
    )
    with pytest.raises(ExportError, match="residual stream, which is a sum that no single matrix puts out"):
        output_matrices(llama, edit)


def test_quantised_weights_are_read_through_their_kernel() -> None:
    """A stand-in for a quantised layer: integers and scales, no floating-point weight."""

    class Quantised(torch.nn.Module):
        in_features, out_features = 13, 5

        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randint(-8, 8, (5, 13)), requires_grad=False)
            self.scales = torch.rand(5, 1)
            self.bias = torch.nn.Parameter(torch.randn(5)) if bias else None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight * self.scales, self.bias)

    for bias in (False, True):
        module = Quantised(bias)
        torch.testing.assert_close(read_weight(OutputMatrix(0, "m", module)), module.weight * module.scales)

    class Packed(Quantised):
        """As GPTQ and AWQ name them."""

        def __init__(self) -> None:
            super().__init__(bias=True)
            self.register_buffer("qweight", self.weight.data)
            del self.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.qweight * self.scales, self.bias)

    packed = Packed()
    torch.testing.assert_close(read_weight(OutputMatrix(0, "m", packed)), packed.qweight * packed.scales)

    class Broken(Quantised):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError("no kernel here")

    with pytest.raises(ExportError, match=r"'m' \(Broken\) is quantised and cannot be read back .*no kernel here"):
        read_weight(OutputMatrix(0, "m", Broken(bias=False)))


def test_a_model_without_the_modules_is_told(small_edit: sealign.Edit) -> None:
    other = build_model("opt", vocab_size=50)
    with pytest.raises(ExportError, match="the model has no module 'model.layers.1.mlp', which the edit edits"):
        output_matrices(other, small_edit)
