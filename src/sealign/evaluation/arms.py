"""The arms of an evaluation: the base model, each edit, and the controls of each edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sealign.edits.intervention import Intervention
from sealign.errors import SettingError
from sealign.evaluation.results import BASE, Arm, ArmKind


@dataclass(frozen=True)
class PlannedArm:
    """Arm to evaluate.

    Attributes:
        record: Description of the arm, for the results.
        edit: Intervention that is attached to the model; None for the base model.
    """

    record: Arm
    edit: Intervention | None


def plan_arms(
    edits: Mapping[str, Intervention],
    *,
    control_seeds: Sequence[int],
    reversed_control: bool,
    sources: Mapping[str, str],
    strengths: Sequence[float] = (),
) -> dict[str, PlannedArm]:
    """Return a mapping from name to arm: the base model, then each edit with its controls.

    With strengths, each edit has an arm with controls for each of them, named such as ``mild at 0.5``.

    An intervention without directions has no controls.

    Args:
        edits: Mapping from name to edit.
        control_seeds: Seeds of the random controls.
        reversed_control: Whether to add a reversed control for each edit.
        sources: Mapping from name to the folder or repository of an edit.
        strengths: Strengths of the arms of each edit; empty for its own strength alone.

    Raises:
        SettingError: An edit has no strength to vary, or has the name of another arm.
    """
    arms = {BASE: PlannedArm(Arm(kind="base"), None)}

    planned: list[tuple[str, str | None, Intervention]] = [
        (f"{name} at {strength:g}", name, edit.with_strength(strength))
        for name, edit in edits.items()
        for strength in strengths
    ] or [(name, None, edit) for name, edit in edits.items()]

    def add(
        name: str, kind: ArmKind, of: str, edit: Intervention | None, sweep: str | None, seed: int | None = None
    ) -> None:
        if edit is None:
            return
        if name in arms:
            raise SettingError(f"an edit is named '{name}', which is the name of another arm; choose another name")
        source = sources.get(sweep or name) if kind == "edit" else None
        arms[name] = PlannedArm(_record(kind, of, edit, source, sweep, seed), edit)

    for name, sweep, edit in planned:
        add(name, "edit", name, edit, sweep)
        for seed in control_seeds:
            add(f"{name} random {seed}", "random", name, edit.randomized(seed), sweep, seed)
        if reversed_control:
            add(f"{name} reversed", "reversed", name, edit.reversed(), sweep)
    return arms


def _record(kind: ArmKind, of: str, edit: Intervention, source: str | None, sweep: str | None, seed: int | None) -> Arm:
    configs: dict[str, Any] = {part.method: dict(part.record.config) for part in edit.parts}
    return Arm(
        kind=kind,
        edit=of,
        source=source,
        method=edit.method,
        config=configs if len(edit.parts) > 1 else configs[edit.method],
        strength=edit.strength,
        layers=sorted({int(layer) for part in edit.parts for layer in part.record.layers}),
        hash=edit.hash,
        sweep=sweep,
        seed=seed,
        fit_seconds=edit.fit_seconds if kind == "edit" else None,
    )
