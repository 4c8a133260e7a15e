"""Collector: runs a model over demonstrations, and reads activations at several sites and for several token choices."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from sealign.demonstrations.demonstration import Demonstration, demonstrations_hash
from sealign.errors import ActivationError, DemonstrationError
from sealign.fitting.activations import Activations
from sealign.fitting.checkpoints import BatchStore
from sealign.fitting.collect_config import CollectConfig, TokenChoice
from sealign.fitting.mapped_tensors import map_tensors
from sealign.fitting.sequences import ROLES, Read, check_context, check_tokens, plan_sequences
from sealign.fitting.token_ranges import TokenRanges
from sealign.models.batching import pad_right, pad_token
from sealign.models.eval_mode import eval_mode
from sealign.models.fingerprint import template_hash, tokenizer_hash
from sealign.models.generation import generate_ids
from sealign.models.recorder import Recorder
from sealign.models.shared_layers import without_layers_above
from sealign.models.shared_prefix import Prefix, common_prefix
from sealign.models.sites import ResolvedSite
from sealign.models.structure import decoder_of, input_device
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Collector:
    """Collects activations of a model at given sites, for given token choices.

    Attributes:
        model: Model to run.
        tokenizer: Tokenizer of the model.
        sites: Mapping from the name of a site to the modules to read.
        tokens: Token choices; that of ``config`` is not used.
        config: Other collection settings.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sites: Mapping[str, Sequence[ResolvedSite]]
    tokens: Sequence[TokenChoice]
    config: CollectConfig
    track: Track = no_progress

    @property
    def _modules(self) -> list[ResolvedSite]:
        return [resolved for sites in self.sites.values() for resolved in sites]

    def open_store(
        self, checkpoint_dir: str | Path | None, demonstrations: Sequence[Demonstration], *more: object
    ) -> AbstractContextManager[BatchStore]:
        """Return the store for finished batches of the given demonstrations, to be used in a ``with`` block.

        Args:
            checkpoint_dir: Folder of the store; None to store nothing.
            demonstrations: Demonstrations to run.
            *more: Further values that the stored tensors depend on, besides weights, settings and demonstrations.
        """
        texts = demonstrations_hash(demonstrations)
        prompt_format = repr(self.config.prompt_format.resolve(self.tokenizer))
        tokens = [tokenizer_hash(self.tokenizer), template_hash(self.tokenizer)]
        paths = {site: [resolved.path for resolved in sites] for site, sites in self.sites.items()}
        depends_on = [*more, list(self.tokens), repr(self.config), prompt_format, *tokens, paths, texts]
        return BatchStore.open(checkpoint_dir, self.model, depends_on)

    @torch.no_grad()
    def run(
        self, demonstrations: Sequence[Demonstration], store: BatchStore, file: BinaryIO | None = None
    ) -> dict[tuple[str, TokenChoice], Activations]:
        """Run the model over demonstrations, except for stored batches; return activations by site and token choice.

        Args:
            demonstrations: Demonstrations to run; must not be empty.
            store: Store of finished batches. The caller clears it when the result has been saved or used.
            file: Empty file opened in binary read-write mode. If given, the result is memory-mapped to it, so that it
                may be larger than memory.

        Raises:
            DemonstrationError, ActivationError, ModelError: As for ``collect_activations``.
        """
        if not demonstrations:
            raise DemonstrationError("no demonstrations given, but at least 1 is needed")
        with eval_mode(self.model):
            generated = self._generate_neutrals(demonstrations, store) if self.config.neutral == "generated" else None
            configs = [self.config.replace(token=token) for token in self.tokens]
            plans = [plan_sequences(self.tokenizer, demonstrations, config, generated) for config in configs]
            check_context(self.model, plans[0], demonstrations)
            check_tokens(self.model, plans[0])
            # The token choices differ in what is read of the sequences, which are the same.
            sequences = [
                _Sequence(same[0].ids, [sequence.reads for sequence in same]) for same in zip(*plans, strict=True)
            ]
            with without_layers_above(self.model, self._modules):
                return self._run_sequences(sequences, demonstrations, store, file)

    def _run_sequences(
        self,
        sequences: list[_Sequence],
        demonstrations: Sequence[Demonstration],
        store: BatchStore,
        file: BinaryIO | None,
    ) -> dict[tuple[str, TokenChoice], Activations]:
        order = sorted(sequences, key=lambda sequence: len(sequence.ids), reverse=True)
        batches = [order[i : i + self.config.batch_size] for i in range(0, len(order), self.config.batch_size)]
        result: dict[str, list[Tensor]] = {}
        prefix: tuple[Prefix, dict[str, dict[int, Tensor]]] | None = None
        reused = 0
        for number, batch in enumerate(self.track(batches, "Collecting activations", len(batches))):
            rows = store.load("activations", number)
            reused += rows is not None
            if rows is None:
                prefix = prefix or self._run_prefix([sequence.ids for sequence in sequences])
                rows = self._run_batch(batch, demonstrations, *prefix)
                store.save("activations", number, rows)
            widths = {name: block.shape[1] for name, block in rows.items()}
            result = result or _empty_result(widths, len(demonstrations), file)
            self._copy_rows(rows, batch, result)
        places = ", ".join(f"{site} {[each.layer for each in own]}" for site, own in self.sites.items())
        _log.info(
            "collected activations of %d demonstrations at %s; %d of %d batches were kept from an earlier run",
            len(demonstrations), places, reused, len(batches),
        )  # fmt: skip
        return {
            (site, token): Activations(
                site,
                *(
                    {each.layer: result[_name(site, token, each.layer)][role] for each in sites}
                    for role in range(len(ROLES))
                ),
            )
            for site, sites in self.sites.items()
            for token in self.tokens
        }

    @contextmanager
    def _recording(self, reduce: Callable[[Tensor, str, int], Any]) -> Iterator[dict[str, dict[int, Any]]]:
        """Record a reduction of each activation while a block lasts; yield a mapping from site and layer to it."""
        with ExitStack() as stack:
            recorders = {
                site: stack.enter_context(Recorder(sites, functools.partial(_of_site, reduce, site)))
                for site, sites in self.sites.items()
            }
            yield {site: recorder.recorded for site, recorder in recorders.items()}

    def _run_prefix(self, sequences: Sequence[Sequence[int]]) -> tuple[Prefix, dict[str, dict[int, Tensor]]]:
        """Run the common prefix of all sequences; return it with its activations, (p, d) float32, by site and layer."""
        # The batch has one row, so flattening batch and tokens, as some blocks do, changes nothing.
        with self._recording(lambda output, _site, _layer: output.reshape(-1, output.shape[-1]).float()) as recorded:
            prefix = Prefix.run(decoder_of(self.model), common_prefix(sequences), input_device(self.model))
        return prefix, recorded if prefix.ids else {}

    def _run_batch(
        self,
        batch: Sequence[_Sequence],
        demonstrations: Sequence[Demonstration],
        prefix: Prefix,
        before: Mapping[str, Mapping[int, Tensor]],
    ) -> dict[str, Tensor]:
        """Run one batch and return a (number of reads, d) tensor for each site, token choice and layer."""
        start = len(prefix.ids)
        pad = pad_token(self.tokenizer, self.model)
        ids, mask = pad_right([sequence.ids[start:] for sequence in batch], pad, input_device(self.model))
        reads = [_reads(batch, choice) for choice in range(len(self.tokens))]
        ranges = [TokenRanges.of(chosen, start) for chosen in reads]

        def reduce(output: Tensor, site: str, layer: int) -> list[Tensor]:
            hidden = output.reshape(*ids.shape, -1)  # some blocks flatten batch and tokens
            past = before[site][layer].to(hidden.device) if start else hidden.new_zeros(0, hidden.shape[-1]).float()
            return [each.means(hidden, past) for each in ranges]

        with self._recording(reduce) as recorded:
            prefix.continue_batch(decoder_of(self.model), ids, mask)
        rows: dict[str, Tensor] = {}
        for site, by_layer in recorded.items():
            for layer, blocks in by_layer.items():
                for token, block, chosen in zip(self.tokens, blocks, reads, strict=True):
                    rows[_name(site, token, layer)] = own = block.cpu()
                    _check_finite(own, layer, [read for _, read in chosen], demonstrations)
        return rows

    def _copy_rows(
        self, rows: Mapping[str, Tensor], batch: Sequence[_Sequence], result: Mapping[str, list[Tensor]]
    ) -> None:
        """Copy the activations of a batch to the rows of their demonstrations."""
        for choice, token in enumerate(self.tokens):
            reads = [read for _, read in _reads(batch, choice)]
            names = [_name(site, token, each.layer) for site, sites in self.sites.items() for each in sites]
            for role in range(len(ROLES)):
                chosen = [position for position, read in enumerate(reads) if read.role == role]
                where = [reads[position].demonstration for position in chosen]
                for name in names:
                    result[name][role][where] = rows[name][chosen]

    def _generate_neutrals(self, demonstrations: Sequence[Demonstration], store: BatchStore) -> list[list[int]]:
        """Return the model's greedy completion of each prompt, up to its end token."""
        config = self.config
        prompts = [
            config.prompt_format.encode_prompt(self.tokenizer, item.prompt, history=item.history)
            for item in demonstrations
        ]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
        batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
        completions: list[list[int]] = [[] for _ in prompts]
        for number, batch in enumerate(self.track(batches, "Generating neutral completions", len(batches))):
            saved = store.load("generated", number)
            if saved is None:
                chosen = [prompts[index] for index in batch]
                saved = {"ids": generate_ids(self.model, self.tokenizer, chosen, config.max_new_tokens)}
                store.save("generated", number, saved)
            for index, row in zip(batch, saved["ids"].tolist(), strict=True):
                completions[index] = [token for token in row if token >= 0]
        return completions


