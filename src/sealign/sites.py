"""Where we read and edit: the MLP output, attention output or residual stream of any decoder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from sealign.errors import ModelError, SiteError, unknown_name

Site = Literal["mlp", "attention", "residual"]
"""``mlp``: the output of a layer's feed-forward block, for a mixture of experts that of the whole block,
before any norm that follows it; ``attention``: the output of its attention block; ``residual``: the output
of the whole layer."""

SITES: tuple[str, ...] = get_args(Site)

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|moe|expert", re.IGNORECASE)


@dataclass(frozen=True)
class ResolvedSite:
    """One module whose output is read or edited.

    Attributes:
        layer: index of the decoder layer, from 0.
        path: the module's dotted path in the unwrapped model.
        module: the module.
    """

    layer: int
    path: str
    module: nn.Module


def unwrap_model(model: nn.Module) -> Any:
    """Return the transformers model inside PEFT and ``torch.compile`` wrappers; others as they are.

    Raises:
        ModelError: a PEFT model with prompt learning, whose virtual tokens shift every position.

    Example:
        >>> from torch import nn
        >>> module = nn.Linear(2, 2)
        >>> unwrap_model(module) is module
        True
    """
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        return unwrap_model(inner)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ModelError(
                "the PEFT model uses prompt learning, whose virtual tokens are not part of the base model; "
                "unload the adapter or use a LoRA"
            )
        return model.get_base_model()  # type: ignore[operator]
    return model


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the text decoder of a transformers model.

    Raises:
        ModelError: the model has no transformers configuration.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ModelError(f"{type(model).__name__} has no transformers configuration; load it with AutoModelForCausalLM")
    return config.get_text_config(decoder=True)


def context_length(model: nn.Module) -> int | None:
    """Return how many tokens a model's positions reach, or None where its configuration names no bound.

    Raises:
        ModelError: the model has no transformers configuration.
    """
    limit = getattr(text_config(unwrap_model(model)), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Return the path of the list of decoder layers, and the list itself.

    It is the outermost ``ModuleList`` whose length is the configuration's number of layers and whose
    members hold an attention or feed-forward block.

    Raises:
        SiteError: none or several lists qualify; the message names them.
    """
    model = unwrap_model(model)
    depth = text_config(model).num_hidden_layers
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        nested = any(path.startswith(outer + ".") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == depth and _is_layer(module[0]) and not nested:
            found[path] = module
    if len(found) > 1 and hasattr(model, "get_decoder"):
        decoder: nn.Module = model.get_decoder()
        inside = {id(module) for module in decoder.modules()}
        found = {path: module for path, module in found.items() if id(module) in inside}
    if len(found) != 1:
        lists = [f"{p} ({len(m)})" for p, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        raise SiteError(
            f"{type(model).__name__} has {len(found)} lists of {depth} decoder layers, but exactly one is needed; "
            f"name the modules with module_pattern; lists in the model: {', '.join(lists[:12]) or 'none'}"
        )
    return next(iter(found.items()))


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


def _has_matrix(module: nn.Module) -> bool:
    # Quantised weights keep two dimensions; norms and gates have one or none.
    return any(parameter.dim() >= 2 for parameter in module.parameters())


def _is_layer(module: nn.Module) -> bool:
    return any(
        (_ATTENTION.search(name) or _FEED_FORWARD.search(name) or _is_attention(name, child)) and _has_matrix(child)
        for name, child in module.named_children()
    )


def _is_attention(name: str, module: nn.Module) -> bool:
    return bool(_ATTENTION.search(type(module).__name__) or _ATTENTION.search(name)) and _has_matrix(module)


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
