"""What a fit will take in time and memory, from the configuration of a model: no weights are read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sealign.demonstrations.demonstration import Demonstration
from sealign.errors import SettingError
from sealign.fitting.activation_store import Keep, choose_keep, rows_bytes, sums_bytes
from sealign.fitting.edit_config import EditConfig
from sealign.fitting.sequences import plan_sequences
from sealign.models.devices import SPLIT, choose_device
from sealign.models.shared_prefix import SHORTEST, common_prefix
from sealign.models.sites import select_layers
from sealign.models.structure import text_config
from sealign.spectral.decomposition import EXACT_BELOW

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHARACTERS_A_TOKEN = 4
"""By which tokens are estimated where there is no tokenizer."""

QR_FLOPS = 28
"""Of the products and QR decompositions of a small fit, over n^2 d, at the rate of a product; measured."""

SVD_FLOPS = 120
"""Of a whole singular value decomposition, over the third power of its size, likewise."""

BLOCK = 64
"""Columns of the block of a decomposition, about: enough for a rank of 21."""

SINGLE_ROUNDS = 14
"""Rounds of subspace iteration in float32 that a decomposition takes, about."""

DOUBLE_ROUNDS = 4
"""And in float64."""

MOST_ROWS = 512
"""Rows of a product whose rate is measured; more of them are not faster a row."""


@dataclass(frozen=True)
class FitPlan:
    """What a fit will take.

    Attributes:
        demonstrations: n.
        tokens: that the model is run over, with padding.
        layers: that are edited.
        width: d.
        parameters: of the model.
        active_parameters: that a token passes through, without the embeddings; fewer in a mixture of experts.
        model_bytes: of the weights.
        keep: what is kept of the activations, and where.
        kept_bytes: of it.
        peak_bytes: of memory: the weights, what is kept in memory, and what one layer's decomposition adds.
        factor_bytes: of the edit, for each direction that it keeps or drops at every layer.
        teraflops: a second, that the model is run at.
        collection_seconds: to run the model.
        decomposition_seconds: of all layers, on the CPU of this machine.
    """

    demonstrations: int
    tokens: int
    layers: int
    width: int
    parameters: int
    active_parameters: int
    model_bytes: int
    keep: Keep
    kept_bytes: int
    peak_bytes: int
    factor_bytes: int
    teraflops: float
    collection_seconds: float
    decomposition_seconds: float


def plan_fit(
    skeleton: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    demonstrations: Sequence[Demonstration],
    config: EditConfig = EditConfig(),
    *,
    device: str = "auto",
    teraflops: float | None = None,
    memory: int | None = None,
) -> FitPlan:
    """Estimate a fit: a token costs 2 p + 4 t d l flops, with p active parameters, l layers and t tokens before it.

    Rates are measured here by products of the model's own shapes, or given for other hardware. The estimate is within a
    factor of two of what is measured (``benchmarks/plan.py``).

    Args:
        skeleton: the model, or one without weights as ``sealign.models.load_skeleton`` gives it.
        tokenizer: its own; tokens are estimated by characters if None.
        demonstrations: n of them.
        config: settings of the fit.
        device: where it would be loaded, if it has no weights; the rate is measured there.
        teraflops: sustained, of other hardware; measured if None.
        memory: free bytes there; as the system says if None.

    Raises:
        SettingError: teraflops is not above 0.
    """
    if teraflops is not None and not 0 < teraflops < float("inf"):
        raise SettingError(f"teraflops is {teraflops}, but it must be above 0; an A100 sustains about 120")
    settings, dtype = text_config(skeleton), skeleton.dtype
    place = choose_device("auto" if device == SPLIT else device) if skeleton.device.type == "meta" else skeleton.device
    width, depth = settings.hidden_size, settings.num_hidden_layers
    chosen = config.layers if not str(config.layers).startswith("signature:") else "all"
    layers = len(select_layers(chosen, depth))
    parameters, active = _parameters(skeleton, settings)
    tokens, longest, generated = _tokens(tokenizer, demonstrations, config)
    count, widths = len(demonstrations), [width] * layers
    keep = choose_keep(count, widths, memory=memory)
    kept = rows_bytes(count, widths) if keep.kept == "rows" else sums_bytes(widths)
    model_bytes = parameters * dtype.itemsize
    workspace = 8 * (3 * count * width if count < width else 5 * width**2)
    rate = teraflops or measure_teraflops(config.batch_size * longest, width, dtype, place)
    flops = 2 * active * tokens + 4 * longest * width * depth * tokens
    seconds = flops / rate / 1e12
    if generated:
        slow = teraflops or measure_teraflops(config.batch_size, width, dtype, place)
        seconds += 2 * active * generated / slow / 1e12
    return FitPlan(
        demonstrations=count,
        tokens=tokens + generated,
        layers=layers,
        width=width,
        parameters=parameters,
        active_parameters=active,
        model_bytes=model_bytes,
        keep=keep,
        kept_bytes=kept,
        peak_bytes=model_bytes + workspace + (kept if keep.place == "memory" else 0),
        factor_bytes=2 * layers * width * 4,
        teraflops=rate,
        collection_seconds=seconds,
        decomposition_seconds=layers * _decomposition_seconds(count, width),
    )


def _parameters(skeleton: PreTrainedModel, settings: Any) -> tuple[int, int]:
    """All parameters, and those of a forward pass without the embeddings and the head."""
    total = active = 0
    experts = next(
        (
            getattr(settings, name)
            for name in ("num_local_experts", "num_experts", "n_routed_experts")
            if getattr(settings, name, None)
        ),
        1,
    )
    share = getattr(settings, "num_experts_per_tok", experts) / experts
    ends = (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())  # type: ignore[no-untyped-call]
    outside = {id(module.weight) for module in ends if module is not None}
    for name, parameter in skeleton.named_parameters():
        total += parameter.numel()
        if id(parameter) not in outside:
            active += int(parameter.numel() * (share if ".experts." in name else 1))
    return total, active


def _tokens(
    tokenizer: PreTrainedTokenizerBase | None, demonstrations: Sequence[Demonstration], config: EditConfig
) -> tuple[int, int, int]:
    """Tokens of all batches, the mean length of a sequence, and tokens that are generated."""
    generated = len(demonstrations) * config.max_new_tokens if config.neutral == "generated" else 0
    if tokenizer is None:
        texts = [item.prompt + text for item in demonstrations for text in (item.positive, item.negative)]
        lengths = [max(1, len(text) // CHARACTERS_A_TOKEN) for text in texts]
        shared = 0
    else:
        blank: list[list[int]] | None = [[] for _ in demonstrations] if generated else None
        sequences = [sequence.ids for sequence in plan_sequences(tokenizer, demonstrations, config, blank)]
        shared = len(common_prefix(sequences))
        shared = shared if shared >= SHORTEST else 0
        lengths = [len(ids) - shared for ids in sequences]
    lengths.sort(reverse=True)
    batches = [lengths[start : start + config.batch_size] for start in range(0, len(lengths), config.batch_size)]
    padded = sum(batch[0] * len(batch) for batch in batches)
    return padded + shared, max(1, round(padded / len(lengths))), generated


def _decomposition_seconds(count: int, width: int) -> float:
    """Of both sides of one layer on this machine's CPU, from their factors or from their (d, d) sums."""
    double = measure_teraflops(count, width, torch.float64) * 1e12
    if count <= EXACT_BELOW and count < width:
        return 2 * (QR_FLOPS * count**2 * width + SVD_FLOPS * count**3) / double
    single = measure_teraflops(count, width, torch.float32) * 1e12
    thin = measure_teraflops(BLOCK, width, torch.float64) * 1e12
    if count < width:
        grams, rounds = 3 * count**2 * width, 2 * SINGLE_ROUNDS * 4 * count**2 * BLOCK
        return (grams + rounds) / single + 2 * DOUBLE_ROUNDS * 8 * count * width * BLOCK / thin
    sums = 4 * count * width**2 / double
    if width <= EXACT_BELOW:
        return sums + 2 * SVD_FLOPS * width**3 / double
    rounds = 2 * SINGLE_ROUNDS * 4 * width**2 * BLOCK
    return sums + rounds / single + 2 * DOUBLE_ROUNDS * 4 * width**2 * BLOCK / thin


def measure_teraflops(rows: int, width: int, dtype: torch.dtype, device: torch.device = torch.device("cpu")) -> float:
    """Return how many teraflops a second a product of (rows, d) with (d, 4 d) runs at.

    Args:
        rows: tokens that are run together.
        width: d.
        dtype: of both.
        device: where.

    Example:
        >>> measure_teraflops(16, 64, torch.float32) > 0
        True
    """
    x = torch.randn(min(max(1, rows), MOST_ROWS), width, device=device).to(dtype)
    weight = torch.randn(4 * width, width, device=device).to(dtype)
    best = float("inf")
    for _ in range(4):  # the first of which is not to be counted, and is not the fastest
        started = time.perf_counter()
        nn.functional.linear(x, weight)
        if x.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 8 * x.shape[0] * width**2 / best / 1e12
