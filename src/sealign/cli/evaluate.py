"""``sealign evaluate`` and ``sealign compare``: what an edit does, with controls, damage and statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sealign.cli import options
from sealign.cli.app import app, messages, output, quiet_harness, recorded_command, require_extra
from sealign.cli.judging import load_judge
from sealign.cli.loading import fit_methods, load_changes, parse_name, require_method_extras


@app.command()
def evaluate(
    output_folder: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Folder for results.json, report.html, table.csv, figures.")
    ],
    tasks: options.Tasks,
    edit: Annotated[
        list[str] | None,
        typer.Option(
            "--edit",
            metavar="[NAME=]EDIT",
            help="Folder of an edit or a method, or an edit's repository on the Hub. Give it several times to compare; "
            "without one, the base model alone is scored. With a plus, as in a=DIR+best_of_n, both are put on.",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="[NAME=]METHOD",
            help="A method to fit with its defaults and compare with: icl, lora_ft, iti, dola, icd, best_of_n, caa or "
            "leace. Give it several times.",
        ),
    ] = None,
    demonstrations: Annotated[
        list[str] | None,
        typer.Option("--demonstrations", metavar="SOURCE", help="What --method learns from; as for sealign fit."),
    ] = None,
    model: options.EditedModel = None,
    data_dir: options.TaskDataDir = None,
    limit: options.TaskLimit = None,
    strength: options.Strength = None,
    control_seeds: Annotated[
        str,
        typer.Option("--control-seeds", metavar="N,N,...", help="Seeds of the random-direction controls; '' for none."),
    ] = "0,1,2",
    reversed_control: Annotated[
        bool, typer.Option("--reversed/--no-reversed", help="Also run each edit with positive and negative swapped.")
    ] = True,
    max_damage: options.MaxDamage = 0.05,
    judge: options.JudgeModel = None,
    judge_url: options.JudgeUrl = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, metavar="N", help="Sequences run together in generation.")
    ] = 8,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    ignore_mismatch: options.IgnoreMismatch = False,
    json: options.Json = False,
) -> None:
    """Measure what edits do: tasks, controls, damage, and a verdict in words.

    The base model, each edit, the same edit in random directions and with its roles swapped are scored on the same
    items. Run the same command again to go on after an interruption.
    """
    require_extra("eval", "lm_eval", "datasets", "matplotlib", "yaml")
    quiet_harness()
    from sealign.cli.display import print_json, track
    from sealign.cli.evaluation_display import print_evaluation, reports_as_data
    from sealign.evaluation.comparison import report_edits
    from sealign.evaluation.evaluate_edits import EvaluationConfig
    from sealign.evaluation.evaluate_edits import evaluate as run
    from sealign.evaluation.report import write_report
    from sealign.methods.registry import model_id
    from sealign.models.embedded_model import EMBEDDED
    from sealign.models.loading import load_model

    edits, sources = load_changes(edit or [], strength)
    for wanted in method or []:
        require_method_extras(parse_name(wanted)[1])
    learnt = options.load_sources(demonstrations or [], data_dir, None, seed)
    name = model or next((model_id(edit) for edit in edits.values()), EMBEDDED)
    with messages.status("Loading the model"):
        loaded, tokenizer = load_model(name, dtype=dtype, device=device)
    edits |= fit_methods(method or [], list(edits), loaded, tokenizer, learnt, output_folder, track)
    config = EvaluationConfig(
        tasks=options.names(tasks),
        data_dir=data_dir,
        limit=limit,
        control_seeds=_numbers("--control-seeds", control_seeds),
        reversed_control=reversed_control,
        batch_size=batch_size,
        judge=load_judge(judge, judge_url, dtype, device),
    )
    results = run(
        loaded,
        tokenizer,
        edits,
        config=config,
        output=output_folder,
        sources=sources,
        command=recorded_command(),
        ignore_mismatch=ignore_mismatch,
        track=track,
    )
    with messages.status("Computing statistics and drawing the report"):
        reports = report_edits(results, max_damage=max_damage, seed=seed)
        write_report(results, reports, output_folder, max_damage=max_damage)
    if json:
        print_json(reports_as_data(results, reports))
    else:
        print_evaluation(results, reports)
        output.print(f"Wrote {output_folder}/report.html, results.json, table.csv and figures.", markup=False)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Folder or results.json of a finished evaluation.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Compare two finished evaluations, item by item, with the same statistics."""
    from sealign.cli.display import print_json
    from sealign.cli.evaluation_display import comparison_tables, comparisons_as_data
    from sealign.evaluation.comparison import compare_results
    from sealign.evaluation.results import Results

    comparisons = compare_results(Results.load(first), Results.load(second), seed=seed)
    if json:
        print_json(comparisons_as_data(comparisons))
        return
    for table in comparison_tables(comparisons, str(first), str(second)):
        output.print(table)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    from sealign.errors import SettingError

    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise SettingError(f"{option} is '{text}', but it must be whole numbers such as 0,1,2") from None
