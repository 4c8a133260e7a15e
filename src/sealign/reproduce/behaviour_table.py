"""The table of behaviours: methods at one damage budget, for several behaviours and models."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from sealign.demonstrations.bundled import BUNDLED_PREFIX
from sealign.edits.edit import Edit
from sealign.errors import SealignError
from sealign.evaluation.comparison import EditReport, Row, report_edits
from sealign.evaluation.method_comparison import compare_methods
from sealign.evaluation.preference import HEADLINES
from sealign.evaluation.statistics import Difference
from sealign.evaluation.tuning_config import TuneConfig
from sealign.reproduce.table_format import Cell, Column, Table
from sealign.reproduce.workbench import Workbench

METHODS = ("difference_operator", "targeted_shift", "mean_difference", "sea", "leace", "iti")
"""The methods that are compared."""

COLUMNS = (
    Column("margin of base", digits=3),
    Column("gain", digits=3),
    Column("gain over random directions", digits=3),
    Column("gain of the reversed edit", digits=3),
    Column("accuracy of base %", scale=100),
    Column("accuracy %", scale=100),
    Column("KL, neutral text", digits=3),
    Column("KL, own answers", digits=3),
    Column("loss on neutral text", digits=3),
    Column("efficiency", digits=2),
)

NOTES = (
    "margin: mean of log p(positive) - log p(negative), in nats per token, on demonstrations that the search did not "
    "use; gain: its difference from the base model, with a paired 95 % interval",
    "each method at the site, layer and token choice where the scan found it most efficient, and at the largest "
    "strength for which KL divergence is within the budget of 0.05 nats per token on neutral text and own answers",
    "efficiency: gain / sqrt(2 KL), with the larger of both divergences on the test's texts",
    "the verdict after the colon is that of sealign evaluate: it takes margin, accuracy, damage and controls together",
)


def behaviours(bench: Workbench) -> Table:
    """Return the comparison of methods on every configured behaviour and model."""
    rows: dict[str, Sequence[Cell]] = {}
    for name in (bench.config.model, *bench.config.models):
        for behaviour in bench.config.behaviours:
            where = f"{name}, {behaviour.removeprefix(BUNDLED_PREFIX)}"
            try:
                rows |= {f"{where}, {row}": cells for row, cells in _behaviour_rows(bench, name, behaviour).items()}
            except SealignError as error:
                rows[where] = [Cell(missing=str(error))] * len(COLUMNS)
    drawn = f"at most {bench.config.pairs} demonstrations of each behaviour"
    return Table("behaviours", "Methods on several behaviours, at one damage budget", COLUMNS, rows, [*NOTES, drawn])


def _behaviour_rows(bench: Workbench, name: str, behaviour: str) -> dict[str, Sequence[Cell]]:
    """Return the row of each method for one behaviour of one model."""
    demonstrations = bench.demonstrations(behaviour, bench.config.pairs)
    model, tokenizer = bench.model(name)
    folder = re.sub(r"[^\w.-]+", "-", f"{name}-{behaviour}").strip("-")
    found = compare_methods(
        model,
        tokenizer,
        demonstrations,
        config=TuneConfig(methods=METHODS, seed=bench.config.seed),
        output=bench.folder / "behaviours" / folder,
        track=bench.track,
    )
    reports = {report.edit: report for report in report_edits(found.results, seed=bench.config.seed)}
    return {
        f"{_place(found.edits[method])}: {report.verdict.word}": _cells(report) for method, report in reports.items()
    }


def _place(edit: Edit) -> str:
    layers = ", ".join(map(str, edit.layers))
    return f"{edit.method} at {edit.site} {layers}"


def _cells(report: EditReport) -> list[Cell]:
    """Return the cells of one method."""
    margin, accuracy = (_row(report, metric) for metric in HEADLINES)
    damage, domain = report.damage[report.edit], report.domain_damage.get(report.edit)
    divergences = [damage.mean_divergence] + ([] if domain is None else [domain.mean_divergence])
    gain, largest = margin.edited - margin.base, max(divergences)
    efficiency = gain / math.sqrt(2 * largest) if largest > 0 else math.nan
    return [
        _number(margin.base),
        _difference(margin.difference),
        _difference(margin.over_random),
        _difference(margin.reversed),
        _number(accuracy.base),
        _number(accuracy.edited),
        _number(damage.mean_divergence),
        Cell(missing="the base model's own answers are empty") if domain is None else _number(domain.mean_divergence),
        _number(damage.loss_increase),
        _number(efficiency),
    ]


def _row(report: EditReport, metric: str) -> Row:
    return next(row for row in report.rows if row.metric == metric)


def _difference(found: Difference | None) -> Cell:
    if found is None:
        return Cell(missing="a score is not finite")
    return Cell(found.difference, found.low, found.high)


def _number(value: float) -> Cell:
    return Cell(value) if math.isfinite(value) else Cell(missing="the value is not finite")
