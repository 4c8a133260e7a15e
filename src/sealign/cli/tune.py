"""``sealign tune``: find the edit of the largest gain within a damage budget."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from sealign.cli import option_values, options
from sealign.cli.app import app, quiet_harness, recorded_command, require_extra
from sealign.cli.consoles import messages, output
from sealign.cli.loading import ModelOptions, with_default, with_model_options
from sealign.cli.outputs import say_cards, say_replaced

if TYPE_CHECKING:
    from rich.table import Table

    from sealign.evaluation.finalists import Finalist
    from sealign.evaluation.scan import ScannedCandidate
    from sealign.evaluation.tuning import TuneResult
    from sealign.progress import Track

SHOWN_CANDIDATES = 8

STAGES = {
    "Answering": "Answering the prompts with the base model, to measure damage on its own answers.",
    "Collecting activations": "Collecting activations of the part to fit.",
    "Fitting candidates": "Fitting every method at every site, layer and token choice.",
    "Computing sensitivities": "Ranking the candidates by gain / sqrt(2 KL) on the part to compare.",
    "Measuring damage": "Measuring the most efficient candidates at about the strength that uses the damage budget.",
    "Choosing the strength": "Choosing the strength of the winner, which was fitted again on both parts.",
    "Scoring": "Testing the winner once on the third part, with controls in random and in the opposite direction.",
}
"""What the search does, by the beginning of what its progress is called."""

OptionalTasks = Annotated[
    str,
    options.with_note(options.TASKS, "Finalists are compared on a part of their items instead of on the preference."),
]


@app.command()
@with_model_options()
def tune(
    model: ModelOptions,
    output_folder: options.Output,
    demonstrations: options.Demonstrations,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="NAME,NAME,...",
            help="Methods to search: difference_operator, targeted_shift, mean_difference, sea, leace, iti. "
            r"\[default: the first four]",
        ),
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option(
            "--sites", metavar="NAME,NAME,...", help=r"Sites to search: residual, mlp, attention. \[default: all]"
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens",
            metavar="NAME,NAME,...",
            help=r"Token choices to search: completion, last, mean, random. \[default: the first two]",
        ),
    ] = None,
    layers: options.Layers = None,
    finalists: Annotated[
        int,
        typer.Option(
            "--finalists",
            min=1,
            metavar="N",
            help="Number of candidates to measure at the strength that uses the damage budget.",
        ),
    ] = 5,
    max_minutes: Annotated[
        float | None,
        typer.Option(
            "--max-minutes",
            min=0,
            metavar="M",
            help="Time limit of the search. One in four layers is scanned first, then those between, as far as the "
            r"time allows; the test at the end is counted in. \[default: none]",
        ),
    ] = None,
    tasks: OptionalTasks = "",
    data_dir: options.DataDir = None,
    columns: options.Columns = None,
    demonstrations_limit: options.DemonstrationsLimit = None,
    limit: options.Limit = None,
    max_damage: Annotated[
        float,
        options.with_note(
            options.MAX_DAMAGE, "The KL divergence from the base model on neutral text is within it, too."
        ),
    ] = 0.05,
    max_domain_damage: Annotated[
        float | None,
        typer.Option(
            "--max-domain-damage",
            min=0,
            metavar="X",
            help="Maximum KL divergence on the base model's own answers to the prompts of the demonstrations, in nats "
            r"per token. \[default: that of --max-damage]",
        ),
    ] = None,
    holdout: Annotated[float, with_default(options.Holdout, "0.3")] = 0.3,
    deployable: Annotated[
        bool,
        typer.Option(
            "--deployable",
            help="Search only edits that are exactly a LoRA: linear, not rescaled, on the MLP or attention output.",
        ),
    ] = False,
    prompt_format: options.PromptStyle = None,
    preamble: options.Preamble = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Find the edit of the largest gain within a damage budget, and test it once.

    The demonstrations are split by prompt into three parts: to fit, to compare and to test. A scan ranks every method
    at every layer, site and token choice; the best are measured at the strength that uses the damage budget; the
    winner is tested on the third part and on other neutral text, with controls. The output folder contains scan.csv,
    figures/layer_map.png, the edit and its evaluation.
    """
    require_extra("eval", "lm_eval", "datasets", "matplotlib", "yaml")
    quiet_harness()
    from sealign.cli.display import print_json, track
    from sealign.evaluation.search import EVALUATION_NAME, SCAN_NAME
    from sealign.evaluation.tuning import FIGURES_NAME, check_outputs
    from sealign.evaluation.tuning import tune as run
    from sealign.evaluation.tuning_config import TuneConfig
    from sealign.figures.evaluation_figures import LAYER_MAP_NAME, layer_map_figure
    from sealign.figures.report import write_report
    from sealign.figures.style import save_figure
    from sealign.models.prompt_format import prompt_format_of

    check_outputs(output_folder, overwrite=overwrite)
    say_replaced(output_folder / SCAN_NAME)

    option_values.check_limit(limit, tasks)
    searched = {"methods": methods, "sites": sites, "tokens": tokens}
    chosen: dict[str, Any] = {name: option_values.names(text) for name, text in searched.items() if text is not None}
    config = TuneConfig(
        **chosen,
        tasks=option_values.names(tasks),
        data_dir=data_dir if option_values.names(tasks) else None,
        limit=limit,
        layers=layers or "all",
        finalists=finalists,
        max_damage=max_damage,
        max_domain_damage=max_domain_damage,
        max_minutes=max_minutes,
        holdout=holdout,
        deployable=deployable,
        prompt_format=prompt_format_of({}, prompt_format, preamble),
        seed=seed,
    )
    used = option_values.load_sources(demonstrations, data_dir, demonstrations_limit, seed, columns, tasks=tasks)
    loaded, tokenizer = model.load()
    messages.say(f"{len(used)} demonstrations are split by prompt into three parts: to fit, to compare and to test.")
    result = run(
        loaded,
        tokenizer,
        used,
        config=config,
        output=output_folder,
        overwrite=overwrite,
        command=recorded_command(),
        track=_say_stages(track),
    )
    winner = result.winner.scanned if result.winner is not None else None
    save_figure(layer_map_figure(result.scanned, winner), output_folder / FIGURES_NAME / LAYER_MAP_NAME)
    if result.results is not None and result.report is not None:
        write_report(result.results, [result.report], output_folder / EVALUATION_NAME, max_damage=max_damage)
        say_cards(result.results, [result.report])
    if json:
        print_json(_as_data(result))
    else:
        _show(result, output_folder)


