"""Run a model over demonstrations and collect one activation vector per demonstration, role and layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sealign.demonstrations.demonstration import Demonstration
from sealign.errors import ActivationError, DemonstrationError
from sealign.fitting.activations import Activations
from sealign.fitting.checkpoints import BatchStore
from sealign.fitting.collect_config import CollectConfig, TokenChoice
from sealign.fitting.mapped_tensors import map_tensors
from sealign.fitting.sequences import ROLES, Read, TokenSequence, check_context, plan_sequences
from sealign.models.batching import pad_right, pad_token
from sealign.models.eval_mode import eval_mode
from sealign.models.fingerprint import template_hash, tokenizer_hash
from sealign.models.generation import generate_ids
from sealign.models.hooks import Recorder
from sealign.models.output_matrices import HEADS, resolve_heads
from sealign.models.shared_prefix import Prefix, common_prefix
from sealign.models.sites import ResolvedSite, resolve_sites
from sealign.models.structure import decoder_of, input_device
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def collect_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    site: str = "mlp",
    layers: Sequence[int] | None = None,
    config: CollectConfig = CollectConfig(),
    module_pattern: str | None = None,
    checkpoint_dir: str | Path | None = None,
    into: BinaryIO | None = None,
    track: Track = no_progress,
) -> Activations:
    """Run a model over demonstrations and keep one vector a demonstration, role and layer.

    H, H+ and H- of Qiu et al. 2024 (arXiv 2405.09719), section 3. Sequences run in batches sorted by length; a
    prefix that all share is run once; a neutral prompt is read from the positive sequence that begins with it.
    Beside the result, memory holds one batch's activations of one layer at a time.

    Args:
        model: any decoder of transformers.
        tokenizer: the model's own.
        demonstrations: n of them, at least 1.
        site: ``mlp``, ``attention`` or ``residual``, or ``heads`` for the outputs of all attention heads side by side.
        layers: which layers; all if None.
        config: token, neutral, prompt format, batch size, seed.
        module_pattern: modules by path in place of the search by structure; see ``resolve_sites``.
        checkpoint_dir: where finished batches are kept, so that a killed run continues where it stopped;
            the same call with other settings, weights or demonstrations does not read them.
        into: an empty file, open for reading and writing, that the result is mapped from, for more rows than memory
            holds; in memory if None.
        track: shows progress.

    Raises:
        DemonstrationError: none given, or one longer than the model's context.
        ActivationError: NaN or infinity in an activation; names the layer and the demonstration.
        SiteError: a layer cannot be resolved.
    """
    settings: dict[str, Any] = {"site": site, "layers": layers, "config": config, "module_pattern": module_pattern}
    found, store = collect_kept(
        model, tokenizer, demonstrations, checkpoint_dir=checkpoint_dir, into=into, track=track, **settings
    )
    store.clear()
    return found


def collect_kept(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    site: str = "mlp",
    layers: Sequence[int] | None = None,
    config: CollectConfig = CollectConfig(),
    module_pattern: str | None = None,
    checkpoint_dir: str | Path | None = None,
    into: BinaryIO | None = None,
    track: Track = no_progress,
) -> tuple[Activations, BatchStore]:
    """Return what ``collect_activations`` does, and its finished batches, to be cleared when the result is safe.

    Args:
        model, tokenizer, demonstrations, site, layers, config, module_pattern, checkpoint_dir, into, track: as there.
    """
    if not demonstrations:
        raise DemonstrationError("no demonstrations given, but at least 1 is needed")
    sites = resolve_reads(model, site, layers, module_pattern=module_pattern)
    store = BatchStore.open(checkpoint_dir, model, inputs_of(tokenizer, demonstrations, sites, config))
    with torch.no_grad(), eval_mode(model):
        generated = None
        if config.neutral == "generated":
            generated = _generate_neutrals(model, tokenizer, demonstrations, config, store, track)
        sequences = plan_sequences(tokenizer, demonstrations, config, generated)
        check_context(model, sequences, demonstrations)
        found = _collect(model, tokenizer, sites, sequences, demonstrations, site, config, store, into, track)
    return found, store


def resolve_reads(
    model: nn.Module, site: str, layers: Sequence[int] | None = None, *, module_pattern: str | None = None
) -> tuple[ResolvedSite, ...]:
    """Find the modules whose outputs, or inputs for ``heads``, are read at a site; see ``resolve_sites``.

    Args:
        model, site, layers, module_pattern: As for ``collect_activations``.

    Raises:
        SiteError: A module cannot be identified.
    """
    if site == HEADS:
        return resolve_heads(model, layers)
    return resolve_sites(model, site, layers, module_pattern=module_pattern)


def inputs_of(
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    sites: Sequence[ResolvedSite],
    config: CollectConfig,
) -> list[object]:
    """Everything beside the weights that collected activations depend on."""
    texts = [[item.prompt, item.positive, item.negative] for item in demonstrations]
    prompt_format = repr(config.prompt_format.resolve(tokenizer))
    tokens = [tokenizer_hash(tokenizer), template_hash(tokenizer)]
    return [repr(config), prompt_format, *tokens, [resolved.path for resolved in sites], texts]


def _collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sites: Sequence[ResolvedSite],
    sequences: list[TokenSequence],
    demonstrations: Sequence[Demonstration],
    site: str,
    config: CollectConfig,
    store: BatchStore,
    into: BinaryIO | None,
    track: Track,
) -> Activations:
    device, runner = input_device(model), decoder_of(model)
    prefix_ids = common_prefix([sequence.ids for sequence in sequences])
    order = sorted(sequences, key=lambda sequence: len(sequence.ids), reverse=True)
    batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    result: dict[int, list[Tensor]] = {}

    prefix: Prefix | None = None
    past: dict[int, Tensor] = {}
    for number, batch in enumerate(track(batches, "Collecting activations", len(batches))):
        rows = store.load("activations", number)
        if rows is None:
            if prefix is None:
                # One row: some blocks flatten batch and tokens, some do not.
                recorder = Recorder(sites, lambda output, _: output.reshape(-1, output.shape[-1]).float())
                with recorder:
                    prefix = Prefix.run(runner, prefix_ids, device)
                past = recorder.recorded if prefix.ids else {}
            pad = pad_token(tokenizer)
            rows = _run_batch(runner, sites, batch, demonstrations, prefix, past, config, pad, device)
            store.save("activations", number, rows)
        result = result or _empty({layer: block.shape[1] for layer, block in rows.items()}, len(demonstrations), into)
        _scatter(rows, batch, result)
    by_role = [{layer: blocks[role] for layer, blocks in sorted(result.items())} for role in range(3)]
    return Activations(site, *by_role)


def _empty(widths: Mapping[str, int], count: int, into: BinaryIO | None) -> dict[int, list[Tensor]]:
    """Room for the three roles of each layer."""
    if into is None:
        return {int(layer): [torch.empty(count, width) for _ in ROLES] for layer, width in widths.items()}
    names = {f"{role}.{layer}": (count, width) for layer, width in widths.items() for role in ROLES}
    mapped = map_tensors(into, names, torch.float32)
    return {int(layer): [mapped[f"{role}.{layer}"] for role in ROLES] for layer in widths}


def _run_batch(
    runner: nn.Module,
    sites: Sequence[ResolvedSite],
    batch: Sequence[TokenSequence],
    demonstrations: Sequence[Demonstration],
    prefix: Prefix,
    past: Mapping[int, Tensor],
    config: CollectConfig,
    pad: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Run one batch and return layer -> (reads, d), the reads in the order of the batch."""
    start = len(prefix.ids)
    ids, mask = pad_right([sequence.ids[start:] for sequence in batch], pad, device)
    reads = [(row, read) for row, sequence in enumerate(batch) for read in sequence.reads]

    def reduce(output: Tensor, layer: int) -> Tensor:
        hidden = output.reshape(*ids.shape, -1)  # some blocks flatten batch and tokens
        before = past[layer].to(hidden.device) if start else hidden.new_zeros(0, hidden.shape[-1])
        return torch.stack([_reduce(hidden[row], before, read, config.token) for row, read in reads])

    recorder = Recorder(sites, reduce)
    with recorder:
        prefix.continue_batch(runner, ids, mask)
    rows = {str(layer): block.cpu() for layer, block in recorder.recorded.items()}
    for layer, block in rows.items():
        finite = torch.isfinite(block).all(dim=1)
        if not bool(finite.all()):
            read = reads[int((~finite).int().argmax())][1]
            raise ActivationError(
                f"NaN or infinity in the activations of layer {layer} for the demonstration "
                f"{demonstrations[read.demonstration]} ({ROLES[read.role]}); use a wider dtype (float32 or bfloat16) "
                "or leave it out"
            )
    return rows


