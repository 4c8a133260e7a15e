"""The effect of an edit, as an evaluation has measured it, in the card beside the edit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from sealign.edits.intervention import Intervention
from sealign.edits.model_card import markdown_table, show_effect
from sealign.edits.record import CARD_NAME, RECORD_NAME
from sealign.evaluation.comparison import EditReport
from sealign.evaluation.results import Results
from sealign.evaluation.statistics import Difference
from sealign.files import write_bytes
from sealign.methods.registry import load_edit


def write_effects(results: Results, reports: Sequence[EditReport]) -> list[Path]:
    """Write the verdict and the main figures of an evaluation into the card of each evaluated edit.

    Edits that are no local folder, or that have changed since, are left out.

    Args:
        results: Results of the evaluation.
        reports: Statistics and verdicts of its edits.

    Returns:
        The cards that were written.

    Raises:
        OSError: A card is not writable.
    """
    written = []
    for folder in dict.fromkeys(arm.source for arm in results.arms.values() if arm.source is not None):
        card = Path(folder) / CARD_NAME
        if not (Path(folder) / RECORD_NAME).is_file() or not card.is_file():
            continue
        edit = load_edit(folder)
        report = _report_of(results, reports, folder, edit)
        if report is None:
            continue
        if write_effect(card, edit, results, report):
            written.append(card)
    return written


def write_effect(card: Path, edit: Intervention, results: Results, report: EditReport) -> bool:
    """Write the verdict and the main figures of an evaluated edit into its card; return whether they are new there.

    Args:
        card: Card of the edit.
        edit: The edit, at the strength that it is saved with.
        results: Results of the evaluation.
        report: Statistics and verdict of the edit.

    Raises:
        OSError: The card is not writable.
    """
    before = card.read_text(encoding="utf-8")
    after = show_effect(
        before,
        effect_text(results, report, own_strength=edit.strength),
        verdict=report.verdict.word,
        loss_increase=report.damage[report.edit].loss_increase,
    )
    if after == before:
        return False
    write_bytes(card, after.encode())
    return True


def _report_of(results: Results, reports: Sequence[EditReport], source: str, edit: Intervention) -> EditReport | None:
    """Return the report of an edit at its own strength, or at another one; None if another edit was evaluated."""
    own = [report for report in reports if results.arms[report.edit].source == source]
    arms = results.arms
    fitting = [each for each in own if _is_evaluated(edit, arms[each.edit].strength, arms[each.edit].hash)]
    at_own = [each for each in fitting if arms[each.edit].strength == edit.strength]
    return next(iter(at_own or fitting), None)


def _is_evaluated(edit: Intervention, strength: float | None, digest: str | None) -> bool:
    """Return whether an edit is the one that was evaluated, at its own or at another strength."""
    applied = edit if strength is None or edit.strength is None else edit.with_strength(strength)
    return applied.hash == digest


def effect_text(results: Results, report: EditReport, *, own_strength: float | None) -> str:
    """Return the verdict and the main figures of an edit as Markdown.

    Args:
        results: Results of the evaluation.
        report: Statistics and verdict of the edit.
        own_strength: Strength that the edit is saved with.
    """
    strength = results.arms[report.edit].strength
    at = "" if strength == own_strength else f" At strength {strength:g} instead of the edit's own {own_strength:g}."
    parts = [f"**{report.verdict.sentence}**{at}"]
    rows = []
    for row in report.headlines:
        differences = (row.difference, row.random, row.reversed)
        figures = (_number(row.base), _number(row.edited), *map(_difference, differences))
        rows.append((f"{row.task} {row.metric}", *figures))
    if rows:
        header = ("metric", "base", "edited", "difference, 95 % interval", "random directions", "reversed")
        parts.append(markdown_table(header, rows))
    damage, domain = report.damage[report.edit], report.domain_damage.get(report.edit)
    own = "" if domain is None else f", {domain.mean_divergence:.4f} on the model's own answers"
    divergence = f"; KL divergence from the base model {damage.mean_divergence:.4f} on neutral text{own}"
    if not math.isfinite(damage.mean_divergence):
        divergence = "; the KL divergence from the base model was not measured"
    parts.append(f"Damage: loss on neutral text {damage.loss_increase:+.4f} nats per token{divergence}.")
    return "\n\n".join(parts)


def _number(value: float) -> str:
    return f"{value:.3f}" if value == value else "not known"


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return ""
    return f"{difference.difference:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