def _say_stages(track: Track) -> Track:
    """Return a function that shows progress, and says what a stage of the search does when it begins."""
    said: set[str] = set()

    def say_and_track(items: Iterable[Any], what: str, how_many: int) -> Iterable[Any]:
        for name in STAGES.keys() - said:
            if what.startswith(name):
                said.add(name)
                messages.say(STAGES[name])
        return track(items, what, how_many)

    return say_and_track


def _as_data(result: TuneResult) -> dict[str, Any]:
    from sealign.cli.evaluation_display import reports_as_data

    found = None
    if result.results is not None and result.report is not None:
        found = reports_as_data(result.results, [result.report])
    return {
        "scan": [_candidate_data(each) for each in result.scanned],
        "finalists": [_finalist_data(each) for each in result.finalists],
        "left_out": list(result.left_out),
        "winner": None if result.winner is None else _finalist_data(result.winner),
        "evaluation": found,
    }


def _candidate_data(scanned: ScannedCandidate) -> dict[str, Any]:
    return {
        "config": {"method": scanned.candidate.method, **scanned.candidate.config.dump()},
        "gain": scanned.gain,
        "gain_error": scanned.gain_error,
        "curvature_neutral": scanned.neutral,
        "curvature_domain": scanned.domain,
        "loss_slope": scanned.loss,
        "efficiency": scanned.efficiency,
    }


def _finalist_data(finalist: Finalist) -> dict[str, Any]:
    domain = finalist.domain
    return {
        **_candidate_data(finalist.scanned),
        "strength": finalist.strength,
        "gain_at_budget": finalist.gain_at_budget,
        "development_gain": finalist.gain,
        "development_gain_error": finalist.gain_error if len(finalist.gains) > 1 else None,
        "divergence_neutral": finalist.neutral.mean_divergence,
        "divergence_domain": None if domain is None else domain.mean_divergence,
    }


def _show(result: TuneResult, folder: Path) -> None:
    from sealign.cli.evaluation_display import print_evaluation

    output.print(_scan_table(result.scanned))
    if result.left_out:
        layers = ", ".join(map(str, result.left_out))
        output.print(f"The time limit left these layers out of the scan: {layers}.")
    output.print(_finalists_table(result.finalists))
    if result.results is None or result.report is None or result.winner is None:
        output.print("[bold]No candidate has a gain on the development part within the budget, so none was tested.[/]")
        output.print(f"Wrote {folder}/scan.csv and figures/layer_map.png.", markup=False)
        return
    output.print(f"\nWinner: {result.winner.scanned.candidate.describe()}. On what the search did not use:\n")
    print_evaluation(result.results, [result.report])
    output.print(f"Wrote {folder}/edit, evaluation/report.html, scan.csv and figures/layer_map.png.", markup=False)


def _scan_table(scanned: list[ScannedCandidate]) -> Table:
    from sealign.cli.evaluation_display import plain_table

    table = plain_table(f"The most efficient of {len(scanned)} candidates: gain / sqrt(2 KL)", "candidate")
    for name in ("efficiency", "at least"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in scanned[:SHOWN_CANDIDATES]:
        table.add_row(escape(each.candidate.describe()), f"{each.efficiency:+.3f}", f"{each.efficiency_bound:+.3f}")
    table.caption = "at least: lower end of the one-sided 95 % interval over the development demonstrations."
    table.caption_justify = "left"
    return table


def _finalists_table(finalists: list[Finalist]) -> Table:
    from sealign.cli.evaluation_display import plain_table

    table = plain_table("Finalists on the development part", "candidate")
    for name in ("strength", "gain", "error", "KL neutral", "KL answers", "at budget"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in finalists:
        domain = each.domain
        table.add_row(
            escape(each.scanned.candidate.describe()),
            f"{each.strength:.3g}",
            f"{each.gain:+.3f}",
            "" if len(each.gains) < 2 else f"{each.gain_error:.3f}",
            f"{each.neutral.mean_divergence:.4f}",
            "" if domain is None else f"{domain.mean_divergence:.4f}",
            f"{each.gain_at_budget:+.3f}",
        )
    return table
