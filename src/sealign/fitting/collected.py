"""Collected: what a fit knows about the activations of all layers, stored as rows or as sums."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from sealign.demonstrations.demonstration import Demonstration
from sealign.errors import SettingError
from sealign.fitting.activation_store import Keep, rows_bytes, sums_bytes
from sealign.fitting.activations import Activations
from sealign.fitting.checkpoints import BatchStore
from sealign.fitting.collector import Collector
from sealign.fitting.edit_config import EditConfig
from sealign.fitting.layer_statistics import LayerStatistics
from sealign.fitting.mapped_tensors import map_tensors
from sealign.fitting.workers import gather_rows

CHUNK = 512
"""Number of demonstrations whose rows are held at a time while sums are accumulated."""

PROCESSED = "demonstrations"
"""Name under which saved sums hold the number of demonstrations in them."""


@dataclass(frozen=True)
class Collected:
    """The activations of each layer over the demonstrations of all workers.

    Attributes:
        stored: This worker's activations as rows, or the statistics of each layer as sums.
        config: Settings of the fit.
    """

    stored: Activations | Mapping[int, LayerStatistics]
    config: EditConfig

    @property
    def layers(self) -> Sequence[int]:
        """The collected layers, in ascending order."""
        return self.stored.layers if isinstance(self.stored, Activations) else sorted(self.stored)

    def statistics(self, layer: int) -> LayerStatistics:
        """Return the statistics of a layer; all workers must call it together.

        If rows are stored, each call computes the statistics, so that memory holds the statistics of one layer only.

        Args:
            layer: A collected layer.
        """
        if isinstance(self.stored, Activations):
            rows = self.stored.rows(layer)
            statistics = _empty_statistics({layer: rows[0].shape[1]}, self.config, None)[layer]
            statistics.update(*rows)
        else:
            statistics = self.stored[layer]
        statistics.combine()
        return statistics

    def rows(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return H, H+ and H- of a layer, (n, d) each; all workers must call it together.

        Args:
            layer: A collected layer.

        Raises:
            SettingError: Only sums are stored.
        """
        if not isinstance(self.stored, Activations):
            raise SettingError(
                f"layer {layer} is stored as sums, but {type(self.config).__name__} needs rows; pass keep=Keep('rows')"
            )
        neutral, positive, negative = (gather_rows(matrix) for matrix in self.stored.rows(layer))
        return neutral, positive, negative


@contextmanager
def collect(
    collector: Collector,
    demonstrations: Sequence[Demonstration],
    config: EditConfig,
    keep: Keep,
    *,
    checkpoint_dir: str | Path | None = None,
) -> Iterator[Collected]:
    """Run a model over this worker's demonstrations, and yield what is stored of them until the block ends.

    Args:
        collector: The model and what is read from it.
        demonstrations: Demonstrations of this worker.
        config: Settings of the fit.
        keep: Rows or sums, in memory or on disk.
        checkpoint_dir: Folder for finished batches, or for sums and the batches since they were saved. It is emptied
            when the block ends without an error, so that an interrupted run continues where it stopped.

    Raises:
        DemonstrationError, ActivationError: As for ``collect_activations``.
    """
    if checkpoint_dir is not None:
        Path(checkpoint_dir).mkdir(parents=True, exist_ok=True)
    # A temporary file has no name, so that nothing is left of it even if the process is killed.
    on_disk = keep.place == "disk"
    more = () if keep.kept == "rows" else config.statistics_settings()
    with (
        tempfile.TemporaryFile(dir=checkpoint_dir) if on_disk else nullcontext() as file,
        collector.open_store(checkpoint_dir, demonstrations, *more) as store,
    ):
        if keep.kept == "rows":
            (found,) = collector.run(demonstrations, store, file).values()
            yield Collected(found, config)
        else:
            yield Collected(_accumulate(collector, demonstrations, config, store, file), config)
        store.clear()


def _accumulate(
    collector: Collector,
    demonstrations: Sequence[Demonstration],
    config: EditConfig,
    store: BatchStore,
    file: BinaryIO | None,
) -> dict[int, LayerStatistics]:
    """Return the statistics of each layer as sums, continued from the saved ones.

    The sums are saved, and the batches in them deleted, when the rows since the last save are as large as the sums.
    """
    by_layer, saved = _restore(store, config, file)
    unsaved: list[BatchStore] = []
    for start in range(saved, len(demonstrations), CHUNK):
        chunk = demonstrations[start : start + CHUNK]
        unsaved.append(store.part(start, start + len(chunk)))
        (found,) = collector.run(chunk, unsaved[-1]).values()
        widths = {layer: found.neutral[layer].shape[1] for layer in found.layers}
        by_layer = by_layer or _empty_statistics(widths, config, file)
        for layer, statistics in by_layer.items():
            statistics.update(*found.rows(layer))
        processed, sizes = start + len(chunk), list(widths.values())
        if rows_bytes(processed - saved, sizes) >= sums_bytes(sizes):
            states = {f"{layer}.{name}": x for layer, own in by_layer.items() for name, x in own.state().items()}
            store.save_sums({PROCESSED: torch.tensor(processed), **states})
            for batches in unsaved:
                batches.clear()
            saved, unsaved = processed, []
    return by_layer


def _restore(store: BatchStore, config: EditConfig, file: BinaryIO | None) -> tuple[dict[int, LayerStatistics], int]:
    """Return the saved statistics and the number of demonstrations in them; nothing and 0 if none were saved."""
    saved = store.load_sums()
    if saved is None:
        return {}, 0
    processed = int(saved.pop(PROCESSED))
    states: dict[int, dict[str, Tensor]] = {}
    for key, tensor in saved.items():
        layer, name = key.split(".", 1)
        states.setdefault(int(layer), {})[name] = tensor
    by_layer = _empty_statistics({layer: state["sums"].shape[1] for layer, state in states.items()}, config, file)
    for number, statistics in by_layer.items():
        statistics.restore(states[number])
    return by_layer, processed


def _empty_statistics(
    widths: Mapping[int, int], config: EditConfig, file: BinaryIO | None
) -> dict[int, LayerStatistics]:
    """Return statistics without rows for each layer, whose products are in a mapped file if one is given."""
    shapes = {f"{side}.{layer}": (d, d) for layer, d in widths.items() for side in ("positive", "negative")}
    mapped = {} if file is None else map_tensors(file, shapes, torch.float64)
    centered, feature_map = config.statistics_settings()
    return {
        layer: LayerStatistics(
            width,
            centered=centered,
            feature_map=feature_map,
            out=(mapped.get(f"positive.{layer}"), mapped.get(f"negative.{layer}")),
        )
        for layer, width in widths.items()
    }
