"""What a fit has of the activations of every layer: their rows, or their sums."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import torch
from torch import Tensor

from sealign.demonstrations.demonstration import Demonstration
from sealign.errors import SettingError
from sealign.fitting.activation_store import Keep, rows_bytes, sums_bytes
from sealign.fitting.activations import Activations
from sealign.fitting.checkpoints import BatchStore
from sealign.fitting.collecting import collect_kept, inputs_of, resolve_reads
from sealign.fitting.edit_config import EditConfig
from sealign.fitting.layer_statistics import LayerStatistics
from sealign.fitting.mapped_tensors import map_tensors
from sealign.fitting.workers import gather_rows
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHUNK = 512
"""Demonstrations whose rows are held at a time while sums are made."""

DEMONSTRATIONS = "demonstrations"
"""The name under which saved sums say how many demonstrations are in them."""


class Collected(Protocol):
    """What a fit has of the activations."""

    @property
    def layers(self) -> Sequence[int]:
        """Those that were collected, rising."""

    def statistics(self, layer: int) -> LayerStatistics:
        """Return the statistics of a layer over the demonstrations of all workers."""

    def rows(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return H, H+ and H- of a layer, (n, d) each, over the demonstrations of all workers.

        Raises:
            SettingError: Only sums were kept.
        """


class CollectedRows:
    """Rows of activations, from which the statistics of a layer are computed on demand."""

    def __init__(self, activations: Activations, config: EditConfig) -> None:
        self._activations = activations
        self._config = config

    @property
    def layers(self) -> Sequence[int]:
        """Those that were collected, rising."""
        return sorted(self._activations.neutral)

    def statistics(self, layer: int) -> LayerStatistics:
        """Return the statistics of a layer."""
        found = self._activations
        neutral = found.neutral[layer]
        centered, feature_map = self._config.statistics_settings()
        made = LayerStatistics(neutral.shape[1], centered=centered, feature_map=feature_map)
        # In chunks, so that the float64 copies are small.
        for start in range(0, neutral.shape[0], CHUNK):
            part = slice(start, start + CHUNK)
            made.update(neutral[part], found.positive[layer][part], found.negative[layer][part])
        made.combine()
        return made

    def rows(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return H, H+ and H- of a layer."""
        found = self._activations
        neutral, positive, negative = (
            gather_rows(matrix[layer]) for matrix in (found.neutral, found.positive, found.negative)
        )
        return neutral, positive, negative


class CollectedSums:
    """Sums over activations, to which demonstrations were added as they were run."""

    def __init__(self, by_layer: Mapping[int, LayerStatistics]) -> None:
        self._by_layer = by_layer

    @property
    def layers(self) -> Sequence[int]:
        """Those that were collected, rising."""
        return sorted(self._by_layer)

    def statistics(self, layer: int) -> LayerStatistics:
        """Return the statistics of a layer."""
        found = self._by_layer[layer]
        found.combine()
        return found

    def rows(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Raise, since sums hold no rows."""
        raise SettingError(f"layer {layer} has sums only, but this method needs rows; pass keep=Keep('rows')")


@contextmanager
def collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    config: EditConfig,
    layers: Sequence[int],
    keep: Keep,
    *,
    checkpoint_dir: str | Path | None = None,
    track: Track = no_progress,
) -> Iterator[Collected]:
    """Run a model over this worker's demonstrations, and yield what is kept of them until the block ends.

    Args:
        model, tokenizer: as for ``collect_activations``.
        demonstrations: this worker's own.
        config: settings of the fit.
        layers: which.
        keep: rows or sums, in memory or on disk.
        checkpoint_dir: where finished batches are kept until the block ends without an error, so that a killed run
            continues where it stopped; of sums, those since the sums were saved.
        track: shows progress.

    Raises:
        DemonstrationError, ActivationError, SiteError: as ``collect_activations``.
    """
    site = config.read_site
    settings: dict[str, Any] = {
        "site": site,
        "layers": layers,
        "config": config.collect_config(),
        "module_pattern": config.module_pattern if site == config.site else None,
        "track": track,
    }
    if checkpoint_dir is not None:
        Path(checkpoint_dir).mkdir(parents=True, exist_ok=True)
    with _place(keep, checkpoint_dir) as into:
        if keep.kept == "rows":
            found, store = collect_kept(
                model, tokenizer, demonstrations, checkpoint_dir=checkpoint_dir, into=into, **settings
            )
            yield CollectedRows(found, config)
        else:
            sites = resolve_reads(model, site, layers, module_pattern=settings["module_pattern"])
            inputs = inputs_of(tokenizer, demonstrations, sites, settings["config"])
            store = BatchStore.open(checkpoint_dir, model, [*config.statistics_settings(), *inputs])
            run = partial(collect_kept, model, tokenizer, checkpoint_dir=store.folder, **settings)
            yield CollectedSums(_add_up(run, demonstrations, config, store, into))
        store.clear()


