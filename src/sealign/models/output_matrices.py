"""The matrix behind the output of a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sealign.errors import ExportError, SiteError
from sealign.models.eval_mode import eval_mode
from sealign.models.sites import ResolvedSite, resolve_sites
from sealign.models.structure import input_device, unwrap_model


@dataclass(frozen=True)
class OutputMatrix:
    """The matrix whose product is, unchanged, the output of an edited module.

    Attributes:
        layer: index of the decoder layer.
        path: dotted path of the module that holds it.
        module: the module.
    """

    layer: int
    path: str
    module: nn.Module

    @property
    def transposed(self) -> bool:
        """Whether the weight is (in, out), as in GPT-2, not (out, in)."""
        return type(self.module).__name__ == "Conv1D"


HEADS = "heads"
"""Name of the read-only site of attention heads: the input of the matrix that mixes their outputs."""


def resolve_heads(model: nn.Module, layers: Sequence[int] | None = None) -> tuple[ResolvedSite, ...]:
    """Find the modules whose input is the output of all attention heads of a layer, side by side.

    Args:
        model: Any decoder of transformers.
        layers: Indices of the layers; all if None.

    Raises:
        SiteError: The attention output of a layer is not the output of a single matrix.
    """
    sites = resolve_sites(model, "attention", layers)
    try:
        matrices = matrices_behind(model, {site.layer: site.path for site in sites})
    except ExportError as error:
        raise SiteError(f"cannot read the attention heads: {error}") from error
    return tuple(ResolvedSite(matrix.layer, matrix.path, matrix.module, "input") for matrix in matrices)


@torch.no_grad()
def matrices_behind(model: nn.Module, paths: Mapping[int, str]) -> list[OutputMatrix]:
    """Find the matrix that puts out what each module puts out, by running the model once on two tokens.

    Args:
        model: the base model; may be on the meta device.
        paths: by layer, the dotted path of the module.

    Raises:
        ExportError: a module's output is not that of one matrix; names the module.
    """
    base = unwrap_model(model)
    outputs: dict[str, Any] = {}

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs[path] = output[0] if isinstance(output, tuple) else output

        return hook

    with ExitStack() as stack, eval_mode(base):
        for path in paths.values():
            for name, module in base.get_submodule(path).named_modules(prefix=path):
                stack.callback(module.register_forward_hook(keep(name)).remove)
        # With a ready-made mask and positions no value is looked at, of which the meta device has none.
        bare = all(parameter.is_meta for parameter in base.parameters()) and not hasattr(base, "hf_device_map")
        device = torch.device("meta") if bare else input_device(base)
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        mask = torch.zeros(1, 1, 2, 2, dtype=next(base.parameters()).dtype, device=device)
        positions = torch.tensor([[0, 1]], device=device)
        base(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return [OutputMatrix(layer, *_matrix_of(base, path, outputs)) for layer, path in paths.items()]


def _matrix_of(base: nn.Module, path: str, outputs: dict[str, Any]) -> tuple[str, nn.Module]:
    found = [
        (name, module)
        for name, module in base.get_submodule(path).named_modules(prefix=path)
        if outputs.get(name) is outputs[path] and _holds_weight(module) and not list(module.children())
    ]
    if not found:
        raise ExportError(
            f"the output of '{path}' is not that of a single matrix, as in a mixture of experts, so that weights "
            "cannot carry the edit; serve it with hooks"
        )
    return found[-1]


def _holds_weight(module: nn.Module) -> bool:
    """Whether a module has a matrix; GPTQ and AWQ keep theirs as packed integers under another name."""
    return hasattr(module, "weight") or hasattr(module, "qweight")


@torch.no_grad()
def read_weight(matrix: OutputMatrix) -> Float[Tensor, "out in"]:
    """Return the weight of a matrix as (out, in) in float32, also where it is quantised.

    A quantised matrix is read by running it on the rows of the identity, which gives what its kernel computes with.

    Raises:
        ExportError: the module cannot be run so.
    """
    weight = getattr(matrix.module, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.is_floating_point() and type(weight.data) is Tensor:
        return (weight.T if matrix.transposed else weight).detach().float().cpu()
    try:
        return _run_identity(matrix.module)
    except Exception as error:  # each quantisation library raises its own
        raise ExportError(
            f"the weight of '{matrix.path}' ({type(matrix.module).__name__}) is quantised and cannot be read back "
            f"({type(error).__name__}: {error}); export from the model before quantisation"
        ) from error


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
