"""Statistics of an evaluation: every metric of every edit, against the base model and against the controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sealign.errors import ResultsFileError, SettingError
from sealign.evaluation.damage import Damage
from sealign.evaluation.item_scores import ItemScores
from sealign.evaluation.results import ANSWERS, BASE, Metric, Results, Task
from sealign.evaluation.statistics import Aim, Difference, holm, paired_difference, ratio_difference
from sealign.evaluation.verdict import MAX_DAMAGE, Effect, Verdict, judge_effects


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric of one edit.

    Attributes:
        task: Name of the task.
        metric: Name of the metric; the name of a subgroup is ``metric/subgroup``.
        headline: Whether the verdict depends on the metric.
        aim: Which values are good.
        base: Value of the base model; NaN if the denominators of a ratio sum to 0, or if a score is not finite.
        edited: Value of the edited model, likewise.
        difference: From the base model to the edited model; None if there are too few items for an interval, or if a
            score is not finite.
        adjusted_p: P-value after Holm's correction over the headline metrics of the run; for a subgroup, over the
            subgroups of its metric. None for other metrics, and without a difference.
        random: Difference from the base model to the mean of the random controls; None if there are none.
        over_random: Difference from that mean to the edited model, likewise.
        reversed: Difference from the base model to the reversed edit, likewise.
        broken: Number of items whose score, of the base model or the edited model, is NaN or infinite.
    """

    task: str
    metric: str
    headline: bool
    aim: Aim
    base: float
    edited: float
    difference: Difference | None
    adjusted_p: float | None = None
    random: Difference | None = None
    over_random: Difference | None = None
    reversed: Difference | None = None
    broken: int = 0

    @property
    def sign(self) -> int:
        """-1 if lower values are good, so that a difference times the sign is a gain; else 1."""
        return -1 if self.aim == "lower" else 1

    @property
    def shown(self) -> bool:
        """Whether the main table has the row: the verdict depends on it, or it is a measure of answers."""
        return self.headline or self.task == ANSWERS

    @property
    def missing(self) -> str:
        """Why there is no difference."""
        if not self.broken:
            return "too few items for an interval"
        return f"not finite in {self.broken} item{'' if self.broken == 1 else 's'}"

    @property
    def name(self) -> str:
        """Names of task and metric."""
        return f"{self.task} {self.metric}"


@dataclass(frozen=True)
class EditReport:
    """Statistics and verdict of one edit.

    Attributes:
        edit: Name of the edit.
        rows: All metrics; within a task, headline metrics come first.
        damage: Mapping from arm to damage on neutral text, for the edit and its controls.
        domain_damage: The same on the base model's own answers; empty without demonstrations and prompts.
        verdict: The verdict.
    """

    edit: str
    rows: list[Row]
    damage: dict[str, Damage]
    domain_damage: dict[str, Damage]
    verdict: Verdict

    @property
    def headlines(self) -> list[Row]:
        """The rows that the verdict depends on."""
        return [row for row in self.rows if row.headline]

    @property
    def main(self) -> Row | None:
        """The row that figures show first: the preference margin, or else the first headline that has a difference."""
        rows = [row for row in self.headlines if row.difference is not None]
        return next((row for row in rows if row.metric == "preference_margin"), rows[0] if rows else None)

    @property
    def shown(self) -> list[Row]:
        """The rows of the main table."""
        return [row for row in self.rows if row.shown]


def report_edits(results: Results, *, max_damage: float = MAX_DAMAGE, seed: int = 0) -> list[EditReport]:
    """Return the statistics and the verdict of each edit of an evaluation.

    Args:
        results: Results of the evaluation.
        max_damage: Budget of the damage, in nats per token on neutral text.
        seed: Seed of the resampling.
    """
    return [_report(results, edit, max_damage, seed) for edit in results.edits]


def _report(results: Results, edit: str, max_damage: float, seed: int) -> EditReport:
    rows = [
        _row(results, edit, task_name, task, name, metric, seed)
        for task_name, task in results.tasks.items()
        for name, metric in sorted(task.metrics.items(), key=lambda item: not item[1].headline)
    ]
    rows = adjust(rows)
    arms = [edit, *results.controls(edit, "random"), *results.controls(edit, "reversed")]
    damage = {arm: results.damage[arm].damage for arm in arms}
    domain_damage = {arm: results.domain_damage[arm].damage for arm in arms if arm in results.domain_damage}
    effects = [
        Effect(row.name, row.difference, row.random, row.over_random, row.reversed, row.aim)
        for row in rows
        if row.headline and row.difference is not None
    ]
    broken = [row.name for row in rows if row.headline and row.broken]
    if edit in domain_damage and not np.isfinite(domain_damage[edit].loss_increase):
        broken.append("the loss on the model's own answers")
    verdict = judge_effects(effects, damage[edit].loss_increase, max_damage=max_damage, broken=broken)
    return EditReport(edit, rows, damage, domain_damage, verdict)


def _row(results: Results, edit: str, task_name: str, task: Task, name: str, metric: Metric, seed: int) -> Row:
    def compare(first: ItemScores, second: ItemScores) -> Difference | None:
        return difference_of(first, second, groups=item_groups(task, first), seed=seed)

    base, edited = metric.item_scores(BASE), metric.item_scores(edit)
    row = Row(
        task=task_name,
        metric=name,
        headline=metric.headline,
        aim=metric.aim,
        base=base.value,
        edited=edited.value,
        difference=compare(base, edited),
        broken=broken_items(base, edited),
    )
    random = [metric.item_scores(arm) for arm in results.controls(edit, "random")]
    random = [scores for scores in random if scores.finite.all()]
    if random:
        mean = mean_scores(random)
        row = replace(row, random=compare(base, mean), over_random=compare(mean, edited))
    for arm in results.controls(edit, "reversed"):
        row = replace(row, reversed=compare(base, metric.item_scores(arm)))
    return row


