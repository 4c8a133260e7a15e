"""The targets by name, and how they are run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sealign.errors import SealignError, SettingError, unknown_name
from sealign.progress import Track, no_progress
from sealign.reproduce import paper_figures as drawings
from sealign.reproduce import paper_tables as tables
from sealign.reproduce.table_format import Table
from sealign.reproduce.target_page import Drawing, Provenance, read_record, write_target
from sealign.reproduce.workbench import ReproduceConfig, Workbench
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
}
"""By name, what makes each."""

ALL = "all"


def chosen_targets(name: str) -> Sequence[str]:
    """Return the targets that a name stands for.

    Raises:
        SettingError: there is none of this name.

    Example:
        >>> len(chosen_targets("all"))
        13
    """
    if name == ALL:
        # Those of several models come last, so that the first model is loaded once for all others.
        return sorted(TARGETS, key=lambda target: target in ("table-models", "figure-signature"))
    if name not in TARGETS:
        raise SettingError(unknown_name("target", name, [*TARGETS, ALL]))
    return [name]


def reproduce(
    name: str, config: ReproduceConfig, *, command: str = "", track: Track = no_progress
) -> Iterator[tuple[str, Table | Drawing | SealignError | None]]:
    """Make targets, each in a folder of its own, and yield each with what it gave.

    What was finished with the same settings is left as it is and gives None; of what was not, fits, trainings and
    scores are kept as they come, so that the same call goes on. A target that cannot be made gives its error, and
    the next is made.

    Args:
        name: of a target, or ``all``.
        config: what is made again.
        command: that makes it again, for the record.
        track: shows progress.

    Raises:
        SettingError: there is no such target.
    """
    bench = Workbench(config, track=track)
    settings = _settings(config)
    for target in chosen_targets(name):
        folder = config.output / target
        found = read_record(folder)
        if found is not None and found.get("settings") == settings:
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
    """Return what a target's contents depend on, as JSON has it."""
    return {
        "model": config.model,
        "models": list(config.models),
        "limit": config.limit,
        "demonstrations": dict(config.demonstrations),
        "amateur": config.amateur,
        "judge": None if config.judge is None else config.judge.name,
        "seed": config.seed,
        "dtype": config.dtype,
    }
