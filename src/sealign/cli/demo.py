"""``sealign demo``: edits of the embedded model, from fit to verdict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from sealign.cli import option_values, options
from sealign.cli.app import app
from sealign.cli.consoles import output
from sealign.cli.loading import ModelOptions, say_strength, with_default, with_model_options

if TYPE_CHECKING:
    from sealign.evaluation.verdict import Effect
    from sealign.reproduce.embedded_demo import BehaviourResult

Behaviours = Annotated[
    str | None,
    typer.Option(
        "--behaviours",
        metavar="NAME,NAME,...",
        help="Behaviours to run; names of bundled ones.",
        show_default="positivity,truthfulness; with --quick, positivity",
    ),
]
Strength = Annotated[float | None, with_default(options.EditStrength, "the largest within the damage budget")]


@app.command()
@with_model_options()
def demo(
    model: ModelOptions,
    output_folder: options.Output = Path("edits"),
    overwrite: options.Overwrite = False,
    behaviours: Behaviours = None,
    strength: Strength = None,
    seed: options.Seed = 0,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Take every third pair and answer one prompt: the short version, within a minute."
        ),
    ] = False,
    json: options.Json = False,
) -> None:
    """Fit and measure an edit of the embedded model for each behaviour, in some minutes.

    Nothing is downloaded: the model, the demonstrations, the prompts and the neutral text come with the packages. Each
    edit is fitted on demonstrations of some topics and measured on those of others. The edits are saved in folders of
    the behaviours' names.
    """
    from sealign.cli.display import print_json, track
    from sealign.cli.outputs import check_output_folder
    from sealign.demonstrations.bundled import bundled_behaviours
    from sealign.edits.record import RECORD_NAME
    from sealign.edits.strength import check_strength
    from sealign.errors import check_choice
    from sealign.reproduce.embedded_demo import DEMO_BEHAVIOURS, run_demo

    by_default = DEMO_BEHAVIOURS[:1] if quick else DEMO_BEHAVIOURS
    names = list(by_default) if behaviours is None else option_values.names(behaviours)
    for name in names:
        check_choice("behaviour", name, bundled_behaviours())
        check_output_folder(output_folder / name, mark=RECORD_NAME, overwrite=overwrite)
    if strength is not None:
        check_strength(strength)
    loaded, tokenizer = model.load()
    results = []
    for name in names:
        result = run_demo(loaded, tokenizer, name, strength=strength, seed=seed, quick=quick, track=track)
        result.edit.save_pretrained(output_folder / name, overwrite=overwrite)
        results.append(result)
        if strength is not None:
            say_strength(result.edit, strength)
        if not json:
            _show(result)
    if json:
        print_json({result.behaviour: _as_data(result, output_folder / result.behaviour) for result in results})
        return
    for result in results:
        output.print(f"[bold]{result.behaviour}[/]: {escape(result.verdict.sentence)}")
    if results:
        _next_steps(results[0], output_folder)


def _as_data(result: BehaviourResult, folder: Path) -> dict[str, Any]:
    import dataclasses

    return {
        "edit": dataclasses.asdict(result.edit.record),
        "answers": [dataclasses.asdict(answer) for answer in result.answers],
        "quick": result.quick,
        "held_out": result.held_out,
        "effects": [dataclasses.asdict(effect) for effect in result.effects],
        "loss_increase": {arm: damage.loss_increase for arm, damage in result.damage.items()},
        "divergence": {arm: damage.mean_divergence for arm, damage in result.damage.items()},
        "domain_divergence": {arm: damage.mean_divergence for arm, damage in result.domain_damage.items()},
        "verdict": dataclasses.asdict(result.verdict),
        "saved": str(folder),
    }


def _show(result: BehaviourResult) -> None:
    from sealign.cli.display import answers_table

    output.print(f"\n[bold]{result.behaviour}[/]: {escape(repr(result.edit))}\n")
    prompts, base, edited = zip(*((a.prompt, a.base, a.edited) for a in result.answers), strict=True)
    output.print(answers_table(prompts, base, edited))
    output.print(_score_table(result), _damage_table(result))
    if result.quick:
        pairs = f"{len(result.edit.record.fitted_on)} pairs to fit on and {result.held_out} to measure"
        output.print(f"Short version with {pairs}; without --quick there are three times as many, and as many texts.")


def _score_table(result: BehaviourResult) -> Table:
    title = f"{result.held_out} held-out demonstrations: difference from base, with a paired 95 % interval"
    table = Table(title=title, title_justify="left")
    for name in ("metric", "model", "score", "difference", "95 % interval"):
        table.add_column(name, justify="left" if name in ("metric", "model") else "right")
    for effect in result.effects:
        table.add_row(effect.name.removeprefix("preference_"), "base", f"{effect.edited.base:.3f}", "", "")
        _add_arms(table, effect)
    return table


def _add_arms(table: Table, effect: Effect) -> None:
    arms = {"edited": effect.edited, "random, mean of 3 draws": effect.random, "reversed": effect.reversed}
    for name, d in arms.items():
        assert d is not None
        interval = escape(f"[{d.low:+.3f}, {d.high:+.3f}]")
        last = d is effect.reversed
        table.add_row("", name, f"{d.edited:.3f}", f"{d.difference:+.3f}", interval, end_section=last)


def _damage_table(result: BehaviourResult) -> Table:
    table = Table(title="Damage, nats per token", title_justify="left")
    for name in ("model", "loss on neutral text", "KL on neutral text", "KL on own answers"):
        table.add_column(name, justify="left" if name == "model" else "right")
    table.add_row("base", f"{result.damage['edited'].base_loss:.3f}", "", "")
    for name, damage in result.damage.items():
        domain = result.domain_damage.get(name)
        table.add_row(
            name,
            f"{damage.edited_loss:.3f} ({damage.loss_increase:+.3f})",
            f"{damage.mean_divergence:.4f}",
            "" if domain is None else f"{domain.mean_divergence:.4f}",
        )
    return table


def _next_steps(result: BehaviourResult, folder: Path) -> None:
    from sealign.cli.display import print_saved

    print_saved(result.edit.record, folder / result.behaviour)
