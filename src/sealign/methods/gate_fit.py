"""Fitting the gates of an edit: it acts on tokens like those of the demonstrations, and on few ordinary ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.demonstrations.bundled import neutral_texts, ordinary_texts
from sealign.demonstrations.demonstration import Demonstration
from sealign.edits.gate import Gate
from sealign.errors import ActivationError
from sealign.fitting.edit_config import EditConfig
from sealign.fitting.token_activations import collect_token_activations
from sealign.methods.method import FitContext
from sealign.models.passages import Passage, completion_passages, text_passages
from sealign.models.sites import resolve_sites
from sealign.spectral.reading_direction import reading_direction

SAMPLE = 64
"""Maximum number of demonstrations whose tokens are read."""


def fit_gates(
    context: FitContext, config: EditConfig, layers: Sequence[int]
) -> dict[int, tuple[Gate, Mapping[str, float]]]:
    """Return the gate of each layer, and the shares of tokens for which it is open.

    The model is run over the completions of demonstrations and over bundled texts, without the edit. The probe
    separates the tokens of every other demonstration from those of the ordinary text; the threshold leaves the gate
    open for the configured share of the tokens of every other paragraph of the neutral text.

    Args:
        context: Inputs of the fit.
        config: Settings of the method, with a gate.
        layers: Layers of the edit.

    Returns:
        Mapping from layer to the gate, ``gate_neutral_share``, the share of the tokens of the other paragraphs for
        which it is open, and ``gate_demonstration_share``, that of the other demonstrations.

    Raises:
        ActivationError: A layer has no direction to separate by; names the layer.
    """
    assert config.gate is not None
    sites = resolve_sites(context.model, config.site, layers, module_pattern=config.module_pattern)
    texts, given = neutral_texts(), context.demonstrations
    sample = given[:: max(1, len(given) // SAMPLE)][:SAMPLE]
    read = [
        *(_completions(context, config, part) for part in (sample[::2], sample[1::2])),
        *(text_passages(context.tokenizer, part) for part in (ordinary_texts(), texts[::2], texts[1::2])),
    ]
    found = [
        collect_token_activations(context.model, context.tokenizer, passages, sites, track=context.track)
        for passages in read
    ]
    gates = {}
    for layer in layers:
        try:
            gates[layer] = _fit_layer(*(rows[layer] for rows in found), share=config.gate)
        except ActivationError as error:
            raise type(error)(f"layer {layer}: {error}") from error
    return gates


def _completions(context: FitContext, config: EditConfig, items: Sequence[Demonstration]) -> list[Passage]:
    pairs = completion_passages(context.tokenizer, items, prompt_format=config.prompt_format)
    return [passage for pair in pairs for passage in pair]


def _fit_layer(
    fitted: Float[Tensor, "m d"],
    others: Float[Tensor, "n d"],
    ordinary: Float[Tensor, "t d"],
    neutral: Float[Tensor, "a d"],
    held_out: Float[Tensor, "b d"],
    *,
    share: float,
) -> tuple[Gate, Mapping[str, float]]:
    probe = reading_direction(fitted, ordinary)
    probe = (probe / probe.norm()).float()
    # In the gate's own arithmetic, so that no token beyond the share passes by rounding.
    responses = (neutral * probe).sum(-1)
    threshold = float(torch.quantile(responses, 1 - share, interpolation="higher"))
    gate = Gate(probe, threshold)
    shares = {"gate_neutral_share": held_out, "gate_demonstration_share": others}
    return gate, {name: float(gate.is_open(rows).double().mean()) for name, rows in shares.items()}
