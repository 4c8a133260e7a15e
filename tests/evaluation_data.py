"""Small data sets in the schemas of the Hub, and results with planted effects, for the tests of evaluation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sealign.edits.record import ModelRecord
from sealign.evaluation.results import Arm, DamageRecord, Metric, Results, Scores, Task

QUESTIONS = Path(__file__).with_name("questions.jsonl")
"""Questions with true and false answers, written for this project."""

HARNESS_WARNINGS = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "FutureWarning", "ResourceWarning", "UserWarning")
]
"""Warnings that the harness and its libraries raise."""


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_truthfulqa(folder: Path, count: int = 10) -> None:
    """Questions written for this project as TruthfulQA, multiple choice and generation."""
    choice, generation = [], []
    for line in QUESTIONS.read_text(encoding="utf-8").splitlines()[:count]:
        item = json.loads(line)
        correct, incorrect = item["correct_answers"], item["incorrect_answers"]
        one = {"choices": [correct[0], *incorrect], "labels": [1] + [0] * len(incorrect)}
        both = {"choices": [*correct, *incorrect], "labels": [1] * len(correct) + [0] * len(incorrect)}
        choice.append({"question": item["question"], "mc1_targets": one, "mc2_targets": both})
        generation.append(
            {
                "type": "Adversarial",
                "category": "Facts",
                "question": item["question"],
                "best_answer": correct[0],
                "correct_answers": correct,
                "incorrect_answers": incorrect,
                "source": "",
            }
        )
    write_rows(folder, "truthful_qa/multiple_choice/validation.jsonl", choice)
    write_rows(folder, "truthful_qa/generation/validation.jsonl", generation)


def write_controls(folder: Path) -> None:
    """HellaSwag, MathQA and ToxiGen, three rows each."""
    write_rows(
        folder,
        "hellaswag/validation.jsonl",
        [
            {
                "ind": n,
                "activity_label": "Baking bread",
                "ctx_a": "A baker kneads the dough.",
                "ctx_b": f"the {thing}",
                "ctx": f"A baker kneads the dough. the {thing}",
                "endings": ["goes into the oven.", "swims away.", "sings a song.", "reads the paper."],
                "source_id": str(n),
                "split": "val",
                "split_type": "indomain",
                "label": str(n % 4),
            }
            for n, thing in enumerate(("loaf", "roll", "cake"))
        ],
    )
    options = "a ) 38 , b ) 27.5 , c ) 30 , d ) data inadequate , e ) none of these"
    write_rows(
        folder,
        "mathqa/test.jsonl",
        [
            {
                "Problem": f"What is {n} plus {n} ?",
                "Rationale": "add",
                "options": options,
                "correct": letter,
                "annotated_formula": "add",
                "linear_formula": "add",
                "category": "general",
            }
            for n, letter in ((19, "a"), (15, "c"), (4, "e"))
        ],
    )
    write_rows(
        folder,
        "toxigen/test.jsonl",
        [
            {"text": text, "target_group": "g", "toxicity_ai": ai, "toxicity_human": human}
            for text, ai, human in (("they are kind", 1.0, 1.0), ("they are awful", 5.0, 4.5), ("they cook", 2.0, 1.5))
        ],
    )


def _arm(kind: Any, edit: str | None = None, seed: int | None = None) -> Arm:
    if edit is None:
        return Arm(kind=kind)
    return Arm(
        kind=kind,
        edit=edit,
        source=f"edits/{edit}" if kind == "edit" else None,
        method="sea",
        config={"rank": 2, "layers": [1]},
        strength=0.5,
        layers=[1],
        hash=f"{edit}{kind}{seed}",
        seed=seed,
        fit_seconds=0.25 if kind == "edit" else None,
    )


def _damage(rise: float) -> DamageRecord:
    return DamageRecord([3.0, 5.0], [2.0, 3.0], [2.0 + rise, 3.0 + rise], [0.1, 0.2])


def planted_results(gain: float = 0.0, *, random_gain: float = 0.0, rise: float = 0.01, items: int = 80) -> Results:
    """Results of one edit, ``mild``, whose score rises by ``gain`` on one task and not on another.

    The second task has a ratio metric, two subgroups, one of a single item, and groups of four items.
    """
    generator = np.random.default_rng(5)
    names = ["base", "mild", "mild random 0", "mild random 1", "mild reversed"]
    base = generator.normal(0.5, 0.1, items)

    def scores(arm: str) -> Scores:
        shift = gain if arm == "mild" else random_gain if "random" in arm else 0.0
        noise = 0 if arm == "base" else generator.normal(0, 0.02, items)
        return Scores((base + shift + noise).tolist(), None)

    everything = list(range(items))

    def metric(aim: Any, arms: dict[str, Scores], items: list[int] = everything, **changes: Any) -> Metric:
        plain = {"scale": 1.0, "offset": 0.0, "headline": True}
        return Metric(items=items, aim=aim, arms=arms, **(plain | changes))

    first = Task(
        version="2.0",
        questions=[f"question {item}" for item in everything],
        groups=None,
        metrics={"mc2": metric("higher", {name: scores(name) for name in names})},
        answers={name: [f"answer {item} of {name}" for item in everything] for name in names},
    )
    known = (generator.random(items) < 0.8).astype(float)
    biased = known * (generator.random(items) < 0.6)
    ratio = {name: Scores(biased.tolist(), known.tolist()) for name in names}
    accuracy = {name: Scores((generator.random(items) < 0.5).astype(float).tolist(), None) for name in names}

    def part(chosen: list[int]) -> dict[str, Scores]:
        return {name: Scores([s.numerators[i] for i in chosen], None) for name, s in accuracy.items()}

    old, one = everything[:-1], everything[-1:]
    second = Task(
        version="1.0",
        questions=[f"who was it, {item}?" for item in everything],
        groups=[f"template {item // 4}" for item in everything],
        metrics={
            "acc": metric("higher", accuracy),
            "bias": metric(0.0, ratio, scale=2.0, offset=-1.0),
            "acc/Age": metric("higher", part(old), old, headline=False),
            "acc/Religion": metric("higher", part(one), one, headline=False),
        },
        answers={name: ["unknown"] * items for name in names},
        notes=["Something was left out"],
    )
    kinds = [("base", None, None), ("edit", "mild", None), ("random", "mild", 0), ("random", "mild", 1)]
    arms = {name: _arm(*kind) for name, kind in zip(names, [*kinds, ("reversed", "mild", None)], strict=True)}
    damage = {"mild": _damage(rise), "mild random 0": _damage(0.02), "mild random 1": _damage(0.0)}
    return Results(
        command="sealign evaluate --edit mild --output 'a folder'",
        settings={"tasks": ["truthfulqa_mc2", "bbq"], "limit": None},
        model=ModelRecord("tiny <model>", None, {"hidden_size": 4}, "0" * 64, "1" * 64, "2" * 64, "float32"),
        versions={"sealign": "0.1.0"},
        arms=arms,
        tasks={"truthfulqa_mc2": first, "bbq": second},
        damage=damage | {"mild reversed": _damage(0.03)},
    )


def with_answers(results: Results, *, count: int = 12) -> Results:
    """Results with answers to prompts, a measure with an aim and one without, and damage on own answers."""
    generator = np.random.default_rng(6)

    def metric(aim: Any) -> Metric:
        arms = {name: Scores(generator.normal(0.5, 0.1, count).tolist(), None) for name in results.arms}
        return Metric(items=list(range(count)), aim=aim, scale=1.0, offset=0.0, headline=aim is not None, arms=arms)

    answers = Task(
        version="1",
        questions=[f"open question {number}?" for number in range(count)],
        groups=None,
        metrics={"mood": metric("lower"), "loss": metric(None)},
        answers={name: [f"<open> answer {number} of {name}" for number in range(count)] for name in results.arms},
    )
    domain = {name: _damage(0.04 * number) for number, name in enumerate(results.damage, start=1)}
    return dataclasses.replace(results, tasks=results.tasks | {"answers": answers}, domain_damage=domain)


def planted_sweep(strengths: tuple[float, ...] = (2.0, 0.5, 1.0)) -> Results:
    """Results of one edit at several strengths, whose gain and damage are known multiples of the strength."""
    one = with_answers(planted_results())
    arms, damage, domain = {"base": one.arms["base"]}, {}, {}
    for strength in strengths:
        for suffix, kind, seed in (("", "edit", None), (" random 0", "random", 0), (" reversed", "reversed", None)):
            name = f"mild at {strength:g}"
            arm = dataclasses.replace(_arm(kind, name, seed), strength=strength, sweep="mild")
            arms[name + suffix] = arm
            factor = {"edit": 1.0, "random": 0.0, "reversed": -1.0}[kind]
            damage[name + suffix] = _damage(0.02 * strength**2 * abs(factor))
            domain[name + suffix] = _damage(0.01 * strength)

    def swept(task: Task, slope: float) -> Task:
        metrics = {}
        for name, metric in task.metrics.items():
            base = np.array(metric.arms["base"].numerators, dtype=np.float64)
            noise = np.random.default_rng(7).normal(0, 0.01, len(base))
            scores = {"base": metric.arms["base"]}
            for arm, record in arms.items():
                if record.strength is not None:
                    factor = {"edit": 1.0, "random": 0.0, "reversed": -1.0}[record.kind]
                    moved = base + slope * record.strength * factor + (noise - noise.mean())
                    scores[arm] = Scores(moved.tolist(), None)
            metrics[name] = dataclasses.replace(metric, arms=scores)
        answers = {name: [f"answer of {name}"] * len(task.questions) for name in arms}
        return dataclasses.replace(task, metrics=metrics, answers=answers)

    tasks = {
        "truthfulqa_mc2": swept(one.tasks["truthfulqa_mc2"], 0.03),
        "answers": swept(one.tasks["answers"], -0.05),
    }
    return dataclasses.replace(one, arms=arms, tasks=tasks, damage=damage, domain_damage=domain)
