"""``sealign demo``: SEA on the embedded model, from fit to verdict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.markup import escape
from rich.table import Table

from sealign.cli import options
from sealign.cli.app import app, output
from sealign.cli.loading import ModelOptions, with_default, with_model_options

if TYPE_CHECKING:
    from sealign.reproduce.embedded_demo import DemoResult

Strength = Annotated[float | None, with_default(options.EditStrength, "0.25")]


@app.command()
@with_model_options()
def demo(
    model: ModelOptions,
    output_folder: options.Output = Path("edits/truthfulness"),
    strength: Strength = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Fit and evaluate an edit of the embedded model in under three minutes: fit, answers, scores and damage.

    Nothing is downloaded: the model, the demonstrations, the questions and the neutral text come with the packages. The
    edit is saved.
    """
    from sealign.cli.display import print_json, track
    from sealign.edits.record import RECORD_NAME
    from sealign.files import check_folder
    from sealign.reproduce.embedded_demo import DEMO_CONFIG, run_demo

    config = DEMO_CONFIG if strength is None else DEMO_CONFIG.replace(strength=strength)
    check_folder(output_folder, replaces=RECORD_NAME)
    loaded, tokenizer = model.load()
    result = run_demo(loaded, tokenizer, config=config, seed=seed, track=track)
    result.edit.save_pretrained(output_folder)
    if json:
        print_json(_as_data(result, output_folder))
    else:
        _show(result, output_folder)


def _as_data(result: DemoResult, folder: Path) -> dict[str, Any]:
    import dataclasses

    return {
        "edit": dataclasses.asdict(result.edit.record),
        "answers": [dataclasses.asdict(answer) for answer in result.answers],
        "scores": {
            f"{arm} {effect.name}": dataclasses.asdict(getattr(effect, arm))
            for effect in result.effects
            for arm in ("edited", "random", "over_random")
        },
        "damage": {
            "base_loss": result.damage.base_loss,
            "edited_loss": result.damage.edited_loss,
            "random_loss": result.random_damage.edited_loss,
            "edited_divergence": result.damage.mean_divergence,
            "random_divergence": result.random_damage.mean_divergence,
        },
        "verdict": result.verdict,
        "saved": str(folder),
    }


def _show(result: DemoResult, folder: Path) -> None:
    from sealign.cli.display import answers_table, layer_table, print_saved

    record = result.edit.record
    output.print(layer_table(record))
    prompts, base, edited = zip(*((a.prompt, a.base, a.edited) for a in result.answers), strict=True)
    output.print(answers_table(prompts, base, edited))
    output.print(_score_table(result), _damage_table(result))
    output.print(f"[bold]{escape(result.verdict)}[/]\n")
    print_saved(record, folder)


def _score_table(result: DemoResult) -> Table:
    title = f"{result.questions} held-out questions: difference from base, with a paired 95 % interval"
    table = Table(title=title, title_justify="left")
    for name in ("metric", "model", "score", "difference", "95 % interval"):
        table.add_column(name, justify="left" if name in ("metric", "model") else "right")
    for effect in result.effects:
        table.add_row(effect.name, "base", f"{effect.edited.base:.3f}", "", "")
        for d, name in ((effect.edited, "edited"), (effect.random, "random, mean of 3 draws")):
            assert d is not None
            interval = escape(f"[{d.low:+.3f}, {d.high:+.3f}]")
            last = d is effect.random
            table.add_row("", name, f"{d.edited:.3f}", f"{d.difference:+.3f}", interval, end_section=last)
    return table


def _damage_table(result: DemoResult) -> Table:
    table = Table(title="Damage: mean loss on neutral text, nats per token", title_justify="left")
    for name in ("model", "loss", "difference", "KL from base"):
        table.add_column(name, justify="left" if name == "model" else "right")
    table.add_row("base", f"{result.damage.base_loss:.3f}", "", "")
    for name, damage in (("edited", result.damage), ("random directions", result.random_damage)):
        table.add_row(
            name, f"{damage.edited_loss:.3f}", f"{damage.loss_increase:+.3f}", f"{damage.mean_divergence:.4f}"
        )
    return table
