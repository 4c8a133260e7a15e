"""``sealign tune``: search the settings of an edit within a damage budget."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from sealign.cli import options
from sealign.cli.app import app, output, quiet_harness, recorded_command, require_extra
from sealign.cli.loading import ModelOptions, with_model_options

if TYPE_CHECKING:
    from rich.table import Table

    from sealign.evaluation.trials import TrialRecord
    from sealign.evaluation.tuning import TuneResult

SHOWN_TRIALS = 8


@app.command()
@with_model_options()
def tune(
    model: ModelOptions,
    output_folder: options.Output,
    demonstrations: options.Demonstrations,
    tasks: options.Tasks,
    method: Annotated[
        str,
        typer.Option(
            "--method", metavar="NAME", help=f"{options.METHOD_HELP} Only sea and mean_difference can be tuned."
        ),
    ] = "sea",
    settings: options.Settings = None,
    data_dir: options.DataDir = None,
    demonstrations_limit: options.DemonstrationsLimit = None,
    limit: options.Limit = None,
    max_damage: options.MaxDamage = 0.05,
    trials: Annotated[
        int, typer.Option("--trials", min=1, metavar="N", help="Maximum number of trials, over all runs of the study.")
    ] = 60,
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes",
            metavar="X",
            help="Stop the search after this many minutes; the final test is not included in this time.",
        ),
    ] = None,
    deployable: Annotated[
        bool,
        typer.Option(
            "--deployable",
            help="Search only edits that can be merged exactly into the weights (affine, not rescaled).",
        ),
    ] = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Search the settings of an edit for the best score within a damage budget, and test the best edit once.

    The search uses one half of the items of each task. The best edit is then scored on the other half, with controls.
    The output folder contains the study, trials.csv, the edit and its evaluation. Run the same command again to
    continue the search.
    """
    require_extra("eval", "lm_eval", "datasets", "matplotlib", "yaml")
    require_extra("tune", "optuna")
    quiet_harness()
    from sealign.cli.display import print_json, track
    from sealign.cli.method_options import method_config
    from sealign.errors import SettingError
    from sealign.evaluation.tuning import tune as run
    from sealign.evaluation.tuning_config import TuneConfig, TunedConfig
    from sealign.figures.evaluation_figures import frontier_figure
    from sealign.figures.report import write_report
    from sealign.figures.style import save_figure

    fixed = method_config(method, {}, settings=options.named_values(settings), preset=None, seed=seed)
    if not isinstance(fixed, TunedConfig):
        raise SettingError(f"method is '{method}', but only sea and mean_difference can be tuned; choose one of them")
    config = TuneConfig(
        tasks=options.names(tasks),
        data_dir=data_dir,
        limit=limit,
        max_damage=max_damage,
        trials=trials,
        minutes=minutes,
        deployable=deployable,
        seed=seed,
        fit=fixed,
    )
    used = options.load_sources(demonstrations, data_dir, demonstrations_limit, seed)
    loaded, tokenizer = model.load()
    result = run(loaded, tokenizer, used, config=config, output=output_folder, command=recorded_command(), track=track)
    save_figure(frontier_figure(result.trials, result.winner, max_damage), output_folder / "figures" / "frontier")
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
        output.print("[bold]No trial had a gain on the development items within the budget, so none was tested.[/]")
        output.print(f"Wrote {folder}/trials.csv and figures/frontier.png.", markup=False)
        return
    output.print(f"\nTrial {result.winner.number} won. On the items that the search did not use:\n")
    print_evaluation(result.results, [result.report])
    output.print(f"Wrote {folder}/edit, evaluation/report.html, trials.csv and figures/frontier.png.", markup=False)


def _trials_table(trials: list[TrialRecord]) -> Table:
    from sealign.cli.evaluation_display import plain_table

    complete = [trial for trial in trials if trial.state == "complete" and trial.gain is not None]
    best = sorted(complete, key=lambda trial: -(trial.gain or 0.0))[:SHOWN_TRIALS]
    table = plain_table(f"The best of {len(trials)} trials, on the development items", "trial")
    for name in ("gain", "damage", "strength"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("settings", overflow="fold")
    for trial in best:
        figures = (f"{trial.gain:+.4f}", f"{trial.damage:+.4f}", f"{trial.strength:.3f}")
        table.add_row(str(trial.number), *figures, escape(_describe(trial.settings)))
    return table


def _describe(settings: dict[str, Any]) -> str:
    """Return the searched settings of a trial in a line."""
    from sealign.evaluation.trials import SEARCHED

    return ", ".join(f"{name} {_short(settings[name])}" for name in SEARCHED if name in settings)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        layers = all(isinstance(item, int) for item in value)
        return f"{value[0]} to {value[-1]}" if layers else "/".join(map(_short, value))
    return str(value)
