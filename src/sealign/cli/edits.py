"""``sealign edits``: find edits on the Hugging Face Hub, download them, and publish your own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from sealign.cli import options
from sealign.cli.app import Commands, add_group
from sealign.cli.consoles import messages, output

edits: Commands = add_group("edits", "Find, download or publish edits on the Hugging Face Hub.")

Repository = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub.", show_default=False)]


@edits.command()
def search(
    query: Annotated[
        str, typer.Argument(metavar="[TEXT]", help="Part of the name of a repository. [default: all edits]")
    ] = "",
    base: Annotated[
        str | None,
        typer.Option("--base-model", metavar="OWNER/NAME", help="Base model of the edits. [default: any]"),
    ] = None,
    json: options.Json = False,
) -> None:
    """List edits on the Hub, the 20 most downloaded first, with the verdict and the damage that their cards state.

    A card says what its owner says: evaluate an edit on your own demonstrations before you rely on it.
    """
    from sealign.cli.display import print_json
    from sealign.edits.gallery import search_edits

    found = search_edits(query, base_model=base)
    if json:
        print_json([dataclasses.asdict(each) for each in found])
        return
    table = Table()
    for name in ("edit", "base model", "method", "verdict", "loss on neutral text", "downloads"):
        justify: Any = "right" if name in ("loss on neutral text", "downloads") else "left"
        table.add_column(name, justify=justify, overflow="fold")
    for each in found:
        loss = "" if each.loss_increase is None else f"{each.loss_increase:+.3f}"
        shown = (each.repo_id, each.base_model or "", each.method or "", each.verdict or "not evaluated")
        table.add_row(*map(escape, shown), loss, str(each.downloads))
    output.print(table)


@edits.command()
def pull(
    repository: Repository,
    output_folder: options.Output,
    overwrite: options.Overwrite = False,
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision",
            metavar="REVISION",
            help=r"Branch, tag or commit on the Hub. \[default: main]",
            show_default=False,
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Download an edit, and show what its card says of its effect.

    Nothing but the record, the tensors and the card is downloaded, and no code runs.
    """
    from rich.markdown import Markdown

    from sealign.cli.display import print_json
    from sealign.cli.outputs import check_output_folder
    from sealign.edits.gallery import pull_edit
    from sealign.edits.model_card import shown_effect
    from sealign.edits.record import CARD_NAME, RECORD_NAME

    check_output_folder(output_folder, mark=RECORD_NAME, overwrite=overwrite)
    record = pull_edit(repository, output_folder, revision=revision, overwrite=overwrite)
    card = output_folder / CARD_NAME
    effect = shown_effect(card.read_text(encoding="utf-8")) if card.is_file() else ""
    if json:
        print_json({"edit": dataclasses.asdict(record), "effect": effect, "saved": str(output_folder)})
        return
    output.print(f"An edit of {escape(record.model.id)} by the method {record.method}. Its card says:\n")
    output.print(Markdown(effect or "Nothing of its effect."))
    output.print(f"\nSaved to {escape(str(output_folder))}. Measure what it does for you with:\n", soft_wrap=True)
    output.print(
        f"sealign evaluate --edit {escape(str(output_folder))} --demonstrations SOURCE --output RESULTS", soft_wrap=True
    )


@edits.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the edit.", show_default=False)],
    repository: Repository,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    json: options.Json = False,
) -> None:
    """Upload an edit with its card, which shows the effect if sealign evaluate has measured it.

    The repository is created if it does not exist. Log in with hf auth login, or set HF_TOKEN.
    """
    from sealign.cli.display import print_json
    from sealign.edits.gallery import push_edit
    from sealign.edits.model_card import NOT_EVALUATED, shown_effect
    from sealign.edits.record import CARD_NAME

    card = folder / CARD_NAME
    if not card.is_file() or shown_effect(card.read_text(encoding="utf-8")) == NOT_EVALUATED:
        messages.print(
            "[yellow]note:[/] the card does not show what the edit gains and costs; run sealign evaluate first.",
            soft_wrap=True,
        )
    url = push_edit(folder, repository, private=private)
    print_json({"url": url}) if json else output.print(url, markup=False, soft_wrap=True)
