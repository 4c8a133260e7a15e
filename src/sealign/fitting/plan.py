"""Plan of a fit: estimated time and memory, from the configuration of a model without its weights."""

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
from sealign.fitting.collecting import read_width, resolve_read_sites
from sealign.fitting.edit_config import EditConfig
from sealign.fitting.sequences import plan_sequences
from sealign.models.devices import SPLIT, choose_device
from sealign.models.shared_prefix import SHORTEST, common_prefix
from sealign.models.sites import select_layers
from sealign.models.structure import text_config, unwrap_model
from sealign.spectral.decomposition import EXACT_BELOW

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHARACTERS_PER_TOKEN = 4
"""Ratio by which tokens are estimated without a tokenizer."""

QR_FLOPS = 28
"""Cost of the products and QR decompositions of a small fit, in units of n^2 d; measured at the rate of a product."""

SVD_FLOPS = 120
"""Cost of a full singular value decomposition, in units of its size cubed; measured likewise."""

BLOCK = 64
"""Typical number of columns in the block of an iterative decomposition: enough for a rank of about 20."""

SINGLE_ROUNDS = 14
"""Typical number of rounds of subspace iteration in float32."""

DOUBLE_ROUNDS = 4
"""Typical number of rounds of subspace iteration in float64."""

MAX_ROWS, MAX_WIDTH = 512, 4096
"""Maximum number of rows, and of features, in the product whose rate is measured; the rate does not grow beyond."""


