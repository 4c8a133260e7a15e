"""Output matrices: the weight matrix whose product is the output of an edited module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sealign.errors import ExportError, SiteError, first_sentence
from sealign.models.hooks import add_hook
from sealign.models.module_calls import run_two_tokens
from sealign.models.sites import ResolvedSite, resolve_sites
from sealign.models.structure import text_config, unwrap_model


@dataclass(frozen=True)
class OutputMatrix:
    """The linear module whose output is, unchanged, the output of an edited module.

    Attributes:
        layer: Index of the decoder layer.
        path: Dotted path of the linear module.
        module: The linear module.
    """

    layer: int
    path: str
    module: nn.Module

    @property
    def transposed(self) -> bool:
        """Whether the weight has shape (in, out), as in GPT-2, instead of (out, in)."""
        return type(self.module).__name__ == "Conv1D"


BIAS_SWITCHES = {"mlp": "mlp_bias", "attention": "attention_bias"}
"""Name of the configuration option that enables biases, for each site, in architectures that support it."""

_SAME = 0.05
"""Largest relative difference of two products that counts as rounding."""

HEADS = "heads"
"""Name of the read-only site of attention heads: the input of the matrix that computes the attention output."""


def resolve_heads(
    model: nn.Module, layers: Sequence[int] | None = None, *, module_pattern: str | None = None
) -> tuple[ResolvedSite, ...]:
    """Find the matrix in each given layer whose input is the concatenated outputs of all attention heads.

    Args:
        model: Any decoder of transformers.
        layers: Indices of the layers; all if None.
        module_pattern: Dotted path of the attention modules, with ``{layer}`` as placeholder for the layer index. Found
            by structure if None.

    Raises:
        SiteError: The attention output of a layer is not the output of a single matrix, or the input width of the
            matrix is not a multiple of the number of heads.
    """
    sites = resolve_sites(model, "attention", layers, module_pattern=module_pattern)
    try:
        matrices = output_matrices(model, {site.layer: site.path for site in sites})
    except ExportError as error:
        raise SiteError(f"cannot read the attention heads: {error}") from error
    heads = text_config(unwrap_model(model)).num_attention_heads
    for matrix in matrices:
        if input_width(matrix.module) % heads:
            raise SiteError(
                f"the input of '{matrix.path}' has {input_width(matrix.module)} features, which is not a multiple of "
                f"the {heads} attention heads; name the attention modules with module_pattern"
            )
    return tuple(ResolvedSite(matrix.layer, matrix.path, matrix.module, "input") for matrix in matrices)


def input_width(module: nn.Module) -> int:
    """Return the number of input features of a linear module.

    Args:
        module: A linear module, which may be a ``Conv1D`` of transformers or quantised.
    """
    width: Any = getattr(module, "in_features", None)
    if width is None:  # a Conv1D, whose weight is (in, out)
        assert isinstance(module.weight, Tensor)
        width = module.weight.shape[0]
    return int(width)


@dataclass(frozen=True)
class _Output:
    """The output of one call of a module.

    Attributes:
        tensor: The output, into which other modules may have written since.
        version: Number of times that something had been written into it.
        values: Its values.
    """

    tensor: Tensor
    version: int
    values: Tensor

    def is_output(self, other: _Output) -> bool:
        """Return whether another module returned this tensor unchanged; on the meta device, values are not compared."""
        same = self.tensor is other.tensor and self.version == other.version
        return same and (self.tensor.is_meta or torch.equal(self.values, other.values))


@torch.no_grad()
def output_matrices(model: nn.Module, paths: Mapping[int, str]) -> list[OutputMatrix]:
    """Find the output matrix of each edited module, by running the model once on two tokens.

    A matrix qualifies if it returns the very tensor that the module returns, and nothing is written into the tensor in
    between: then a change of its output is the same change of the module's output, whatever the architecture. Nor may
    anything else use its weight, which an edit of this module would change, too.

    Args:
        model: The base model; may be on the meta device.
        paths: Dotted path of the edited module, by layer.

    Raises:
        ExportError: The model lacks a module, the output of a module is not the output of a single matrix, or the
            matrix is used elsewhere, too.
    """
    base = unwrap_model(model)
    known = {name for name, _ in base.named_modules()}
    absent = [path for path in paths.values() if path not in known]
    if absent:
        raise ExportError(f"the model has no module '{absent[0]}', which the edit needs; load the edit's base model")
    outputs: dict[str, list[_Output]] = defaultdict(list)

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor):
                outputs[path].append(_Output(tensor, tensor._version, tensor.clone()))

        return hook

    # Tensors that are made in inference mode do not count what is written into them.
    with ExitStack() as stack, torch.inference_mode(False), torch.no_grad():
        for path in paths.values():
            for name, module in base.get_submodule(path).named_modules(prefix=path):
                stack.callback(add_hook(module, keep(name)))
        _run(base)
    return [OutputMatrix(layer, *_matrix_of(base, path, outputs)) for layer, path in paths.items()]


def _run(base: Any) -> None:
    """Run a model on two tokens; raise an error for one without weights whose calls depend on values."""
    try:
        run_two_tokens(base)
    except (NotImplementedError, RuntimeError) as error:
        if not all(parameter.is_meta for parameter in base.parameters()):
            raise
        raise ExportError(
            f"{type(base).__name__} cannot be run without its weights ({first_sentence(error)}), so the matrices of "
            "the edit cannot be found in its checkpoint; serve the edit with sealign serve"
        ) from error


def _matrix_of(base: nn.Module, path: str, outputs: Mapping[str, Sequence[_Output]]) -> tuple[str, nn.Module]:
    found = [
        (name, module)
        for name, module in base.get_submodule(path).named_modules(prefix=path)
        if _holds_weight(module)
        and not list(module.children())
        and any(own.is_output(output) for own in outputs.get(name, ()) for output in outputs.get(path, ()))
    ]
    if not found:
        raise ExportError(
            f"the output of '{path}' is not the output of a single matrix, for example because it is a mixture of "
            "experts, so weights cannot carry the edit; serve it with sealign serve"
        )
    name, module = found[-1]
    weight = getattr(module, "weight", None)
    users = sum(weight is not None and getattr(other, "weight", None) is weight for other in base.modules())
    if max(users, len(outputs[path]), len(outputs[name])) > 1:
        raise ExportError(
            f"the weight of '{name}' is used in several places, and a change of the weight would edit all of them; "
            "serve the edit with sealign serve"
        )
    return name, module


def _holds_weight(module: nn.Module) -> bool:
    """Return whether a module has a weight matrix; GPTQ and AWQ store it as packed integers named ``qweight``."""
    return hasattr(module, "weight") or hasattr(module, "qweight")


@torch.no_grad()
def read_weight(matrix: OutputMatrix) -> Float[Tensor, "out in"]:
    """Return the weight of a matrix as (out, in) in float32, dequantised if needed.

    A quantised matrix is read by applying it to the rows of the identity matrix, which gives the values that its kernel
    computes with.

    Args:
        matrix: The matrix to read.

    Raises:
        ExportError: The module cannot be applied to the identity matrix, or does not multiply by its weight.
    """
    weight = getattr(matrix.module, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.is_floating_point() and type(weight.data) is Tensor:
        oriented = (weight.T if matrix.transposed else weight).detach()
        _check_product(matrix, oriented)
        return oriented.float().cpu()
    try:
        return _run_identity(matrix.module)
    except Exception as error:  # each quantisation library raises its own
        raise ExportError(
            f"the weight of '{matrix.path}' ({type(matrix.module).__name__}) is quantised and cannot be read back "
            f"({type(error).__name__}: {error}); export from the model before quantisation"
        ) from error


def _check_product(matrix: OutputMatrix, weight: Float[Tensor, "out in"]) -> None:
    """Raise an error unless a module gives the product of its weight with two made-up tokens."""
    bias = getattr(matrix.module, "bias", None)
    tokens = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    expected = tokens @ weight.T + (0.0 if bias is None else bias)
    found = matrix.module.forward(tokens)
    if not float((found - expected).norm()) <= _SAME * float(expected.norm()):
        raise ExportError(
            f"the output of '{matrix.path}' ({type(matrix.module).__name__}) is not the product with its weight, so a "
            "change of the weight is another edit; serve the edit with sealign serve"
        )


def _run_identity(module: Any, rows: int = 1024) -> Tensor:
    width = module.in_features
    device, bias = next(chain(module.parameters(), module.buffers())).device, getattr(module, "bias", None)
    columns = []
    for start in range(0, width, rows):
        block = torch.zeros(min(rows, width - start), width, device=device)
        block[:, start:].fill_diagonal_(1.0)
        dtype = bias.dtype if bias is not None else torch.float32
        output = module(block.to(dtype)).float()
        columns.append((output - bias.float() if bias is not None else output).cpu())
    return torch.cat(columns).T.contiguous()