@dataclass(frozen=True)
class _Sequence:
    """Tokens that the model runs over, and what each token choice reads from them."""

    ids: list[int]
    reads: list[list[Read]]


def _reads(batch: Sequence[_Sequence], choice: int) -> list[tuple[int, Read]]:
    """Return row and read of everything that a token choice reads from a batch, in its order."""
    return [(row, read) for row, sequence in enumerate(batch) for read in sequence.reads[choice]]


def _of_site(reduce: Callable[[Tensor, str, int], Any], site: str, output: Tensor, layer: int) -> Any:
    return reduce(output, site, layer)


def _name(site: str, token: str, layer: int) -> str:
    """Return the name of a matrix in a store."""
    return f"{site}.{token}.{layer}"


def _empty_result(widths: Mapping[str, int], count: int, file: BinaryIO | None) -> dict[str, list[Tensor]]:
    """Return an empty (n, d) matrix for each role of each site, token choice and layer."""
    if file is None:
        return {name: [torch.empty(count, width) for _ in ROLES] for name, width in widths.items()}
    shapes = {f"{role}.{name}": (count, width) for name, width in widths.items() for role in ROLES}
    mapped = map_tensors(file, shapes, torch.float32)
    return {name: [mapped[f"{role}.{name}"] for role in ROLES] for name in widths}


def _check_finite(block: Tensor, layer: int, reads: Sequence[Read], demonstrations: Sequence[Demonstration]) -> None:
    finite = torch.isfinite(block).all(dim=1)
    if not bool(finite.all()):
        read = reads[int((~finite).int().argmax())]
        raise ActivationError(
            f"NaN or infinity in the activations of layer {layer} for the demonstration "
            f"{demonstrations[read.demonstration]} ({ROLES[read.role]}); use a dtype with a larger range (float32 "
            "or bfloat16) or remove this demonstration"
        )
