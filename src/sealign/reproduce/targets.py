"""The tables and figures that can be reproduced, by name, and how they are run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sealign.errors import SealignError, SettingError, unknown_name
from sealign.folders import check_folder
from sealign.progress import Track, no_progress
from sealign.reproduce import paper_figures as drawings
from sealign.reproduce import paper_tables as tables
from sealign.reproduce.behaviour_table import behaviours
from sealign.reproduce.reproduce_config import ReproduceConfig
from sealign.reproduce.table_format import Table
from sealign.reproduce.target_page import Drawing, Provenance, read_target, write_target
from sealign.reproduce.workbench import Workbench
from sealign.versions import library_versions

TARGETS: Mapping[str, Callable[[Workbench], Table | Drawing]] = {
    "table-truthfulqa": tables.truthfulqa,
    "table-bbq": tables.bbq,
    "table-models": tables.models,
    "table-ablation": tables.ablation,
    "table-control": tables.control,
    "table-crows": tables.crows,
    "table-joint": tables.joint,
    "table-activations": tables.activations,
    "figure-data": drawings.data,
    "figure-tsne": drawings.tsne,
    "figure-edit": drawings.edit,
    "figure-signature": drawings.signature,
    "figure-spectrum": drawings.spectrum,
    "behaviours": behaviours,
}
"""The function of each target, by name."""

ALL = "all"
NOT_THE_PAPERS = ("behaviours",)


USES: Mapping[str, Sequence[str]] = {
    "models": ("table-models", "figure-signature", "behaviours"),
    "behaviours": ("behaviours",),
    "amateur": ("table-truthfulqa",),
    "judge": ("table-truthfulqa",),
    "limit": (*(name for name in TARGETS if name.startswith("table-")), "figure-data"),
}
"""The targets that depend on each setting that not all depend on."""


def used_by(name: str, setting: str) -> bool:
    """Return whether a setting changes what a target, or one of those of a name, computes.

    Args:
        name: Name of a target, or ``all`` for those of the paper.
        setting: Field of ``ReproduceConfig``.

    Raises:
        SettingError: There is no target of this name.

    Example:
        >>> used_by("table-bbq", "amateur"), used_by("all", "amateur")
        (False, True)
    """
    chosen = chosen_targets(name)
    return setting not in USES or any(target in USES[setting] for target in chosen)


def chosen_targets(name: str) -> Sequence[str]:
    """Return the targets of a name, in the order in which they run.

    Args:
        name: Name of a target, or ``all`` for those of the paper.

    Raises:
        SettingError: There is no target of this name.

    Example:
        >>> len(chosen_targets("all"))
        13
    """
    if name == ALL:
        # Targets with several models come last, so that the first model is loaded once for all other targets.
        papers = [target for target in TARGETS if target not in NOT_THE_PAPERS]
        return sorted(papers, key=lambda target: target in ("table-models", "figure-signature"))
    if name not in TARGETS:
        raise SettingError(unknown_name("target", name, [*TARGETS, ALL]))
    return [name]


def reproduce(
    name: str, config: ReproduceConfig, *, overwrite: bool = False, command: str = "", track: Track = no_progress
) -> Iterator[tuple[str, Table | Drawing | SealignError | None]]:
    """Compute targets, write each to a folder of its own, and yield its name and result.

    For a target that was finished before with the same settings, the result is None and nothing is written. Fits and
    scores of an unfinished target are saved as they are computed, so that the same call continues. For a target that
    fails, the result is the error, and the next target runs.

    Args:
        name: Name of a target, or ``all`` for those of the paper.
        config: Settings of the reproduction.
        overwrite: Whether to replace targets that were finished with other settings.
        command: Command line that computes the targets again, for the record.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

    Raises:
        SettingError: There is no target of this name.
        EditFileError: A target was finished with other settings and ``overwrite`` is False, or its folder has files
            that are not a target's.
    """
    bench = Workbench(config, track=track)
    settings = _settings(config)
    finished = {target: (read_target(config.output / target) or {}).get("settings") for target in chosen_targets(name)}
    for target, found in finished.items():
        if found != settings:
            check_folder(config.output / target, overwrite=overwrite)
    for target, found in finished.items():
        folder = config.output / target
        if found == settings:
            yield target, None
            continue
        try:
            result = TARGETS[target](bench)
        except SealignError as error:
            yield target, error
            continue
        versions = library_versions("lm_eval", "peft", "scikit-learn", "numpy")
        write_target(result, Provenance(target, command, config.model, settings, versions), folder)
        yield target, result


def _settings(config: ReproduceConfig) -> dict[str, Any]:
    """Return the settings that the contents of a target depend on, as JSON values."""
    places = ("output", "data_dir", "device")
    return {name: value for name, value in config.dump().items() if name not in places}
