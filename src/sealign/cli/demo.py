"""``sealign demo``: the whole method on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from sealign.cli import options
from sealign.cli.app import app, messages, output

if TYPE_CHECKING:
    from sealign.reproduce.embedded_demo import DemoResult


@app.command()
def demo(
    model: options.Model = None,
    output_folder: options.Output = Path("edits/truthfulness"),
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength", metavar="X", help=r"How far the edit goes: 0 is none, 1 the whole. \[default: 0.25]"
        ),
    ] = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """See the method on the embedded model: fit, answers, scores, damage, in under three minutes.

    Nothing is downloaded: model, demonstrations, questions and neutral text come with the packages.
    """
    import dataclasses

    from sealign.cli.display import print_json, track
    from sealign.edits.record import RECORD_NAME
    from sealign.files import check_folder
    from sealign.models.embedded_model import EMBEDDED
    from sealign.models.loading import load_model
    from sealign.reproduce.embedded_demo import DEMO_CONFIG, run_demo

    config = DEMO_CONFIG if strength is None else dataclasses.replace(DEMO_CONFIG, strength=strength)
    check_folder(output_folder, replaces=RECORD_NAME)
    with messages.status(f"Loading {model or EMBEDDED} (the embedded model is converted once, half a minute)"):
        loaded, tokenizer = load_model(model or EMBEDDED, dtype=dtype, device=device)
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
    table = Table(title="Damage: mean loss on neutral text, nats a token", title_justify="left")
    for name in ("model", "loss", "difference", "KL from base"):
        table.add_column(name, justify="left" if name == "model" else "right")
    table.add_row("base", f"{result.damage.base_loss:.3f}", "", "")
    for name, damage in (("edited", result.damage), ("random directions", result.random_damage)):
        table.add_row(
            name, f"{damage.edited_loss:.3f}", f"{damage.loss_increase:+.3f}", f"{damage.mean_divergence:.4f}"
        )
    return table