def _add_up(
    run: Callable[[Sequence[Demonstration]], tuple[Activations, BatchStore]],
    demonstrations: Sequence[Demonstration],
    config: EditConfig,
    store: BatchStore,
    into: BinaryIO | None,
) -> dict[int, LayerStatistics]:
    """Return the sums of each layer, from where they were saved last.

    They are saved, and the batches that are in them forgotten, whenever the rows since then are as large as they are.
    """
    by_layer: dict[int, LayerStatistics] = {}
    saved = store.load_sums()
    first = 0 if saved is None else int(saved.pop(DEMONSTRATIONS))
    if saved is not None:
        by_layer = _restore(saved, config, into)
    unsaved: list[BatchStore] = []
    for start in range(first, len(demonstrations), CHUNK):
        end = min(start + CHUNK, len(demonstrations))
        found, finished = run(demonstrations[start:end])
        unsaved.append(finished)
        widths = {layer: x.shape[1] for layer, x in found.neutral.items()}
        by_layer = by_layer or _zeros(widths, config, into)
        for layer, statistics in by_layer.items():
            statistics.update(found.neutral[layer], found.positive[layer], found.negative[layer])
        sizes = list(widths.values())
        if rows_bytes(end - first, sizes) >= sums_bytes(sizes):
            states = {f"{layer}.{name}": x for layer, made in by_layer.items() for name, x in made.state().items()}
            store.save_sums({DEMONSTRATIONS: torch.tensor(end), **states})
            for batches in unsaved:
                batches.clear()
            first, unsaved = end, []
    return by_layer


def _restore(saved: Mapping[str, Tensor], config: EditConfig, into: BinaryIO | None) -> dict[int, LayerStatistics]:
    """Statistics that go on from saved ones."""
    states: dict[int, dict[str, Tensor]] = {}
    for key, tensor in saved.items():
        number, name = key.split(".", 1)
        states.setdefault(int(number), {})[name] = tensor
    by_layer = _zeros({layer: state["sums"].shape[1] for layer, state in states.items()}, config, into)
    for layer, statistics in by_layer.items():
        statistics.restore(states[layer])
    return by_layer


@contextmanager
def _place(keep: Keep, folder: str | Path | None) -> Iterator[BinaryIO | None]:
    """Yield a file without a name, so that nothing of it is left even by a run that is killed; None for memory."""
    if keep.place == "memory":
        yield None
        return
    with tempfile.TemporaryFile(dir=folder) as file:
        yield file


def _zeros(widths: Mapping[int, int], config: EditConfig, into: BinaryIO | None) -> dict[int, LayerStatistics]:
    """Statistics without rows, whose sums are in a mapped file where one is named."""
    shapes = {f"{side}.{layer}": (d, d) for layer, d in widths.items() for side in ("positive", "negative")}
    mapped: Mapping[str, Tensor | None] = (
        dict.fromkeys(shapes) if into is None else map_tensors(into, shapes, torch.float64)
    )
    centered, feature_map = config.statistics_settings()
    return {
        layer: LayerStatistics(
            width,
            centered=centered,
            feature_map=feature_map,
            into=(mapped[f"positive.{layer}"], mapped[f"negative.{layer}"]),
        )
        for layer, width in widths.items()
    }
