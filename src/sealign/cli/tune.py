"""``sealign tune``: the settings of an edit, searched under a damage budget."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from sealign.cli import options
from sealign.cli.app import app, messages, output, quiet_harness, recorded_command, require_extra

if TYPE_CHECKING:
    from rich.table import Table

    from sealign.evaluation.trials import TrialRecord
    from sealign.evaluation.tuning import TuneResult

SHOWN_TRIALS = 8


@app.command()
def tune(
    output_folder: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Folder for the study, the edit and its evaluation.")
    ],
    demonstrations: options.Demonstrations,
    tasks: options.Tasks,
    model: options.Model = None,
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    task_limit: Annotated[
        int | None, typer.Option("--task-limit", min=1, metavar="N", help="Use the first N items of each task only.")
    ] = None,
    max_damage: options.MaxDamage = 0.05,
    trials: Annotated[
        int, typer.Option("--trials", min=1, metavar="N", help="Settings to try, over all runs of this study.")
    ] = 60,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", metavar="X", help="Stop the search after this time; the test comes on top."),
    ] = None,
    deployable: Annotated[
        bool,
        typer.Option("--deployable", help="Keep to edits that weights carry exactly: linear and not rescaled."),
    ] = False,
    prompt_format: options.PromptStyle = None,
    batch_size: options.BatchSize = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Search the settings of an edit for the best score under a damage budget, and test the winner once.

    Half of the items of each task choose the settings; the winner is scored on the other half, with controls. Run the
    same command again to go on with the search.
    """
    require_extra("eval", "lm_eval", "datasets", "matplotlib", "yaml")
    require_extra("tune", "optuna")
    quiet_harness()
    from sealign.cli.display import print_json, track
    from sealign.evaluation.report import write_report
    from sealign.evaluation.tuning import tune as run
    from sealign.evaluation.tuning_config import TuneConfig
    from sealign.figures.evaluation_figures import frontier_figure, save_figure
    from sealign.methods.sea_config import FitConfig
    from sealign.models.embedded_model import EMBEDDED
    from sealign.models.loading import load_model
    from sealign.models.prompt_format import PromptFormat

    given: dict[str, Any] = {"batch_size": batch_size, "prompt_format": prompt_format and PromptFormat(prompt_format)}  # type: ignore[arg-type]
    config = TuneConfig(
        tasks=options.names(tasks),
        data_dir=data_dir,
        limit=task_limit,
        max_damage=max_damage,
        trials=trials,
        minutes=minutes,
        deployable=deployable,
        seed=seed,
        fit=FitConfig(seed=seed, **{name: value for name, value in given.items() if value is not None}),
    )
    learnt = options.load_sources(demonstrations, data_dir, limit, seed)
    with messages.status("Loading the model"):
        loaded, tokenizer = load_model(model or EMBEDDED, dtype=dtype, device=device)
    result = run(
        loaded, tokenizer, learnt, config=config, output=output_folder, command=recorded_command(), track=track
    )
    save_figure(frontier_figure(result.trials, result.winner, max_damage), output_folder / "figures", "frontier")
    if result.results is not None and result.report is not None:
        write_report(result.results, [result.report], output_folder / "evaluation", max_damage=max_damage)
    if json:
        print_json(_as_data(result))
    else:
        _show(result, output_folder)


def _as_data(result: TuneResult) -> dict[str, Any]:
    from sealign.cli.evaluation_display import reports_as_data

    found = None
    if result.results is not None and result.report is not None:
        found = reports_as_data(result.results, [result.report])
    return {
        "trials": [dataclasses.asdict(trial) for trial in result.trials],
        "winner": result.winner and result.winner.number,
        "evaluation": found,
    }


def _show(result: TuneResult, folder: Path) -> None:
    from sealign.cli.evaluation_display import print_evaluation

    output.print(_trials_table(result.trials))
    if result.results is None or result.report is None or result.winner is None:
        output.print("[bold]No settings gained on the development items within the budget, so none was tested.[/]")
        output.print(f"Wrote {folder}/trials.csv and figures/frontier.png.", markup=False)
        return
    output.print(f"\nTrial {result.winner.number} won. On items that the search never saw:\n")
    print_evaluation(result.results, [result.report])
    output.print(f"Wrote {folder}/edit, evaluation/report.html, trials.csv and figures/frontier.png.", markup=False)


def _trials_table(trials: list[TrialRecord]) -> Table:
    from sealign.cli.evaluation_display import plain_table

    complete = [trial for trial in trials if trial.state == "complete" and trial.gain is not None]
    best = sorted(complete, key=lambda trial: -(trial.gain or 0.0))[:SHOWN_TRIALS]
    table = plain_table(f"The best of {len(trials)} settings tried, on the development items", "trial")
    for name in ("gain", "damage", "strength"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("settings", overflow="fold")
    for trial in best:
        figures = (f"{trial.gain:+.4f}", f"{trial.damage:+.4f}", f"{trial.strength:.3f}")
        table.add_row(str(trial.number), *figures, escape(_describe(trial.settings)))
    return table


def _describe(settings: dict[str, Any]) -> str:
    layers = settings["layers"]
    where = layers if isinstance(layers, str) else f"layers {layers[0]} to {layers[-1]}"
    shares = ", ".join(f"{share:.4g}" for share in settings["explained_variance"])
    centred = "centred" if settings["centered"] else "uncentred"
    names = [settings[name] for name in ("site", "combine", "feature_map", "normalization")]
    return f"{names[0]}, {where}, K {shares}, {centred}, {names[1]}, {names[2]}, rescaled {names[3]}"
