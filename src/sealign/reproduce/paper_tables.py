"""The tables of Qiu et al. 2024 (arXiv 2405.09719), for any model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sealign.demonstrations.demonstration import Demonstration
from sealign.edits.edit import Edit
from sealign.edits.intervention import Intervention
from sealign.evaluation.cost import measure_cost
from sealign.evaluation.results import BASE, Results
from sealign.methods.best_of_n import BestOfNConfig
from sealign.methods.composition import Composition
from sealign.methods.contrastive_decoding import CDConfig, ICDConfig
from sealign.methods.dola import DoLaConfig
from sealign.methods.icl import few_shot_text
from sealign.methods.iti import ITIConfig
from sealign.methods.lora_ft import LoRAFTConfig
from sealign.methods.sea import SEAConfig
from sealign.models.prompt_format import PromptFormat
from sealign.reproduce.cells import damage_cell, metric_cell
from sealign.reproduce.reproduce_config import FAIRNESS, TRUTHFULNESS
from sealign.reproduce.table_format import Cell, Column, Table
from sealign.reproduce.workbench import Workbench

LINEAR = SEAConfig(prompt_format=PromptFormat("few_shot"))
"""The paper's edit for TruthfulQA: K = 0.998, the last 21 of 32 layers in proportion, not centred, strength 1."""

MILD = LINEAR.replace(explained_variance=0.9, centered=True, strength=0.25)
"""The edit of the demo, which does not break a small model."""

LINEAR_FAIR = SEAConfig(explained_variance=0.9999, layers="last:2", prompt_format=PromptFormat("few_shot"))
"""The paper's edit for BBQ: K = 0.9999, the last 2 layers."""

FAIR_MAPS = ("squared_exponential", "tanh")

ICL_SHOTS = 4
"""Number of demonstrations in the prompt of BBQ, as in the paper; the prompt of TruthfulQA has six of its own."""

MC = ("truthfulqa_mc1", "truthfulqa_mc2")
MC_METRICS = tuple(zip(MC, ("acc", "mc2"), strict=True))
"""Task and metric of MC1 and MC2."""

MC_COLUMNS = (Column("MC1 %", scale=100), Column("MC2 %", scale=100))
BBQ_METRICS = (("bbq", "acc"), ("bbq", "stereotypical_rate"))
BBQ_COLUMNS = (Column("BBQ accuracy %", scale=100), Column("BBQ stereotypical %", scale=100))
GENERATES = "the method acts on generation, not on the scores of given answers"
NOT_FITTED = "the base model is not fitted"
NO_TIME = "times are relative to this row"
DAMAGE = Column("damage, nats per token", digits=3)

_MARKED = "* differs from ICL by a paired test at p <= 0.05, not corrected for the number of cells; intervals are 95 %"
_MARKED_BASE = _MARKED.replace("ICL", "base")
_PROMPT = "ICL is the model with the six questions of TruthfulQA's own prompt, which all rows have"
_DAMAGED = "for decoding methods, each implausible token of plain text adds about 1000 nats to the damage"


def truthfulqa(bench: Workbench) -> Table:
    """Return the comparison of methods on TruthfulQA."""
    bench.model()
    demonstrations, training = bench.demonstrations(TRUTHFULNESS), bench.training_demonstrations(TRUTHFULNESS)
    scored = _truthfulqa_edits(bench, demonstrations, training)
    best = bench.fit(BestOfNConfig(n=bench.draws))
    sampled: dict[str, Intervention] = {
        "Best-of-N on ICL": best,
        "Best-of-N on SEA": Composition([scored["SEA"], best]),
    }
    results = bench.evaluate(scored, [*MC, "truthfulqa_gen"])
    generated = bench.evaluate(sampled, ["truthfulqa_gen"])
    random = bench.evaluate({"SEA": scored["SEA"]}, MC, control_seeds=(0,))
    columns = [
        *(Column(f"{name} %", scale=100) for name in ("MC1", "MC2", "Info", "Truth", "Info*Truth", "ROUGE-L acc")),
        Column("prefill time / ICL", digits=2),
        Column("decode time / ICL", digits=2),
        Column("fit, s"),
        DAMAGE,
    ]
    rows: dict[str, Sequence[Cell]] = {"ICL": _truthfulqa_row(bench, results, BASE, None)}
    rows |= {name: _truthfulqa_row(bench, results, name, edit) for name, edit in scored.items()}
    rows |= {name: _truthfulqa_row(bench, generated, name, edit) for name, edit in sampled.items()}
    control = "SEA random 0"
    blank = Cell(missing="controls are scored on multiple choice only")
    rows["SEA, random directions"] = [*_cells(random, MC_METRICS, control), *[blank] * 7, damage_cell(random, control)]
    if "CD" not in scored:
        reason = "contrastive decoding needs a smaller model with the same tokenizer; name one with --amateur"
        rows["CD"] = [Cell(missing=reason)] * len(columns)
    trained = (
        f"LoRA-FT and ICD are trained on {len(training)} demonstrations, the other methods are fitted from "
        f"{len(demonstrations)}"
    )
    drawn = f"Best-of-N samples {bench.draws} answers"
    return Table("table-truthfulqa", "TruthfulQA", columns, rows, [_MARKED, _PROMPT, trained, drawn, _DAMAGED])


