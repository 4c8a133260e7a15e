"""Tables of evaluations, and the same figures as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from sealign.cli.consoles import output

if TYPE_CHECKING:
    from sealign.evaluation.comparison import Comparison, EditReport, Row
    from sealign.evaluation.results import Results
    from sealign.evaluation.statistics import Difference

_STYLES = {"helps": "bold green", "no evidence": "bold", "harms": "bold red", "broken": "bold red"}


def print_evaluation(results: Results, reports: Sequence[EditReport]) -> None:
    """Print the scores of all edits, their damage, notes and verdicts."""
    if reports:
        output.print(_headline_table(results, reports))
        output.print(_damage_table(reports))
    else:
        output.print(_base_table(results))
    others = sum(len(report.rows) - len(report.shown) for report in reports)
    if others:
        output.print(f"{others} more rows, by subgroup and in detail, are in report.html and table.csv.")
    for name, task in results.tasks.items():
        for note in task.notes:
            output.print(f"[yellow]{escape(name)}:[/] {escape(note)}.")
    if any(not row.headline for report in reports for row in report.shown):
        output.print("Rows without p have no aim, so that the verdict does not depend on them; --aim gives one.")
    for report in reports:
        style = _STYLES[report.verdict.word]
        output.print(f"\n[{style}]{escape(report.edit)}[/]  {escape(report.verdict.sentence)}")
    output.print()


def _headline_table(results: Results, reports: Sequence[EditReport]) -> Table:
    table = plain_table(f"Differences from {results.model.id}, paired by item", "metric and model")
    for name in ("score", "difference", "95 % interval", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for report in reports:
        if len(reports) > 1:
            table.add_row(f"[bold]{escape(report.edit)}[/]")
        for row in report.shown:
            _add_metric(table, row)
    table.caption = "p: after Holm's correction. shows: the smallest true difference that this number of items detects."
    table.caption_justify = "left"
    return table


def _add_metric(table: Table, row: Row) -> None:
    """Add the base model's score, and below it the edit and its controls."""
    if row.difference is None:
        table.add_row(row.name, _number(row.base), "", row.missing)
        table.add_row("  edited", _number(row.edited))
        return
    seen = row.difference.smallest_detectable
    table.add_row(row.name, _number(row.base), "", "" if seen is None else f"[dim]shows {seen:.3f}[/]")
    arms = {"edited": row.difference, "random directions": row.random, "reversed": row.reversed}
    for name, d in arms.items():
        if d is not None:
            p_value = _number(row.adjusted_p) if name == "edited" else ""
            table.add_row(f"  {name}", f"{d.edited:.3f}", f"{d.difference:+.3f}", _interval(d), p_value)


def plain_table(title: str, first: str) -> Table:
    """Return an empty table without vertical lines, with one column."""
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, overflow="fold")
    return table


def _interval(difference: Difference) -> str:
    return escape(f"[{difference.low:+.3f}, {difference.high:+.3f}]")


def _damage_table(reports: Sequence[EditReport]) -> Table:
    table = plain_table("Damage: loss on neutral text, nats per token", "model")
    in_domain = any(report.domain_damage for report in reports)
    for name in ("loss", "rise", "perplexity", "KL from base", *(["KL on own answers"] if in_domain else [])):
        table.add_column(name, justify="right")
    for report in reports:
        if report is reports[0]:
            table.add_row("base", f"{report.damage[report.edit].base_loss:.3f}")
        for arm, damage in report.damage.items():
            figures = (damage.loss_increase, damage.perplexity_ratio, damage.mean_divergence)
            rise, ratio, divergence = figures
            row = [f"{damage.edited_loss:.3f}", f"{rise:+.3f}", f"x {ratio:.3f}", f"{divergence:.4f}"]
            if arm in report.domain_damage:
                row.append(f"{report.domain_damage[arm].mean_divergence:.4f}")
            table.add_row(escape(arm), *row)
    return table


def _base_table(results: Results) -> Table:
    from sealign.evaluation.results import ANSWERS

    table = plain_table(f"Scores of {results.model.id}", "metric")
    for name in ("items", "score"):
        table.add_column(name, justify="right")
    for name, task in results.tasks.items():
        for metric, scores in task.metrics.items():
            if scores.headline or name == ANSWERS:
                table.add_row(f"{name} {metric}", str(len(scores.items)), _number(scores.value("base")))
    return table


def comparison_tables(comparisons: Sequence[Comparison], first: str, second: str) -> list[Table]:
    """Return a table for each pair of arms of two evaluations."""
    tables = []
    for comparison in comparisons:
        table = plain_table(f"A: {comparison.first} of {first}\nB: {comparison.second} of {second}", "metric")
        for name in ("items", "A", "B", "B - A", "95 % interval", "p"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in comparison.rows:
            d = row.difference
            if not row.shown:
                continue
            values = (_number(row.base), _number(row.edited))
            if d is None:
                table.add_row(row.name, "", *values, "", row.missing)
            else:
                table.add_row(
                    row.name, str(d.items), *values, f"{d.difference:+.3f}", _interval(d), _number(row.adjusted_p)
                )
        table.caption = "p: after Holm's correction."
        table.caption_justify = "left"
        tables.append(table)
    return tables


def reports_as_data(results: Results, reports: Sequence[EditReport]) -> dict[str, Any]:
    """Return the figures that ``print_evaluation`` prints, with every row, as JSON data."""
    return {
        "model": results.model.id,
        "edits": [
            {
                "name": report.edit,
                "verdict": dataclasses.asdict(report.verdict),
                "rows": [dataclasses.asdict(row) for row in report.rows],
                "damage": {
                    arm: {
                        "base_loss": damage.base_loss,
                        "edited_loss": damage.edited_loss,
                        "loss_increase": damage.loss_increase,
                        "perplexity_ratio": damage.perplexity_ratio,
                        "divergence": damage.mean_divergence,
                    }
                    for arm, damage in report.damage.items()
                },
                "domain_divergence": {arm: damage.mean_divergence for arm, damage in report.domain_damage.items()},
            }
            for report in reports
        ],
        "base": {
            name: {metric: scores.value("base") for metric, scores in task.metrics.items()}
            for name, task in results.tasks.items()
        },
        "notes": {name: task.notes for name, task in results.tasks.items() if task.notes},
    }


def comparisons_as_data(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return comparisons as JSON data."""
    return [{"a": c.first, "b": c.second, "rows": [dataclasses.asdict(row) for row in c.rows]} for c in comparisons]


def _number(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.3f}"
