"""Outputs of commands: checks before anything slow starts, and what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sealign.cli.consoles import messages
from sealign.folders import MARK_NAME

if TYPE_CHECKING:
    from sealign.evaluation.comparison import EditReport
    from sealign.evaluation.results import Results

UNLESS_EQUAL = " unless it was made with the same settings"
"""Condition under which the output of a run is replaced; a run with the same settings is continued."""


def check_output_folder(
    folder: Path, *, overwrite: bool, mark: str = MARK_NAME, sources: Sequence[str | Path] = ()
) -> None:
    """Raise an error unless an output folder may be written; say so if an earlier output will be replaced.

    Args:
        folder, overwrite, mark, sources: As for ``sealign.folders.new_folder``.

    Raises:
        EditFileError: As for ``sealign.folders.new_folder``.
    """
    from sealign.folders import check_folder

    if check_folder(folder, mark=mark, overwrite=overwrite, sources=sources):
        say_replaced(folder)


def check_output_files(files: Sequence[Path], *, overwrite: bool, sources: Sequence[str | Path] = ()) -> None:
    """Raise an error unless output files may be written; say so if earlier ones will be replaced.

    Args:
        files: Files to write.
        overwrite, sources: As for ``sealign.files.check_file``.

    Raises:
        EditFileError: As for ``sealign.files.check_file``.
    """
    from sealign.files import check_file

    for file in files:
        if check_file(file, overwrite=overwrite, sources=sources):
            say_replaced(file)


def say_replaced(path: Path, condition: str = "") -> None:
    """Say that a file or folder will be replaced, if it exists.

    Args:
        path: Path of the output.
        condition: End of the sentence.
    """
    if path.exists():
        messages.print(f"'{path}' exists and will be replaced{condition}.", markup=False, soft_wrap=True)


def say_cards(results: Results, reports: Sequence[EditReport]) -> None:
    """Show the effect of evaluated edits in the cards beside them, and say so if a card cannot be written.

    Args:
        results: Results of the evaluation.
        reports: Statistics and verdicts of its edits.
    """
    from sealign.evaluation.effect_card import write_effects

    try:
        write_effects(results, reports)
    except OSError as error:
        messages.print(f"The card of an edit cannot show the effect: {error}", markup=False, soft_wrap=True)