def _truthfulqa_edits(
    bench: Workbench, demonstrations: Sequence[Demonstration], training: Sequence[Demonstration]
) -> dict[str, Intervention]:
    """Return the methods that are scored on all tasks of TruthfulQA, by name of the row."""
    edits: dict[str, Intervention] = {
        "LoRA-FT": bench.fit(LoRAFTConfig(), training),
        "ITI": bench.fit(ITIConfig(), demonstrations),
        "DoLa": bench.fit(DoLaConfig()),
    }
    if bench.config.amateur is not None:
        edits["CD"] = bench.fit(CDConfig(amateur=bench.config.amateur))
    return edits | {
        "ICD": bench.fit(ICDConfig(), training),
        "SEA": bench.edit(TRUTHFULNESS, LINEAR),
        "SEA, mild": bench.edit(TRUTHFULNESS, MILD),
    }


def _truthfulqa_row(bench: Workbench, results: Results, arm: str, edit: Intervention | None) -> list[Cell]:
    """Return the row of one arm; ``edit`` is None for the base model."""
    generation = ("info", "truth", "truth*info", "rougeL_acc")
    return [
        *(_cells(results, MC_METRICS, arm) if edit is None or edit.changes_scores else [Cell(missing=GENERATES)] * 2),
        *(metric_cell(results, "truthfulqa_gen", metric, arm) for metric in generation),
        *_times(bench, edit),
        Cell(missing=NOT_FITTED) if edit is None else Cell(edit.fit_seconds),
        damage_cell(results, arm),
    ]


def _cells(results: Results, metrics: Iterable[tuple[str, str]], arm: str) -> list[Cell]:
    """Return the cells of one arm, one for each pair of task and metric."""
    return [metric_cell(results, task, metric, arm) for task, metric in metrics]


def _rows(
    results: Results, metrics: Sequence[tuple[str, str]], edits: Iterable[str], *, base: str = "ICL"
) -> dict[str, Sequence[Cell]]:
    """Return the rows of the base model, under another name, and of edits: the metrics and the damage."""
    return {
        base if arm == BASE else arm: [*_cells(results, metrics, arm), damage_cell(results, arm)]
        for arm in (BASE, *edits)
    }


def _times(bench: Workbench, edit: Intervention | None) -> list[Cell]:
    """Return the prefill and decode times relative to the base model, with their range over rounds."""
    if edit is None:
        return [Cell(missing=NO_TIME)] * 2
    model, tokenizer = bench.model()
    cost = measure_cost(model, tokenizer, edit, rounds=3)
    return [Cell(*cost.prefill), Cell(*cost.decode)]


def bbq(bench: Workbench) -> Table:
    """Return the comparison of methods on BBQ, with the same demonstrations in the context."""
    bench.model()
    demonstrations, training = bench.demonstrations(FAIRNESS), bench.training_demonstrations(FAIRNESS)
    arms: dict[str, Intervention] = {
        "LoRA-FT": bench.fit(LoRAFTConfig(), training),
        "SEA": bench.edit(FAIRNESS, LINEAR_FAIR),
        "Phi-SEA": bench.edit(FAIRNESS, LINEAR_FAIR.replace(feature_map="squared_exponential")),
    }
    results = bench.evaluate(arms, ["bbq"], preamble=few_shot_text(demonstrations[:ICL_SHOTS]))
    metrics = {
        "accuracy %": "acc",
        "unknown rate %": "unknown_rate",
        "bias, ambiguous": "bias_score_ambiguous",
        "bias, disambiguated": "bias_score_disambiguated",
        "stereotypical %": "stereotypical_rate",
    }
    categories = sorted(name for name in results.tasks["bbq"].metrics if name.startswith("acc/"))
    metrics |= {f"accuracy %, {name.removeprefix('acc/')}": name for name in categories}
    columns = [Column(name, scale=100) for name in metrics]
    rows = _rows(results, [("bbq", metric) for metric in metrics.values()], arms)
    notes = [_MARKED, f"all rows have the same {ICL_SHOTS} demonstrations in the context"]
    notes.append(f"LoRA-FT is trained on {len(training)} demonstrations, edits are fitted from {len(demonstrations)}")
    return Table("table-bbq", "BBQ", [*columns, DAMAGE], rows, notes)