@dataclass(frozen=True)
class FitPlan:
    """Estimated cost of a fit.

    Attributes:
        demonstrations: Number n of demonstrations.
        tokens: Number of tokens that the model is run over, padding included.
        layers: Number of edited layers.
        width: Number of features d of the activations that are read.
        parameters: Number of parameters of the model.
        active_parameters: Number of parameters that act on one token, without the embeddings; fewer than all in a
            mixture of experts.
        model_bytes: Size of the weights.
        keep: How the activations are stored.
        kept_bytes: Size of the stored activations.
        peak_bytes: Peak memory: the weights, the activations stored in memory, and the workspace of one layer.
        factor_bytes: Size of the edit for each direction that it keeps or drops at every layer.
        tflops: Throughput at which the model runs, in TFLOP/s.
        collection_seconds: Time to run the model.
        decomposition_seconds: Time to decompose the cross-covariances of all layers on this machine's CPU; 0 for a
            method that decomposes none, whose fit is short beside the collection.
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
    tflops: float
    collection_seconds: float
    decomposition_seconds: float


def plan_fit(
    skeleton: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    demonstrations: Sequence[Demonstration],
    config: EditConfig = EditConfig(),
    *,
    device: str = "auto",
    tflops: float | None = None,
    free_memory: int | None = None,
) -> FitPlan:
    """Estimate the cost of a fit.

    A token costs 2 p + 4 t d l floating-point operations, with p active parameters, l layers and t tokens before it.
    The rate is measured by products of the model's own shapes. For SEA the estimates are within a factor of two of
    what is measured (``benchmarks/plan.py``).

    Args:
        skeleton: The model, or one without weights, as returned by ``load_skeleton``.
        tokenizer: Tokenizer of the model. If None, tokens are estimated from the number of characters.
        demonstrations: Demonstrations to fit from.
        config: Settings of the fit.
        device: Device that a model without weights would be loaded to; the rate is measured there.
        tflops: Sustained throughput of other hardware in TFLOP/s, above 0. Default: measured here.
        free_memory: Free memory of other hardware in bytes. Default: what this process may use.

    Raises:
        SettingError: ``tflops`` is not above 0.
        SiteError: The model does not have a site or layer.
    """
    if tflops is not None and not 0 < tflops < float("inf"):
        raise SettingError(f"tflops is {tflops}, but it must be finite and above 0; an A100 sustains about 120")
    settings, count = text_config(unwrap_model(skeleton)), len(demonstrations)
    depth = settings.num_hidden_layers
    edited = select_layers(config.layers, depth, dict.fromkeys(range(depth), 0.0))
    collected = list(range(depth)) if config.chooses_by_signature else edited
    sites = resolve_read_sites(skeleton, config.read_site, collected, module_pattern=config.read_pattern)
    width = read_width(skeleton, sites[0])
    # A method that needs a pass over the demonstrations for each layer stores one layer at a time.
    passes, stored = (len(edited), 1) if config.needs_pass_per_layer else (1, len(collected))
    keep = choose_keep(count, [width] * stored, needs_rows=config.needs_rows, free_memory=free_memory)
    kept = rows_bytes(count, [width] * stored) if keep.kept == "rows" else sums_bytes([width] * stored)
    parameters, active = _count_parameters(skeleton, settings)
    model_bytes = parameters * skeleton.dtype.itemsize
    workspace = 8 * (3 * count * width if count < width else 5 * width**2)
    padded, length, generated = _count_tokens(tokenizer, demonstrations, config)
    collection, rate = _collection_seconds(
        skeleton, config, active=active, tokens=padded, length=length, generated=generated, device=device, rate=tflops
    )
    return FitPlan(
        demonstrations=count,
        tokens=passes * (padded + generated),
        layers=len(edited),
        width=width,
        parameters=parameters,
        active_parameters=active,
        model_bytes=model_bytes,
        keep=keep,
        kept_bytes=kept,
        peak_bytes=model_bytes + workspace + (kept if keep.place == "memory" else 0),
        factor_bytes=2 * len(edited) * width * 4,
        tflops=rate,
        collection_seconds=passes * collection,
        decomposition_seconds=len(edited) * _decomposition_seconds(count, width) if config.decomposes else 0.0,
    )


def _count_parameters(skeleton: PreTrainedModel, settings: Any) -> tuple[int, int]:
    """Return the number of all parameters, and of those that act on a token, without the embeddings and the head."""
    total = active = 0
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((getattr(settings, name) for name in names if getattr(settings, name, None)), 1)
    fraction = getattr(settings, "num_experts_per_tok", experts) / experts
    ends = (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())  # type: ignore[no-untyped-call]
    outside = {id(module.weight) for module in ends if module is not None}
    for name, parameter in skeleton.named_parameters():
        total += parameter.numel()
        if id(parameter) not in outside:
            active += int(parameter.numel() * (fraction if ".experts." in name else 1))
    return total, active


def _count_tokens(
    tokenizer: PreTrainedTokenizerBase | None, demonstrations: Sequence[Demonstration], config: EditConfig
) -> tuple[int, int, int]:
    """Return the number of tokens in all batches, the mean length of a sequence, and the number of generated tokens."""
    generated = len(demonstrations) * config.max_new_tokens if config.neutral == "generated" else 0
    if tokenizer is None:
        prompts = ["".join(turn.content for turn in item.history) + item.prompt for item in demonstrations]
        texts = [
            prompt + text
            for prompt, item in zip(prompts, demonstrations, strict=True)
            for text in (item.positive, item.negative)
        ]
        lengths = [max(1, len(text) // CHARACTERS_PER_TOKEN) for text in texts]
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


def _collection_seconds(
    skeleton: PreTrainedModel,
    config: EditConfig,
    *,
    active: int,
    tokens: int,
    length: int,
    generated: int,
    device: str,
    rate: float | None,
) -> tuple[float, float]:
    """Return the time of one pass over the demonstrations, and the rate of its batches in TFLOP/s."""
    settings, dtype = text_config(unwrap_model(skeleton)), skeleton.dtype
    bare = skeleton.device.type == "meta"
    place = choose_device("auto" if device == SPLIT else device) if bare else skeleton.device
    width, depth = settings.hidden_size, settings.num_hidden_layers
    fast = rate or measure_tflops(config.batch_size * length, width, dtype, place)
    seconds = (2 * active * tokens + 4 * length * width * depth * tokens) / fast / 1e12
    if generated:
        slow = rate or measure_tflops(config.batch_size, width, dtype, place)
        seconds += 2 * active * generated / slow / 1e12
    return seconds, fast


def _decomposition_seconds(count: int, width: int) -> float:
    """Return the time to decompose both sides of one layer on the CPU, from factors or from (d, d) sums."""
    double = measure_tflops(count, width, torch.float64) * 1e12
    if count <= EXACT_BELOW and count < width:
        return 2 * (QR_FLOPS * count**2 * width + SVD_FLOPS * count**3) / double
    single = measure_tflops(count, width, torch.float32) * 1e12
    thin = measure_tflops(BLOCK, width, torch.float64) * 1e12
    if count < width:
        grams, rounds = 3 * count**2 * width, 2 * SINGLE_ROUNDS * 4 * count**2 * BLOCK
        return (grams + rounds) / single + 2 * DOUBLE_ROUNDS * 8 * count * width * BLOCK / thin
    sums = 4 * count * width**2 / double
    if width <= EXACT_BELOW:
        return sums + 2 * SVD_FLOPS * width**3 / double
    rounds = 2 * SINGLE_ROUNDS * 4 * width**2 * BLOCK
    return sums + rounds / single + 2 * DOUBLE_ROUNDS * 4 * width**2 * BLOCK / thin


def measure_tflops(rows: int, width: int, dtype: torch.dtype, device: torch.device = torch.device("cpu")) -> float:
    """Measure the throughput of a product of an (m, d) with a (d, 4 d) matrix, in TFLOP/s.

    Args:
        rows: Number m of rows, that is of tokens that run together.
        width: Number of features d.
        dtype: Type of both matrices.
        device: Device of both matrices.

    Example:
        >>> measure_tflops(16, 64, torch.float32) > 0
        True
    """
    width = min(width, MAX_WIDTH)
    x = torch.randn(min(max(1, rows), MAX_ROWS), width, device=device).to(dtype)
    weight = torch.randn(4 * width, width, device=device).to(dtype)
    best = float("inf")
    for _ in range(4):  # the fastest counts, so that the first, which warms up, does not
        started = time.perf_counter()
        nn.functional.linear(x, weight)
        if x.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 8 * x.shape[0] * width**2 / best / 1e12
