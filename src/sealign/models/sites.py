"""Find the modules for a site, and select layers."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from torch import nn

from sealign.errors import SettingError, SiteError, unknown_name
from sealign.models.site_check import check_sites
from sealign.models.structure import (
    decoder_layers,
    has_matrix,
    is_attention,
    is_feed_forward,
    text_config,
    unwrap_model,
)

Site = Literal["mlp", "attention", "residual"]
"""Site in a decoder layer.

``mlp`` is the output of the feed-forward block, before any norm that follows it; for a mixture of experts, the output
of the whole block. ``attention`` is the output of the attention block. ``residual`` is the output of the layer, which
is the residual stream.
"""

SITES: tuple[str, ...] = get_args(Site)

_SITE_NAMES = {"mlp": "MLP", "attention": "attention"}


@dataclass(frozen=True)
class ResolvedSite:
    """A module whose output is read or edited, or whose input is read.

    Attributes:
        layer: Index of the decoder layer, from 0.
        path: Dotted path of the module in the unwrapped model.
        module: The module.
        reads: ``output`` or ``input``: which tensor of the module is read.
    """

    layer: int
    path: str
    module: nn.Module
    reads: Literal["output", "input"] = "output"


def resolve_sites(
    model: nn.Module,
    site: str,
    layers: Sequence[int] | None = None,
    *,
    module_pattern: str | None = None,
) -> tuple[ResolvedSite, ...]:
    """Find the module for the site in each given layer, and check by numbers that it is what the site's name says.

    The model is run once on a few tokens for the check, which ``site_check.check_sites`` describes.

    Args:
        model: Any decoder of transformers; PEFT and compiled wrappers are unwrapped. A model on the meta device, which
            has no values, is searched but not checked.
        site: ``mlp``, ``attention`` or ``residual``.
        layers: Indices in [0, number of layers); all layers if None.
        module_pattern: Dotted path of the modules, with ``{layer}`` as placeholder for the layer index, such as
            ``model.layers.{layer}.mlp``. Found by structure if None. For the site ``residual`` it may name any modules
            that put out one vector of the model's width for each token.

    Raises:
        SiteError: The site is unknown, a layer is outside the model, there is not exactly one candidate module in a
            layer, a module is part of several layers, or it is not what the site's name says; the message names the
            modules.
    """
    if site not in SITES:
        raise SiteError(unknown_name("site", site, SITES))
    model = unwrap_model(model)
    depth = text_config(model).num_hidden_layers
    wanted = list(range(depth)) if layers is None else [operator.index(layer) for layer in layers]
    for layer in wanted:
        if not 0 <= layer < depth:
            raise SiteError(f"layer {layer} is outside the model, which has layers 0 to {depth - 1}")
    if module_pattern is None:
        path, stack = decoder_layers(model)
        width = text_config(model).hidden_size
        found = [_by_structure(f"{path}.{layer}", stack[layer], site, layer, width) for layer in wanted]
        owners: list[nn.Module | None] = [stack[layer] for layer in wanted]
    else:
        found = [_by_pattern(model, module_pattern, layer) for layer in wanted]
        owners = [None if site == "residual" else _owner(model, resolved) for resolved in found]
    check_unshared(model, {resolved.layer: resolved.module for resolved in found})
    check_sites(model, site, {resolved.path: resolved.module for resolved in found}, owners)
    return tuple(found)


def _owner(model: nn.Module, resolved: ResolvedSite) -> nn.Module | None:
    """Return the decoder layer that contains a module named by the caller, or None if there is none."""
    try:
        layer = decoder_layers(model)[1][resolved.layer]
    except SiteError:
        return None
    return layer if any(module is resolved.module for child in layer.children() for module in child.modules()) else None


def check_unshared(model: nn.Module, modules: Mapping[int, nn.Module]) -> None:
    """Raise an error if a module of a layer is also part of another layer, where an edit would change it, too.

    Args:
        model: The model.
        modules: Modules by the index of their layer.

    Raises:
        SiteError: Names the layers.
    """
    try:
        stack: Iterable[nn.Module] = decoder_layers(model)[1]
    except SiteError:  # layers that are found by a pattern alone
        stack = ()
    places: dict[int, set[int]] = {id(module): set() for module in modules.values()}
    for layer, module in modules.items():
        places[id(module)].add(layer)
    for index, whole in enumerate(stack):
        for module in whole.modules():
            places.get(id(module), set()).add(index)
    shared = next((sorted(layers) for layers in places.values() if len(layers) > 1), None)
    if shared:
        raise SiteError(
            f"layers {shared} share one module, so that an edit of one would change the others, too; choose a site or "
            "layers with modules of their own"
        )


def _by_pattern(model: nn.Module, pattern: str, layer: int) -> ResolvedSite:
    if "{layer}" not in pattern:
        raise SiteError(f"module_pattern '{pattern}' has no '{{layer}}'; write for example model.layers.{{layer}}.mlp")
    path = pattern.replace("{layer}", str(layer))
    try:
        return ResolvedSite(layer, path, model.get_submodule(path))
    except AttributeError:
        parent = path.rpartition(".")[0]
        known = [p for p, _ in model.named_modules() if p.rpartition(".")[0] == parent or f".{layer}." in p]
        raise SiteError(f"no module '{path}' in the model; candidates: {', '.join(known[:12]) or 'none'}") from None


def _by_structure(path: str, layer: nn.Module, site: str, index: int, width: int) -> ResolvedSite:
    if site == "residual":
        return ResolvedSite(index, path, layer)
    blocks = {name: child for name, child in layer.named_children() if has_matrix(child)}
    attention = [name for name, child in blocks.items() if is_attention(name, child)]
    found = attention if site == "attention" else _feed_forward(blocks, attention, width)
    if len(found) != 1:
        listed = ", ".join(f"{path}.{name}: {type(blocks[name]).__name__}" for name in found or blocks)
        raise SiteError(
            f"cannot identify the {_SITE_NAMES[site]} of layer {index}: {len(found)} candidate modules"
            f"{f' ({listed})' if listed else ''}; {'' if found else 'choose layers that have one, or '}"
            "name it with module_pattern"
        )
    return ResolvedSite(index, f"{path}.{found[0]}", blocks[found[0]])


def _feed_forward(blocks: dict[str, nn.Module], attention: list[str], width: int) -> list[str]:
    """Return the names of the blocks that may be the feed-forward block of a layer."""
    rest = [name for name in blocks if name not in attention]
    # The name of a class contains that of the model, which may be a mixture of experts in another block.
    named = [name for name in rest if is_feed_forward(name)]
    named = named or [name for name in rest if is_feed_forward(type(blocks[name]).__name__)]
    if named or not attention or len(rest) <= 1:
        return named or (rest if attention else [])
    # In OPT, the matrices of the feed-forward block are children of the layer itself; the last gives the output.
    leaves = [name for name in rest if not list(blocks[name].children())]
    outputs = [name for name in leaves if getattr(blocks[name], "out_features", None) == width]
    return outputs[-1:] if len(leaves) == len(rest) else rest


def parse_layers(layers: str | Sequence[int]) -> tuple[str, Fraction] | list[int] | None:
    """Parse a choice of layers, which needs no model.

    Args:
        layers: As for ``select_layers``.

    Returns:
        A list of indices, a pair (kind, amount), or None for all layers. The kind is ``last``, ``first``, ``signature``
        or ``at``; the amount is a number of layers, or a fraction of the depth if the text contains a slash.

    Raises:
        SettingError: The choice has none of the accepted forms.
    """
    if not isinstance(layers, str):
        return _parse_indices(layers)
    if layers == "all":
        return None
    match = re.fullmatch(r"(last|first|signature|at):(\d+)(?:/(\d+))?", layers)
    if match and match[3] is None and match[1] != "at" and int(match[2]) > 0:
        return match[1], Fraction(int(match[2]))
    if match and match[3] is not None and int(match[3]) > 0:
        fraction = Fraction(int(match[2]), int(match[3]))
        if 0 <= fraction <= 1 if match[1] == "at" else fraction > 0:
            return match[1], fraction
    if re.fullmatch(r"-?\d+(,-?\d+)*", layers):
        return [int(part) for part in layers.split(",")]
    raise SettingError(
        f"layers is '{layers}', but it must be one of: all; last:L, first:L or signature:L, with L at least 1 or a "
        "positive fraction of the depth such as last:21/32; at:F with F in [0, 1], such as at:13/32; indices such as "
        "4,5,-1"
    )


def _parse_indices(layers: Sequence[int]) -> list[int]:
    if len(layers) == 0:
        raise SettingError("layers is empty; name at least one layer, or 'all'")
    try:
        if any(isinstance(layer, bool) for layer in layers):
            raise TypeError
        return [operator.index(layer) for layer in layers]
    except TypeError:
        raise SettingError(f"layers is {list(layers)}, but every index must be an integer") from None


def select_layers(layers: str | Sequence[int], depth: int, signatures: Mapping[int, float] | None = None) -> list[int]:
    """Return the indices of the chosen layers of a model in ascending order.

    Args:
        layers: One of

            - ``all``;
            - ``last:L`` or ``first:L``, L layers at the end or at the beginning;
            - ``signature:L``, the L layers of the highest signature;
            - one of these three with a fraction of the depth instead of L, such as ``last:21/32``: the last
              round(21 / 32 * depth) layers, but at least one;
            - ``at:13/32``, the single layer round(13 / 32 * depth), or the last layer if that is beyond the end;
            - indices, as text such as ``4,5,-1`` or as a sequence of integers; negative ones count from the end.
        depth: Number of decoder layers of the model.
        signatures: Signature by layer. Required for ``signature:L``.

    Raises:
        SettingError: ``layers`` has none of these forms.
        SiteError: More layers are chosen than the model has, or an index is outside the model.

    Example:
        >>> select_layers("last:21/32", 30)[0], select_layers("at:13/32", 30), select_layers([-1, 2], 30)
        (10, [12], [2, 29])
    """
    parsed = parse_layers(layers)
    if parsed is None:
        return list(range(depth))
    if isinstance(parsed, list):
        outside = [layer for layer in parsed if not -depth <= layer < depth]
        if outside:
            raise SiteError(f"layer {outside[0]} is outside the model, which has layers 0 to {depth - 1}")
        return sorted({layer % depth for layer in parsed})
    kind, amount = parsed
    if kind == "at":
        return [min(round(amount * depth), depth - 1)]
    is_fraction = isinstance(layers, str) and "/" in layers
    count = max(1, round(amount * depth)) if is_fraction else int(amount)
    if count > depth:
        raise SiteError(f"layers '{layers}' selects {count} layers, but the model has {depth}")
    if kind == "signature":
        assert signatures is not None
        return sorted(sorted(signatures, key=lambda layer: -signatures[layer])[:count])
    return list(range(depth - count, depth)) if kind == "last" else list(range(count))
