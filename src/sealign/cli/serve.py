"""``sealign serve``: vLLM's own server with an edit for each request."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sealign.cli import options
from sealign.cli.app import app, messages


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: options.Model = None,
    edit: Annotated[
        list[str] | None,
        typer.Option(
            "--edit",
            metavar="NAME=EDIT",
            help="Folder of an edit, or its repository on the Hub as owner/name. NAME is its name in requests. Repeat "
            "the option for several edits.",
        ),
    ] = None,
    edits_dir: Annotated[
        Path | None,
        typer.Option(
            "--edits-dir",
            metavar="DIR",
            help="Folder of edits that an administrator may load while the server runs, by the name of the subfolder.",
        ),
    ] = None,
    max_edits: Annotated[
        int,
        typer.Option(
            "--max-edits",
            min=1,
            metavar="N",
            help="Number of LoRAs, and number of other edits, that can be loaded at once.",
        ),
    ] = 4,
    no_lora: Annotated[
        bool,
        typer.Option(
            "--no-lora",
            help="Serve edits that are exactly LoRAs by the plug-in, like all others, instead of by vLLM's own LoRA "
            "code; this is faster on a CPU.",
        ),
    ] = False,
) -> None:
    """Serve a model with vLLM, and edits that each request chooses for itself.

    A request names an edit as "vllm_xargs": {"sealign_edit": NAME}. An edit that is served as a LoRA can also be named
    as "model": NAME. Options that are not listed here are passed to vllm serve, for example --port 8000.

    To list, load and unload edits while the server runs, set the variable SEALIGN_ADMIN_TOKEN in its environment.
    """
    from sealign.serving.launch import require_vllm, server_command, start_server

    require_vllm()
    with messages.status("Reading the edits"):
        command, variables = server_command(
            model,
            parse_named_edits(edit or []),
            edits_dir=edits_dir,
            max_edits=max_edits,
            loras=not no_lora,
            arguments=context.args,
        )
    messages.print("Starting vLLM", style="dim")
    start_server(command, variables)


def parse_named_edits(texts: list[str]) -> dict[str, str]:
    """Return folders or repositories of edits by name.

    Args:
        texts: Values of ``--edit``, such as ``mild=edits/mild``.

    Raises:
        SettingError: A text has no name or no edit, or two have one name.
        ServingError: A name is not valid.
    """
    from sealign.errors import SettingError
    from sealign.serving.settings import check_name

    named: dict[str, str] = {}
    for text in texts:
        name, equals, place = text.partition("=")
        if not equals or not place:
            raise SettingError(f"--edit {text} has no name; write --edit NAME={text}")
        if check_name(name) in named:
            raise SettingError(f"two edits have the name '{name}'; choose a different name for each")
        named[name] = place
    return named
