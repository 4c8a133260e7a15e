"""The matrix behind a module, and its weight where it is quantised."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sealign.errors import ExportError, SiteError
from sealign.models.output_matrices import OutputMatrix, input_width, output_matrices, read_weight, resolve_heads
from tests.tiny_models import build_model


def test_the_matrix_is_the_one_that_returns_the_modules_output(tiny_model: Any) -> None:
    (found,) = output_matrices(tiny_model("gpt2"), {2: "transformer.h.2.mlp"})
    assert (found.layer, found.path, found.transposed) == (2, "transformer.h.2.mlp.c_proj", True)
    (found,) = output_matrices(tiny_model("llama"), {1: "model.layers.1.self_attn"})
    assert (found.path, found.transposed) == ("model.layers.1.self_attn.o_proj", False)
    assert read_weight(found).shape == (48, 48)


def test_heads_are_read_at_the_modules_that_a_pattern_names(tiny_model: Any) -> None:
    """A pattern is used for reading, so one that names other modules is noticed."""
    (found,) = resolve_heads(tiny_model("llama"), [2], module_pattern="model.layers.{layer}.mlp")
    assert (found.path, found.reads, input_width(found.module)) == ("model.layers.2.mlp.down_proj", "input", 80)
    wrong = build_model("llama", vocab_size=50, intermediate_size=78)
    with pytest.raises(SiteError, match="down_proj' has 78 features, which is not a multiple of the 4 attention"):
        resolve_heads(wrong, [2], module_pattern="model.layers.{layer}.mlp")


def test_a_model_without_the_module() -> None:
    other = build_model("opt", vocab_size=50)
    with pytest.raises(ExportError, match="the model has no module 'model.layers.1.mlp', which the edit needs"):
        output_matrices(other, {1: "model.layers.1.mlp"})


def test_transposed_weights_are_read_as_out_in(tiny_model: Any) -> None:
    model = tiny_model("gpt2")
    (found,) = output_matrices(model, {2: "transformer.h.2.mlp"})
    torch.testing.assert_close(read_weight(found), model.transformer.h[2].mlp.c_proj.weight.T.detach())


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
            return torch.nn.functional.linear(x, self.qweight * self.scales, self.bias)  # type: ignore[operator]

    packed = Packed()
    torch.testing.assert_close(read_weight(OutputMatrix(0, "m", packed)), packed.qweight * packed.scales)  # type: ignore[operator]

    class Broken(Quantised):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError("no kernel here")

    with pytest.raises(ExportError, match=r"'m' \(Broken\) is quantised and cannot be read back .*no kernel here"):
        read_weight(OutputMatrix(0, "m", Broken(bias=False)))
