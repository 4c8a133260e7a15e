"""The model run over demonstrations: one activation vector a demonstration, role and layer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sealign.checkpoints import BatchStore
from sealign.demonstrations import Demonstration
from sealign.errors import ActivationError, DemonstrationError, SettingError, unknown_name
from sealign.generation import evaluating, generate_ids
from sealign.prefix import Prefix, common_prefix, decoder_of, input_device, pad_right, pad_token
from sealign.prompts import PromptFormat
from sealign.recording import Recorder
from sealign.sites import ResolvedSite, resolve_sites, text_config, unwrap_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TokenChoice = Literal["last", "mean", "random"]
"""Which token of a sequence gives its activation: the last, the mean over all, or one at random (seeded)."""

NeutralChoice = Literal["prompt", "generated"]
"""What the neutral sequence is: the prompt, or the prompt and the model's own greedy completion."""

ROLES = ("neutral", "positive", "negative")

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Called as ``track(items, what, how_many)``; returns the items, showing progress as they are taken."""


def no_progress(items: Iterable[Any], what: str, how_many: int) -> Iterable[Any]:
    """Return the items without showing anything."""
    return items


@dataclass(frozen=True)
class CollectConfig:
    """How activations are collected.

    Attributes:
        token: which token gives a sequence's activation: ``last``, ``mean`` or ``random``.
        neutral: the neutral sequence: ``prompt``, or ``generated`` by the model after the prompt.
        max_new_tokens: at most this many generated tokens, at least 1.
        prompt_format: how prompts are written.
        batch_size: sequences run together, at least 1.
        seed: of the random token.

    Raises:
        SettingError: a value is unknown or out of range.

    Example:
        >>> CollectConfig(token="mean").token
        'mean'
    """

    token: TokenChoice = "last"
    neutral: NeutralChoice = "prompt"
    max_new_tokens: int = 32
    prompt_format: PromptFormat = PromptFormat()
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.token not in get_args(TokenChoice):
            raise SettingError(unknown_name("token choice", self.token, get_args(TokenChoice)))
        if self.neutral not in get_args(NeutralChoice):
            raise SettingError(unknown_name("neutral choice", self.neutral, get_args(NeutralChoice)))
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}, but it must be at least 1")


@dataclass(frozen=True)
class Activations:
    """Activations of n demonstrations at one site, by layer.

    Attributes:
        site: where they were read.
        neutral, positive, negative: layer -> (n, d) float32, on the CPU; row i is demonstration i.
    """

    site: str
    neutral: Mapping[int, Float[Tensor, "n d"]]
    positive: Mapping[int, Float[Tensor, "n d"]]
    negative: Mapping[int, Float[Tensor, "n d"]]


@dataclass(frozen=True)
class _Read:
    """One activation to take from a sequence: over its first ``length`` tokens."""

    role: int
    demonstration: int
    length: int
    random_index: int


@dataclass(frozen=True)
class _Sequence:
    ids: list[int]
    reads: list[_Read]


@torch.no_grad()
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
        site: ``mlp``, ``attention`` or ``residual``.
        layers: which layers; all if None.
        config: token, neutral, prompt format, batch size, seed.
        module_pattern: modules by path in place of the search by structure; see ``resolve_sites``.
        checkpoint_dir: where finished batches are kept, so that a killed run continues where it stopped;
            the same call with other settings, weights or demonstrations does not read them.
        track: shows progress.

    Raises:
        DemonstrationError: none given, or one longer than the model's context.
        ActivationError: NaN or infinity in an activation; names the layer and the demonstration.
        SiteError: a layer cannot be resolved.
    """
    if not demonstrations:
        raise DemonstrationError("no demonstrations given, but at least 1 is needed")
    sites = resolve_sites(model, site, layers, module_pattern=module_pattern)
    texts = [[item.prompt, item.positive, item.negative] for item in demonstrations]
    paths = [resolved.path for resolved in sites]
    store = BatchStore.open(checkpoint_dir, model, [repr(config), paths, texts])
    with evaluating(model):
        generated = None
        if config.neutral == "generated":
            generated = _generate_neutrals(model, tokenizer, demonstrations, config, store, track)
        sequences = _plan(tokenizer, demonstrations, config, generated)
        _check_context(model, sequences)
        return _collect(model, tokenizer, sites, sequences, len(demonstrations), site, config, store, track)