def _reduce(
    hidden: Float[Tensor, "t d"], before: Float[Tensor, "p d"], read: Read, token: TokenChoice
) -> Float[Tensor, " d"]:
    """The activation of one read, given its row of the batch and the prefix's activations."""
    start = before.shape[0]
    if token == "mean":
        end = read.length - start
        # A neutral prompt can end inside the shared prefix.
        total = before[: read.length].sum(0) + hidden[: max(end, 0)].float().sum(0)
        return total / read.length
    index = read.length - 1 if token == "last" else read.random_index
    return before[index] if index < start else hidden[index - start].float()


def _scatter(rows: Mapping[str, Tensor], batch: Sequence[TokenSequence], result: Mapping[int, list[Tensor]]) -> None:
    reads = [read for sequence in batch for read in sequence.reads]
    for role in range(len(ROLES)):
        chosen = [position for position, read in enumerate(reads) if read.role == role]
        where = [reads[position].demonstration for position in chosen]
        for layer, blocks in result.items():
            blocks[role][where] = rows[str(layer)][chosen]


def _generate_neutrals(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    config: CollectConfig,
    store: BatchStore,
    track: Track,
) -> list[list[int]]:
    """Return each prompt's greedy completion, without what follows the end token."""
    prompts = [config.prompt_format.encode_prompt(tokenizer, item.prompt) for item in demonstrations]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    completions: list[list[int]] = [[] for _ in prompts]
    for number, batch in enumerate(track(batches, "Generating neutral completions", len(batches))):
        saved = store.load("generated", number)
        if saved is None:
            saved = {"ids": generate_ids(model, tokenizer, [prompts[i] for i in batch], config.max_new_tokens)}
            store.save("generated", number, saved)
        for index, row in zip(batch, saved["ids"].tolist(), strict=True):
            completions[index] = [token for token in row if token >= 0]
    return completions