def broken_items(*arms: ItemScores) -> int:
    """Return the number of items whose score is not finite in one of several arms."""
    return int((~np.all([scores.finite for scores in arms], axis=0)).sum())


def item_groups(task: Task, scores: ItemScores) -> list[str] | None:
    """Return the group label of each item of a metric, or None if all items of the task are independent."""
    return None if task.groups is None else [task.groups[item] for item in scores.items]


def mean_scores(arms: Sequence[ItemScores]) -> ItemScores:
    """Return the scores of each item averaged over arms; for a ratio, its numerators and denominators are averaged."""
    below = [arm.denominators for arm in arms if arm.denominators is not None]
    return replace(
        arms[0],
        numerators=np.mean([arm.numerators for arm in arms], axis=0),
        denominators=np.mean(below, axis=0) if below else None,
    )


def difference_of(
    first: ItemScores, second: ItemScores, *, groups: Sequence[str] | None = None, seed: int = 0
) -> Difference | None:
    """Return the paired difference of two arms, or None if there are too few items or a score is not finite.

    Args:
        first, second: Scores of the two arms over the same items.
        groups: Label of each item; items of one label are resampled together.
        seed: Seed of the resampling.
    """
    try:
        if first.denominators is None or second.denominators is None:
            return paired_difference(first.numerators, second.numerators, groups=groups, seed=seed)
        pairs = ((first.numerators, first.denominators), (second.numerators, second.denominators))
        return ratio_difference(*pairs, scale=first.scale, offset=first.offset, groups=groups, seed=seed)
    except SettingError:
        return None


def adjust(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with p-values after Holm's correction within each family of metrics.

    The headline metrics of a run are one family, so that the verdict keeps its significance level. The subgroups of
    each metric are a family. Other metrics get no adjusted p-value.
    """
    families: dict[tuple[str, str], list[int]] = {}
    for index, row in enumerate(rows):
        metric, _, subgroup = row.metric.partition("/")
        family = ("", "") if row.headline else (row.task, metric) if subgroup else None
        if family is not None and row.difference is not None:
            families.setdefault(family, []).append(index)
    adjusted = list(rows)
    for members in families.values():
        p_values = holm([row.difference.p_value for row in (rows[i] for i in members) if row.difference is not None])
        for index, p_value in zip(members, p_values, strict=True):
            adjusted[index] = replace(rows[index], adjusted_p=float(p_value))
    return adjusted


@dataclass(frozen=True)
class Comparison:
    """An arm of one evaluation compared with an arm of another, over the items that both have.

    Attributes:
        first: Name of the arm in the first evaluation.
        second: Name of the arm in the second evaluation.
        rows: The metrics that both have; ``base`` is the first arm and ``edited`` the second.
    """

    first: str
    second: str
    rows: list[Row]


def compare_results(first: Results, second: Results, *, seed: int = 0) -> list[Comparison]:
    """Return the paired statistics of two evaluations: base against base, and edit against edit.

    Edits are paired by name, or with each other if each evaluation has exactly one. Holm's correction covers the
    headline metrics of each pair.

    Args:
        first: Results of an evaluation.
        second: Results of another evaluation of the same tasks on the same data.
        seed: Seed of the resampling.

    Raises:
        ResultsFileError: The evaluations have no task in common, or the items of a task differ.
    """
    shared = [task for task in first.tasks if task in second.tasks]
    if not shared:
        raise ResultsFileError(
            f"the evaluations have no task in common: one has {', '.join(first.tasks)}, the other has "
            f"{', '.join(second.tasks)}; "
            "evaluate both on the same tasks"
        )
    for task in shared:
        _check_items(task, first.tasks[task].questions, second.tasks[task].questions)
    pairs = [(BASE, BASE)] + [(edit, edit) for edit in first.edits if edit in second.edits]
    if len(first.edits) == len(second.edits) == 1 and first.edits != second.edits:
        pairs.append((first.edits[0], second.edits[0]))
    return [
        Comparison(ours, theirs, adjust([r for task in shared for r in _rows(first, second, task, ours, theirs, seed)]))
        for ours, theirs in pairs
    ]


def _check_items(task: str, ours: Sequence[str], theirs: Sequence[str]) -> None:
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            raise ResultsFileError(
                f"item {number} of task '{task}' differs between the evaluations ('{one[:60]}' and "
                f"'{other[:60]}'); evaluate both on the same data"
            )


def _rows(first: Results, second: Results, task: str, ours: str, theirs: str, seed: int) -> list[Row]:
    rows = []
    mine, other = first.tasks[task], second.tasks[task]
    for name, metric in mine.metrics.items():
        if name not in other.metrics:
            continue
        count = min(len(mine.questions), len(other.questions))
        before, after = metric.item_scores(ours), other.metrics[name].item_scores(theirs)
        before, after = before.select(before.items < count), after.select(after.items < count)
        difference = difference_of(before, after, groups=item_groups(mine, before), seed=seed)
        rows.append(
            Row(
                task=task,
                metric=name,
                headline=metric.headline,
                aim=metric.aim,
                base=before.value,
                edited=after.value,
                difference=difference,
                broken=broken_items(before, after),
            )
        )
    return rows
