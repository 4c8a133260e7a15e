"""The matrix behind a module, and its weight where it is quantised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from sealign.errors import ExportError, SiteError
from sealign.models.output_matrices import OutputMatrix, input_width, output_matrices, read_weight, resolve_heads
from sealign.models.pretrained import empty_model
from sealign.models.sites import resolve_sites
from tests.tiny_models import _GATED, build_model


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


def _written_into(x: torch.Tensor) -> torch.Tensor:
    return x.add_(0.5)


def _written_into_a_view(x: torch.Tensor) -> torch.Tensor:
    x.view(-1)[3:9] *= 2
    return x


def _written_past_the_count(x: torch.Tensor) -> torch.Tensor:
    x.data.add_(0.5)
    return x


def _another_tensor(x: torch.Tensor) -> torch.Tensor:
    return x + 0.5


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "after", [_written_into, _written_into_a_view, _written_past_the_count, _another_tensor], ids=lambda f: f.__name__
)
def test_an_output_that_is_changed_after_the_matrix_is_not_its_output(
    after: Callable[[torch.Tensor], torch.Tensor], inference: bool, device: str
) -> None:
    if device == "meta" and after is _written_past_the_count:
        pytest.skip("values are compared where there are any")
    model = build_model("llama", vocab_size=50).to(device)
    mlp = model.model.layers[2].mlp
    plain = mlp.forward
    with torch.inference_mode(inference):
        (found,) = output_matrices(model, {2: "model.layers.2.mlp"})
        mlp.forward = lambda x: after(plain(x))
        with pytest.raises(ExportError, match=r"output of 'model.layers.2.mlp' is not the output of a single matrix"):
            output_matrices(model, {2: "model.layers.2.mlp"})
    assert found.path == "model.layers.2.mlp.down_proj"
    assert not mlp.down_proj._forward_hooks


EXPERTS: dict[str, Any] = _GATED | {"num_local_experts": 2, "num_experts_per_tok": 1, "pad_token_id": 0}
MIXTURES: dict[str, dict[str, Any]] = {
    # Adds the routed experts to the output of the shared one in place.
    "Llama4TextConfig": EXPERTS | {"head_dim": 12, "intermediate_size_mlp": 80, "attention_chunk_size": 64},
    "GraniteMoeConfig": EXPERTS | {"num_experts_per_tok": 2, "num_local_experts": 3},
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", [*MIXTURES, "qwen3_moe", "mixtral", "deepseek_v3"])
def test_mixtures_of_experts_have_no_output_matrix(name: str, device: str) -> None:
    if name in MIXTURES:
        config = getattr(transformers, name)(vocab_size=50, **MIXTURES[name])
        model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
    else:
        model = build_model(name, vocab_size=50)
    (site,) = resolve_sites(model, "mlp", [3])
    with pytest.raises(ExportError, match="is not the output of a single matrix"):
        output_matrices(model.to(device), {3: site.path})


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_weight_that_is_used_elsewhere_too(device: str) -> None:
    paths = {1: "model.layers.1.mlp"}
    model = build_model("llama", vocab_size=50).to(device)
    model.model.layers[3].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    with pytest.raises(ExportError, match=r"weight of 'model.layers.1.mlp.down_proj' is used in several places"):
        output_matrices(model, paths)
    model = build_model("llama", vocab_size=50).to(device)
    model.model.layers[3].mlp = model.model.layers[1].mlp
    with pytest.raises(ExportError, match="is used in several places"):
        output_matrices(model, paths)


def test_transposed_weights_are_read_as_out_in(tiny_model: Any) -> None:
    model = tiny_model("gpt2")
    (found,) = output_matrices(model, {2: "transformer.h.2.mlp"})
    torch.testing.assert_close(read_weight(found), model.transformer.h[2].mlp.c_proj.weight.T.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_weight_that_is_multiplied_otherwise_than_its_name_says(dtype: torch.dtype) -> None:
    """A square one, whose shape does not tell."""

    class InOut(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight + self.bias

    right = torch.nn.Linear(13, 13, dtype=dtype)
    assert torch.equal(read_weight(OutputMatrix(0, "m", right)), right.weight.float())
    with pytest.raises(ExportError, match=r"the output of 'm' \(InOut\) is not the product with its weight"):
        read_weight(OutputMatrix(0, "m", InOut(13, 13, dtype=dtype)))


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


def test_models_without_weights(tokenizer: Any) -> None:
    """DiffLlama draws some weights on the CPU wherever it is built; JetMoe reads values while it runs."""
    sizes: Any = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": len(tokenizer)}
    config: Any = transformers.DiffLlamaConfig(num_key_value_heads=2, intermediate_size=80, **sizes)
    empty = empty_model(config).eval()
    assert all(parameter.is_meta for parameter in empty.parameters())
    found = output_matrices(empty, {0: "model.layers.0.self_attn", 1: "model.layers.1.mlp"})
    assert [matrix.path for matrix in found] == ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"]
    empty = empty_model(transformers.JetMoeConfig(kv_channels=12, num_local_experts=3, intermediate_size=80, **sizes))
    with pytest.raises(ExportError, match=r"JetMoeForCausalLM cannot be run without its weights \(.*; serve the edit"):
        output_matrices(empty, {0: "model.layers.0.self_attention"})
