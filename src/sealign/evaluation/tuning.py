"""Find an edit: scan many candidates, measure the best at full strength, and test the winner once."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sealign.demonstrations.demonstration import Demonstration
from sealign.edits.edit import Edit
from sealign.evaluation.comparison import EditReport, report_edits
from sealign.evaluation.finalists import Finalist
from sealign.evaluation.results import Results
from sealign.evaluation.scan import ScannedCandidate
from sealign.evaluation.scan_rounds import OnRound, ignore_round
from sealign.evaluation.search import ANSWERED, CHECKPOINTS_NAME, EVALUATION_NAME, SCAN_NAME, Search
from sealign.evaluation.strength_choice import AIM
from sealign.evaluation.tuning_config import TuneConfig
from sealign.files import check_file
from sealign.folders import check_unmarked
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINNER = "winner"
"""Name of the winning edit in the results."""

EDIT_NAME, FIGURES_NAME = "edit", "figures"
"""Names of the other outputs."""


@dataclass(frozen=True)
class TuneResult:
    """The result of tuning.

    Attributes:
        scanned: All candidates, the most efficient first.
        finalists: Those that were measured at about full strength, the best first.
        winner: The finalist with the largest gain for its damage on the development part; None if none has a gain.
        edit: Edit of the winner, fitted on all demonstrations but those of the test.
        results: Results of this edit on the test part, with all controls.
        report: Statistics and verdict of these results.
        left_out: Layers that the time limit left out of the scan.
    """

    scanned: list[ScannedCandidate]
    finalists: list[Finalist]
    winner: Finalist | None = None
    edit: Edit | None = None
    results: Results | None = None
    report: EditReport | None = None
    left_out: Sequence[int] = ()


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    config: TuneConfig,
    output: str | Path,
    overwrite: bool = False,
    command: str = "",
    on_round: OnRound = ignore_round,
    track: Track = no_progress,
) -> TuneResult:
    """Find the edit of the largest gain within a damage budget, and test it once on what the search did not use.

    The demonstrations are split by prompt into three parts. Every method is fitted on the first, at every site, layer
    and token choice. A scan ranks all these candidates by their efficiency on the second, the development part. The
    most efficient ones are measured on the development part at about the strength that uses the damage budget. The
    winner is fitted again on both parts, and tested on the third part and on other neutral texts, with random and
    reversed controls. After an interruption the same call continues.

    Args:
        model: The base model; it must be differentiable.
        tokenizer: Tokenizer of the model.
        demonstrations: Demonstrations of at least 8 prompts.
        config: Settings of the search.
        output: Folder to write to: ``scan.csv``, ``edit`` and ``evaluation``.
        overwrite: Whether to replace the outputs of an earlier search.
        command: Command line that computes the results again, for the record.
        on_round: Function that is called with the candidates of each round of the scan; with a time limit, the scan has
            several rounds of layers.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

    Raises:
        SettingError: A setting is out of range, or no candidate is left.
        EditFileError: The folder has the outputs of an earlier search and ``overwrite`` is False, or other files with
            their names.
        ModelError: The model cannot be differentiated.
        DemonstrationError, ActivationError: As for ``fit_edit``.
    """
    check_outputs(Path(output), overwrite=overwrite)
    search = Search(model, tokenizer, demonstrations, config, Path(output), track, on_round)
    scanned = search.scan()
    finalists = search.measure(scanned)
    if not finalists or not finalists[0].gain > 0:
        for name in (EDIT_NAME, EVALUATION_NAME):  # of an earlier search
            shutil.rmtree(search.folder / name, ignore_errors=True)
        search.finish()
        return TuneResult(scanned, finalists, left_out=search.left_out)
    winner = finalists[0]
    edit = search.fit(winner.scanned, AIM * winner.strength * winner.room)
    edit.save_pretrained(search.folder / EDIT_NAME, overwrite=True)
    sources = {WINNER: str(search.folder / EDIT_NAME)}
    results = search.test({WINNER: edit}, sources, command=command, answered=ANSWERED)
    (report,) = report_edits(results, max_damage=config.max_damage, seed=config.seed)
    search.finish()
    return TuneResult(scanned, finalists, winner, edit, results, report, search.left_out)


def check_outputs(folder: Path, *, overwrite: bool = False) -> None:
    """Raise an error if the outputs of a search must not be written to a folder, before anything slow starts.

    Args:
        folder: Output folder of the search.
        overwrite: Whether to replace the outputs of an earlier search.

    Raises:
        EditFileError: The folder has the outputs of an earlier search and ``overwrite`` is False, or other files with
            their names.
    """
    check_unmarked(folder, [EDIT_NAME, EVALUATION_NAME, FIGURES_NAME], mark=SCAN_NAME)
    if not (folder / CHECKPOINTS_NAME).is_dir():  # of a search that goes on
        check_file(folder / SCAN_NAME, overwrite=overwrite)
