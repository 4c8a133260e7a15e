"""Check by numbers, on a few tokens, that the modules found for a site are what the name of the site says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sealign.errors import SiteError, first_sentence
from sealign.models.eval_mode import eval_mode
from sealign.models.structure import (
    decoder_of,
    has_matrix,
    input_device,
    is_attention,
    text_config,
    unwrap_model,
)

ROWS, TOKENS = 3, 4
"""Size of the batch that is run."""

PLAIN, CHANGED, OTHER = range(ROWS)
"""Rows of the batch: the first two have the same tokens, the third has others."""

SIZE = 4.0
"""Size of the change of one feature, in units of the root mean square of the residual stream."""

KEPT = 0.5
"""Smallest share of a change that must arrive at the feature that was changed: norms and factors leave nearly all of
it there, and a matrix spreads it over all features."""

SAME = 1e-4
"""Largest relative difference that counts as none."""

_CHECKED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""Site of each module that has passed, so that a model is run once for it."""


@torch.no_grad()
def check_sites(
    model: nn.Module, site: str, modules: Mapping[str, nn.Module], layers: Sequence[nn.Module | None]
) -> None:
    """Raise an error if a module is not what the name of its site says, by running the model once on a few tokens.

    Each module must run on text alone and put out one vector of the model's width for each token. Where its decoder
    layer is known, the following is checked too:

    - The residual stream passes beside an MLP or attention block. With the output of the block held, the output of the
      layer depends on the input of the layer, which it does not if the block adds the residual itself, as in BLOOM.
    - The output of the block is what is added. A change of one feature of it arrives at that feature of the layer's
      output, through any norm or factor, and not mixed by another matrix.
    - The output of a layer is the residual stream. A change of one feature of its input arrives at that feature.

    A module that has passed is not checked again. Models on the meta device have no values and are not checked.

    Args:
        model: Any decoder of transformers.
        site: ``mlp``, ``attention`` or ``residual``.
        modules: Module to check, by dotted path.
        layers: Decoder layer of each module, or None where it is not known.

    Raises:
        SiteError: A module is something else than its site's name says, or the model needs more than text; the message
            gives the reason.
    """
    base = unwrap_model(model)
    if all(parameter.is_meta for parameter in base.parameters()) and not hasattr(base, "hf_device_map"):
        return
    width = int(text_config(base).hidden_size)
    probes = [
        _Probe(site, path, module, layer, width)
        for (path, module), layer in zip(modules.items(), layers, strict=True)
        if _CHECKED.get(module) != site
    ]
    if not probes:
        return
    with ExitStack() as stack, eval_mode(base):
        for probe in probes:
            probe.install(stack)
        ids = torch.arange(ROWS * TOKENS, device=input_device(base)).reshape(ROWS, TOKENS)
        ids[CHANGED] = ids[PLAIN]
        vocabulary = base.get_input_embeddings().weight.shape[0]
        # Tokens that stand for more than text, such as images, are at either end of a vocabulary.
        ids = (ids + vocabulary // 3) % vocabulary
        try:
            decoder_of(base)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except SiteError:
            raise
        except (TypeError, ValueError) as error:  # such as a missing argument
            raise SiteError(
                f"{type(base).__name__} cannot be run on text alone ({first_sentence(error)}); use a model that can"
            ) from error
    for probe in probes:
        probe.judge()
        _CHECKED[probe.module] = site


class _Probe:
    """Changes and measures one layer while the model runs.

    Args:
        site, path, module, layer: As for ``check_sites``.
        width: Number of features of the residual stream.
    """

    def __init__(self, site: str, path: str, module: nn.Module, layer: nn.Module | None, width: int) -> None:
        self.module = module
        self._site, self._path, self._layer, self._width = site, path, layer, width
        self._shape: tuple[int, ...] | None = None  # None until the module has run
        self._change = torch.empty(0)
        self._kept = 1.0  # share of the change that arrives where it was made; 0 if nothing arrives
        self._is_finite = True  # whether the output of the layer is
        self._beside = True  # whether the layer's input reaches the layer's output beside the module

    def install(self, stack: ExitStack) -> None:
        """Register the hooks, which the stack removes."""
        layer = self._layer
        if layer is not None:
            stack.callback(layer.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            for block in _blocks(layer):
                if all(module is not self.module for module in block.modules()):
                    stack.callback(block.register_forward_pre_hook(_hold_input, with_kwargs=True).remove)
        stack.callback(self.module.register_forward_hook(self._observe).remove)
        if layer is not None:
            stack.callback(layer.register_forward_hook(self._leave).remove)

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the changed row of the layer's input equal to the plain one, except for the change of a residual."""
        name, hidden = _hidden_states(args, kwargs)
        rows = self._rows(hidden).clone()
        plain = rows[..., PLAIN, :, :]
        self._change = torch.zeros_like(plain)
        self._change[..., self._width // 2] = SIZE * plain.float().square().mean().sqrt()
        rows[..., CHANGED, :, :] = plain + self._change if self._site == "residual" else plain
        return _replaced(name, rows.reshape(hidden.shape), args, kwargs)

    def _observe(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Note the shape of the output, and set the output of a block to zero but for the change in one row."""
        tensor = output[0] if isinstance(output, tuple) else output
        self._shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else ()
        if self._site == "residual" or self._layer is None or not self._is_vector_per_token():
            return None
        rows = tensor.new_zeros(ROWS, TOKENS, self._width)
        rows[CHANGED] = self._change.reshape(-1, TOKENS, self._width)[0]
        first = rows.reshape(tensor.shape)
        return (first, *(_hold(value, CHANGED, OTHER) for value in output[1:])) if isinstance(output, tuple) else first

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Measure what has become of the change, and whether the row with other tokens still differs."""
        plain, changed, other = self._rows(output[0] if isinstance(output, tuple | list) else output).unbind(-3)
        self._is_finite = bool(torch.isfinite(plain).all())
        energy = (changed - plain).float().square()
        total = float(energy.sum())
        self._kept = float(energy[..., self._width // 2].sum()) / total if total else 0.0
        self._beside = bool((other - plain).float().norm() > SAME * plain.float().norm())

    def _rows(self, hidden: Any) -> Float[Tensor, "... r t d"]:
        """Return the hidden states of a layer with the axes rows, tokens and features last."""
        known = (ROWS, TOKENS, self._width), (ROWS * TOKENS, self._width)
        if not isinstance(hidden, Tensor) or not (hidden.shape[-3:] == known[0] or hidden.shape == known[1]):
            raise SiteError(
                f"the hidden states of the layer of '{self._path}' have the shape {_shape(hidden)} for {ROWS} "
                f"sequences of {TOKENS} tokens, which is not known; use a model whose layers pass on one vector of "
                f"{self._width} features for each token"
            )
        return hidden.reshape(*hidden.shape[:-3], ROWS, TOKENS, self._width)

    def _is_vector_per_token(self) -> bool:
        return self._shape in ((ROWS, TOKENS, self._width), (ROWS * TOKENS, self._width))

    def judge(self) -> None:
        """Raise an error if the module is not what the name of the site says."""
        what = {"mlp": "MLP output", "attention": "attention output"}.get(self._site, "residual stream")
        if self._shape is None:
            raise SiteError(f"'{self._path}' is not run on text alone; choose layers that are")
        if not self._is_vector_per_token():
            raise SiteError(
                f"the output of '{self._path}' for {ROWS} sequences of {TOKENS} tokens has the shape "
                f"{self._shape or 'of no tensor'}, so it cannot be read as the {what}, which has {self._width} "
                "features for each token; choose another site, or name another module with module_pattern"
            )
        if not self._is_finite:
            raise SiteError(
                f"the output of the layer of '{self._path}' holds NaN or infinity, so nothing can be read there; check "
                "the weights of the model, or load it with --dtype float32"
            )
        if not self._beside:
            inside = [f"{self._path}.{name}" for name, part in self.module.named_modules() if _is_leaf_matrix(part)]
            raise SiteError(
                f"'{self._path}' adds the residual stream itself, so its output is not the {what}; choose site "
                f"residual, or name the matrix that computes the {what} with module_pattern; matrices in it: "
                f"{', '.join(inside) or 'none'}"
            )
        if self._kept < KEPT:
            changed = "the input of the layer" if self._site == "residual" else "it"
            raise SiteError(
                f"the output of '{self._path}' is not the {what}: only {self._kept:.0%} of a change of one feature of "
                f"{changed} arrives at this feature of the layer's output; choose another site, or name another module "
                "with module_pattern"
            )


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks with matrices in a decoder layer; a block around attention, as in DBRX, counts as its parts."""
    for child in module.children():
        if any(is_attention(name, part) for name, part in child.named_children()):
            yield from _blocks(child)
        elif has_matrix(child):
            yield child


def _is_leaf_matrix(module: nn.Module) -> bool:
    return has_matrix(module) and not list(module.children())


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str | None, Any]:
    """Return the hidden states among the arguments of a module, and their name if they are a keyword argument."""
    if args:
        return None, args[0]
    tensors = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
    name = "hidden_states" if "hidden_states" in tensors else next(iter(tensors), None)
    return name, None if name is None else kwargs[name]


def _replaced(name: str | None, value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the arguments of a module with other hidden states."""
    return ((value, *args[1:]), kwargs) if name is None else (args, kwargs | {name: value})


def _hold_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hold the input of another block, but not a residual that is passed to it beside its input."""
    name, hidden = _hidden_states(args, kwargs)
    return _replaced(name, _hold(hidden, CHANGED), args, kwargs) if isinstance(hidden, Tensor) else None


def _hold(value: Any, *held: int) -> Any:
    """Return a tensor with rows set to the plain row; anything else is returned unchanged."""
    if not isinstance(value, Tensor) or value.dim() == 0 or not value.numel() or value.shape[0] % ROWS:
        return value
    rows = value.reshape(ROWS, -1).clone()
    for row in held:
        rows[row] = rows[PLAIN]
    return rows.reshape(value.shape)