def _plan(
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    config: CollectConfig,
    generated: list[list[int]] | None,
) -> list[_Sequence]:
    """Lay out which sequences are run and what is read from each."""
    prompt_format = config.prompt_format.resolve(tokenizer)
    sequences = []
    for index, item in enumerate(demonstrations):
        # One generator a demonstration, so that the choice depends on nothing but seed and index.
        generator = random.Random(f"{config.seed}:{index}")

        def read(role: int, length: int, index: int = index, generator: random.Random = generator) -> _Read:
            return _Read(role, index, length, generator.randrange(length))

        prompt = prompt_format.encode_prompt(tokenizer, item.prompt)
        neutral = prompt if generated is None else prompt + generated[index]
        positive = prompt_format.encode(tokenizer, item.prompt, item.positive)
        negative = prompt_format.encode(tokenizer, item.prompt, item.negative)
        neutral_read = read(0, len(neutral))
        reads = [read(1, len(positive))]
        if generated is None:
            # Causal attention: the prompt's activations are the same with a completion behind it.
            reads.append(neutral_read)
        else:
            sequences.append(_Sequence(neutral, [neutral_read]))
        sequences.append(_Sequence(positive, reads))
        sequences.append(_Sequence(negative, [read(2, len(negative))]))
    return sequences


def _check_context(model: PreTrainedModel, sequences: Sequence[_Sequence]) -> None:
    limit = getattr(text_config(unwrap_model(model)), "max_position_embeddings", None)
    longest = max(sequences, key=lambda sequence: len(sequence.ids))
    if isinstance(limit, int) and len(longest.ids) > limit:
        read = longest.reads[0]
        raise DemonstrationError(
            f"demonstration {read.demonstration} ({ROLES[read.role]}) is {len(longest.ids)} tokens long, but the "
            f"model's context is {limit}; shorten it or leave it out"
        )


def _collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sites: Sequence[ResolvedSite],
    sequences: list[_Sequence],
    count: int,
    site: str,
    config: CollectConfig,
    store: BatchStore,
    track: Track,
) -> Activations:
    device, runner = input_device(model), decoder_of(model)
    prefix_ids = common_prefix([sequence.ids for sequence in sequences])
    order = sorted(sequences, key=lambda sequence: len(sequence.ids), reverse=True)
    batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    result: dict[int, list[Tensor | None]] = {resolved.layer: [None, None, None] for resolved in sites}

    prefix: Prefix | None = None
    past: dict[int, Tensor] = {}
    for number, batch in enumerate(track(batches, "Collecting activations", len(batches))):
        rows = store.load("activations", number)
        if rows is None:
            if prefix is None:
                recorder = Recorder(sites, lambda output, _: output[0].float())
                with recorder:
                    prefix = Prefix.run(runner, prefix_ids, device)
                past = recorder.recorded if prefix.ids else {}
            rows = _run_batch(runner, sites, batch, prefix, past, config, pad_token(tokenizer), device)
            store.save("activations", number, rows)
        _scatter(rows, batch, result, count)
    store.clear()
    by_role = [{layer: _filled(blocks[role]) for layer, blocks in result.items()} for role in range(3)]
    return Activations(site, *by_role)


def _filled(block: Tensor | None) -> Tensor:
    assert block is not None
    return block


def _run_batch(
    runner: nn.Module,
    sites: Sequence[ResolvedSite],
    batch: Sequence[_Sequence],
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
                f"NaN or infinity in the activations of layer {layer} for demonstration {read.demonstration} "
                f"({ROLES[read.role]}); use a wider dtype (float32 or bfloat16) or leave the demonstration out"
            )
    return rows


def _reduce(
    hidden: Float[Tensor, "t d"], before: Float[Tensor, "p d"], read: _Read, token: TokenChoice
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


def _scatter(
    rows: Mapping[str, Tensor],
    batch: Sequence[_Sequence],
    result: dict[int, list[Tensor | None]],
    count: int,
) -> None:
    reads = [read for sequence in batch for read in sequence.reads]
    for layer, blocks in result.items():
        block = rows[str(layer)]
        for role in range(3):
            chosen = [position for position, read in enumerate(reads) if read.role == role]
            if not chosen:
                continue
            target = blocks[role]
            if target is None:
                target = torch.empty(count, block.shape[1])
                blocks[role] = target
            target[[reads[position].demonstration for position in chosen]] = block[chosen]


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
