"""``sealign verify``: check that deployments of an edit equal the hooks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from sealign.cli import options
from sealign.cli.app import app, require_extra
from sealign.cli.consoles import messages, output
from sealign.cli.loading import ModelOptions, load_edit, with_model_options

if TYPE_CHECKING:
    from sealign.export.verify import Agreement, Outputs

_EXTRAS = {"lora": ("peft", "peft"), "gguf": ("llama", "llama_cpp", "gguf"), "vllm": ("serve", "openai")}
"""By kind of deployment, the extra that ``verify`` needs and its modules."""


@app.command()
@with_model_options(options.EditedModel, dtype="float32")
def verify(
    edit: options.Edit,
    against: Annotated[
        list[str],
        typer.Option(
            "--against",
            metavar="KIND=PLACE",
            help="Deployment to check: lora=DIR, merged=DIR, gguf=FILE, or vllm=URL#NAME for edit NAME of a server. "
            "Repeat the option for several deployments.",
        ),
    ],
    model: ModelOptions,
    base: options.GgufBase = None,
    strength: options.Strength = None,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance", min=0, metavar="X", help="Maximum accepted difference of a log-probability, in nats."
        ),
    ] = 1e-3,
    max_new_tokens: options.MaxNewTokens = 16,
    ignore_mismatch: options.IgnoreMismatch = False,
    json: options.Json = False,
) -> None:
    """Run the same prompts through hooks and through deployments of an edit, and compare the log-probabilities.

    The exit code is 1 if a deployment differs from the hooks or does not apply the edit.
    """
    from sealign.cli.display import print_json
    from sealign.errors import SettingError
    from sealign.export.deployments import parse_deployment
    from sealign.export.verify import compare_outputs, reference_outputs

    loaded = load_edit(edit, strength)
    deployments = {text: parse_deployment(text) for text in against}
    if base is not None and not any(deployment.kind == "gguf" for deployment in deployments.values()):
        raise SettingError(f"--base is '{base}', but it is the base of gguf deployments only; leave it out")
    for deployment in deployments.values():
        if deployment.kind in _EXTRAS:
            require_extra(*_EXTRAS[deployment.kind])
    model = model.or_base_of(loaded)
    name = model.name or loaded.base_model.id
    built, tokenizer = model.load()
    with messages.status("Running the hooks"):
        plain, edited = reference_outputs(
            built, tokenizer, loaded, max_new_tokens=max_new_tokens, ignore_mismatch=ignore_mismatch
        )
    found = []
    for text, deployment in deployments.items():
        with messages.status(f"Running {text}"):
            deployed = _outputs(deployment, tokenizer, name, base, model, max_new_tokens)
        found.append(compare_outputs(text, plain, edited, deployed, tolerance=tolerance))
    if json:
        print_json(
            [dataclasses.asdict(a) | {"has_effect": a.has_effect, "fired": a.fired, "passed": a.passed} for a in found]
        )
    else:
        _show(found)
    if not all(agreement.has_effect for agreement in found):
        messages.print(
            f"[yellow]note:[/] the edit has next to no effect on these prompts: {found[0].effect:.1e} nats on average, "
            f"within the tolerance of {tolerance:g}, so that a deployment without it would look much the same; check "
            "the edit, or verify at a larger --strength",
            soft_wrap=True,
        )
    if not all(agreement.passed for agreement in found):
        raise typer.Exit(1)


def _outputs(
    deployment: Any, tokenizer: Any, name: str, base: Path | None, model: ModelOptions, max_new_tokens: int
) -> Outputs:
    """Return the outputs of an exported or a served edit."""
    from sealign.export.deployments import export_outputs
    from sealign.serving.client import server_outputs

    if deployment.kind == "vllm":
        return server_outputs(deployment.place, deployment.edit_name, tokenizer, max_new_tokens=max_new_tokens)
    loading = model.arguments()
    return export_outputs(deployment, tokenizer, name, base=base, loading=loading, max_new_tokens=max_new_tokens)


def _show(found: list[Agreement]) -> None:
    from sealign.cli.evaluation_display import plain_table

    table = plain_table("Deployments against hooks: log-probabilities of the prompts, in nats", "deployment")
    for name in ("largest", "mean", "effect", "applied", "same tokens", "verdict"):
        table.add_column(name, justify="right", no_wrap=True)
    for a in found:
        verdict = "[green]equal[/]" if a.passed else "[red]differs[/]" if a.fired else "[red]does not edit[/]"
        figures = (f"{a.largest:.1e}", f"{a.mean:.1e}", f"{a.effect:.1e}", f"{a.applied:.1%}", f"{a.same_tokens:.0%}")
        table.add_row(escape(a.name), *figures, verdict)
    table.caption = (
        "effect: mean change due to the edit; applied: fraction of it in the deployment, which must be above one half."
    )
    table.caption_justify = "left"
    output.print(table)
