"""Comparison of methods: each at its most efficient place and at the strength of one damage budget, on one test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sealign.demonstrations.demonstration import Demonstration
from sealign.edits.edit import Edit
from sealign.edits.record import RECORD_NAME
from sealign.evaluation.results import Results
from sealign.evaluation.scan import ScannedCandidate
from sealign.evaluation.search import Search
from sealign.evaluation.tuning_config import TuneConfig
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EDITS_NAME = "edits"
"""Name of the folder of the edits, one for each method."""


@dataclass(frozen=True)
class MethodComparison:
    """The edits of a comparison of methods, and how they do on what the search did not use.

    Attributes:
        edits: Mapping from method to its edit, at the strength that the damage budget allows.
        results: Results of all edits on the test part, each with controls.
    """

    edits: Mapping[str, Edit]
    results: Results


def compare_methods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    config: TuneConfig,
    output: str | Path,
    command: str = "",
    track: Track = no_progress,
) -> MethodComparison:
    """Compare methods at one damage budget, each at the site, layer and token choice where it is most efficient.

    As in ``tune``, candidates of every method are fitted on one part of the demonstrations and scanned on another. The
    best candidate of each method is fitted again on both parts, given the largest strength within the budget, and
    tested on the third part and on other neutral texts, beside one random control and the reversed edit. After an
    interruption the same call continues.

    Args:
        model: The base model; it must be differentiable.
        tokenizer: Tokenizer of the model.
        demonstrations: Demonstrations of at least 8 prompts.
        config: Settings of the search; ``finalists`` is not used.
        output: Folder to write to: ``scan.csv``, ``edits`` and ``evaluation``.
        command: Command line that computes the results again, for the record.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

    Raises:
        SettingError: A setting is out of range, or no candidate is left.
        DemonstrationError, ActivationError: As for ``fit_edit``.
    """
    search = Search(model, tokenizer, demonstrations, config, Path(output), track)
    folders = {method: search.folder / EDITS_NAME / method for method in config.methods}
    if not all((folder / RECORD_NAME).is_file() for folder in folders.values()):
        for method, best in _best_of_each(search.scan()).items():
            edit = search.fit(best, search.predicted_strength(best))
            edit.save_pretrained(folders[method], overwrite=True)
    edits = {
        method: Edit.from_pretrained(folder)
        for method, folder in folders.items()
        if (folder / RECORD_NAME).is_file()  # a method with nothing to fit at any layer has no edit
    }
    sources = {method: str(folders[method]) for method in edits}
    results = search.test(edits, sources, command=command, control_seeds=(config.seed,))
    search.finish()
    return MethodComparison(edits, results)


def _best_of_each(scanned: Sequence[ScannedCandidate]) -> dict[str, ScannedCandidate]:
    """Return the first candidate of each method; the candidates are in the order of their efficiency."""
    best: dict[str, ScannedCandidate] = {}
    for each in scanned:
        best.setdefault(each.candidate.method, each)
    return best