def models(bench: Workbench) -> Table:
    """Return the comparison of linear and non-linear edits on several models and both benchmarks."""
    rows: dict[str, Sequence[Cell]] = {}
    for name in (bench.config.model, *bench.config.models):
        bench.model(name)
        fair = bench.demonstrations(FAIRNESS)
        edits = {
            kind: (
                bench.edit(TRUTHFULNESS, LINEAR.replace(feature_map=feature_map)),
                bench.edit(FAIRNESS, LINEAR_FAIR.replace(feature_map=feature_map)),
            )
            for kind, feature_map in (("SEA", "identity"), ("Phi-SEA", "squared_exponential"))
        }
        on_true = bench.evaluate({kind: pair[0] for kind, pair in edits.items()}, MC)
        on_fair = bench.evaluate(
            {kind: pair[1] for kind, pair in edits.items()}, ["bbq"], preamble=few_shot_text(fair[:ICL_SHOTS])
        )
        fair_rows = _rows(on_fair, BBQ_METRICS, edits)
        rows |= {f"{name}, {arm}": [*row, *fair_rows[arm]] for arm, row in _rows(on_true, MC_METRICS, edits).items()}
    columns = [*MC_COLUMNS, DAMAGE, *BBQ_COLUMNS, DAMAGE]
    return Table("table-models", "Linear and non-linear edits on several models", columns, rows, [_MARKED])


def ablation(bench: Workbench) -> Table:
    """Return the ablations: parts of the combination, and fewer layers."""
    bench.model()
    variants: dict[str, SEAConfig] = {"SEA": LINEAR}
    for name in ("positive", "negative", "average", "reversed"):
        variants[f"{name} only" if name in ("positive", "negative") else name] = LINEAR.replace(
            combine=name,
        )
    variants |= {
        "top 3 layers": LINEAR.replace(layers="last:3"),
        "bottom 3 layers": LINEAR.replace(layers="first:3"),
    }
    edits = {name: bench.edit(TRUTHFULNESS, config) for name, config in variants.items()}
    return _truthful_table(bench, "table-ablation", "Ablations on TruthfulQA", edits)


def activations(bench: Workbench) -> Table:
    """Return the comparison of edits that are fitted from the last, the mean or a random token."""
    bench.model()
    edits = {
        f"{token} token": bench.edit(TRUTHFULNESS, LINEAR.replace(token=token)) for token in ("last", "mean", "random")
    }
    return _truthful_table(bench, "table-activations", "Token whose activation is read", edits)


def _truthful_table(bench: Workbench, name: str, title: str, edits: Mapping[str, Edit]) -> Table:
    results = bench.evaluate(edits, MC)
    return Table(name, title, [*MC_COLUMNS, DAMAGE], _rows(results, MC_METRICS, edits), [_MARKED])


CONTROL_TASKS = {"mmlu": "acc", "commonsense_qa": "acc", "gsm8k_cot": "exact_match", "nq_open": "exact_match"}
"""Tasks of the paper's control table that can read local data, with their metrics."""


def control(bench: Workbench) -> Table:
    """Return the effect of edits on unrelated tasks."""
    bench.model()
    edits = {
        "SEA, truthfulness": bench.edit(TRUTHFULNESS, LINEAR),
        "SEA, fairness": bench.edit(FAIRNESS, LINEAR_FAIR),
        "Phi-SEA, fairness": bench.edit(FAIRNESS, LINEAR_FAIR.replace(feature_map="squared_exponential")),
    }
    results = bench.evaluate(edits, list(CONTROL_TASKS))
    rows = _rows(results, list(CONTROL_TASKS.items()), edits, base=BASE)
    columns = [Column(f"{task} %", scale=100) for task in CONTROL_TASKS]
    return Table("table-control", "Control tasks", [*columns, DAMAGE], rows, [_MARKED_BASE])


def crows(bench: Workbench) -> Table:
    """Return the scores on CrowS-Pairs, by type of bias, of edits that are fitted from BBQ."""
    bench.model()
    edits = {"SEA": bench.edit(FAIRNESS, LINEAR_FAIR)}
    edits |= {f"Phi-SEA, {name}": bench.edit(FAIRNESS, LINEAR_FAIR.replace(feature_map=name)) for name in FAIR_MAPS}
    results = bench.evaluate(edits, ["crows_pairs_english"])
    metrics = sorted(results.tasks["crows_pairs_english"].metrics)
    rows = _rows(results, [("crows_pairs_english", metric) for metric in metrics], edits, base=BASE)
    columns = [Column("all %" if "/" not in metric else f"{metric.split('/')[1]} %", scale=100) for metric in metrics]
    notes = ["fraction of pairs whose stereotypical sentence is more probable; 50 % is unbiased"]
    notes.append(_MARKED_BASE)
    return Table("table-crows", "CrowS-Pairs, edits fitted from BBQ", [*columns, DAMAGE], rows, notes)


def joint(bench: Workbench) -> Table:
    """Return the comparison of one edit for two behaviours with one edit for each."""
    bench.model()
    edits = {
        "truthfulness": bench.edit(TRUTHFULNESS, LINEAR),
        "fairness": bench.edit(FAIRNESS, LINEAR),
        "joint": bench.edit({TRUTHFULNESS: None, FAIRNESS: None}, LINEAR),
    }
    results = bench.evaluate(edits, [*MC, "bbq"])
    rows = _rows(results, [*MC_METRICS, *BBQ_METRICS], edits, base=BASE)
    columns = [*MC_COLUMNS, *BBQ_COLUMNS, DAMAGE]
    note = "all edits have the settings for truthfulness; BBQ is scored without demonstrations in the context"
    return Table("table-joint", "Specialised and joint edits", columns, rows, [_MARKED_BASE, note])
