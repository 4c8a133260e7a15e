"""Where we read and edit: the MLP output, attention output or residual stream of any decoder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from torch import nn

from sealign.errors import SettingError, SiteError, unknown_name
from sealign.models.structure import (
    _FEED_FORWARD,
    _has_matrix,
    _is_attention,
    decoder_layers,
    text_config,
    unwrap_model,
)

Site = Literal["mlp", "attention", "residual"]
"""``mlp``: the output of a layer's feed-forward block, for a mixture of experts that of the whole block,
before any norm that follows it; ``attention``: the output of its attention block; ``residual``: the output
of the whole layer."""

SITES: tuple[str, ...] = get_args(Site)


@dataclass(frozen=True)
class ResolvedSite:
    """One module whose output is read or edited.

    Attributes:
        layer: index of the decoder layer, from 0.
        path: the module's dotted path in the unwrapped model.
        module: the module.
        reads: Whether the output of the module is read, or its input.
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
    """Find the modules whose outputs are a site of the given layers.

    Args:
        model: any decoder of transformers; PEFT and compiled wrappers are looked through.
        site: ``mlp``, ``attention`` or ``residual``.
        layers: indices in [0, number of layers); all if None.
        module_pattern: a path with ``{layer}`` in it, such as ``model.layers.{layer}.mlp``, in place of
            the search by structure.

    Raises:
        SiteError: the site is unknown, a layer is outside the model, or a module cannot be told; the
            message names the candidates. No layer is ever skipped.
    """
    if site not in SITES:
        raise SiteError(unknown_name("site", site, SITES))
    model = unwrap_model(model)
    depth = text_config(model).num_hidden_layers
    wanted = list(range(depth)) if layers is None else list(layers)
    for layer in wanted:
        if not 0 <= layer < depth:
            raise SiteError(f"layer {layer} is outside the model, which has layers 0 to {depth - 1}")
    if module_pattern is not None:
        return tuple(_by_pattern(model, module_pattern, layer) for layer in wanted)
    path, stack = decoder_layers(model)
    width = text_config(model).hidden_size
    return tuple(_by_structure(f"{path}.{layer}", stack[layer], site, layer, width) for layer in wanted)


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
    blocks = {name: child for name, child in layer.named_children() if _has_matrix(child)}
    attention = [name for name, child in blocks.items() if _is_attention(name, child)]
    found = attention if site == "attention" else _feed_forward(blocks, attention, width)
    if len(found) != 1:
        candidates = ", ".join(f"{path}.{name} ({type(child).__name__})" for name, child in blocks.items())
        raise SiteError(
            f"the {site} of layer {index} cannot be told: {len(found)} of its blocks qualify; "
            f"name it with module_pattern; candidates: {candidates or 'none'}"
        )
    return ResolvedSite(index, f"{path}.{found[0]}", blocks[found[0]])


def _feed_forward(blocks: dict[str, nn.Module], attention: list[str], width: int) -> list[str]:
    """The blocks that qualify as the feed-forward output of a layer."""
    rest = [name for name in blocks if name not in attention]
    if len(rest) <= 1:
        return rest
    named = [n for n in rest if _FEED_FORWARD.search(n) or _FEED_FORWARD.search(type(blocks[n]).__name__)]
    if named:
        return named
    # A feed-forward block written out in the layer, as in OPT: its last matrix gives the output.
    leaves = [name for name in rest if not list(blocks[name].children())]
    outputs = [name for name in leaves if getattr(blocks[name], "out_features", None) == width]
    return outputs[-1:] if len(leaves) == len(rest) else rest


def parse_layers(layers: str | Sequence[int]) -> tuple[str, Fraction] | list[int] | None:
    """Return (kind, count or share), indices, or None for all.

    Raises:
        SettingError: not one of the forms.
    """
    if not isinstance(layers, str):
        if not layers:
            raise SettingError("layers is empty; name at least one layer, or 'all'")
        return list(layers)
    if layers == "all":
        return None
    match = re.fullmatch(r"(last|first|signature):(\d+(?:/\d+)?)", layers)
    if match:
        try:
            share = Fraction(match[2])
        except ZeroDivisionError:
            share = Fraction(0)
        if share > 0:
            return match[1], share if "/" in match[2] else Fraction(int(match[2]))
    elif re.fullmatch(r"-?\d+(,-?\d+)*", layers):
        return [int(part) for part in layers.split(",")]
    raise SettingError(
        f"layers is '{layers}', but it must be all, last:L, first:L, signature:L with L at least 1, a share of the "
        "depth such as last:21/32, or indices such as 4,5,-1"
    )


def select_layers(layers: str | Sequence[int], depth: int, signatures: Mapping[int, float] | None = None) -> list[int]:
    """Return the indices that a choice of layers means in a model of some depth, rising.

    Args:
        layers: see ``FitConfig.layers``.
        depth: number of decoder layers.
        signatures: by layer, for ``signature:L``.

    Raises:
        SettingError: not one of the forms.
        SiteError: more layers than the model has, or an index outside it.

    Example:
        >>> select_layers("last:21/32", 30)[0], select_layers([-1, 2], 30)
        (10, [2, 29])
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
    share = isinstance(layers, str) and "/" in layers
    count = max(1, round(amount * depth)) if share else int(amount)
    if count > depth:
        raise SiteError(f"layers '{layers}' asks for {count} layers, but the model has {depth}")
    if kind == "signature":
        assert signatures is not None
        return sorted(sorted(signatures, key=lambda layer: -signatures[layer])[:count])
    return list(range(depth - count, depth)) if kind == "last" else list(range(count))
