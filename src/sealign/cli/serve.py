"""``sealign serve``: vLLM's own server with edits for each request."""

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
            help="An edit and the name by which requests ask for it. Give it several times for several.",
        ),
    ] = None,
    edits_dir: Annotated[
        Path | None,
        typer.Option(
            "--edits-dir",
            metavar="DIR",
            help="Folder of edits that an administrator may load while the server runs, each by its folder's name.",
        ),
    ] = None,
    max_edits: Annotated[
        int,
        typer.Option("--max-edits", min=1, metavar="N", help="Edits of each route that can be loaded at once."),
    ] = 4,
    lora: Annotated[
        bool,
        typer.Option(
            "--lora/--no-lora",
            help="Serve edits that are exactly LoRAs as LoRAs; without, like all others, which is faster on a CPU.",
        ),
    ] = True,
) -> None:
    """Serve a model with vLLM, and edits that each request chooses for itself.

    Edits that are served as LoRAs are models of their own: "model": NAME. Every edit can be named in a request as
    "vllm_xargs": {"sealign_edit": NAME}. Options that are not listed here go to vllm serve, such as --port 8000.

    To list, load and unload edits while it runs, set SEALIGN_ADMIN_TOKEN in its environment.
    """
    import os
    import sys

    from sealign.serving.launch import require_vllm, server_command

    require_vllm()
    with messages.status("Reading the edits"):
        command, environment = server_command(
            model, named_edits(edit or []), edits_dir, max_edits=max_edits, loras=lora, arguments=context.args
        )
    messages.print("Starting vLLM", style="dim")
    os.execve(sys.executable, [sys.executable, *command], os.environ | environment)


def named_edits(given: list[str]) -> dict[str, str]:
    """Return places by name."""
    from sealign.errors import SettingError
    from sealign.serving.settings import check_name

    named: dict[str, str] = {}
    for text in given:
        name, equals, place = text.partition("=")
        if not equals or not place:
            raise SettingError(f"--edit {text} has no name; write --edit NAME={text}")
        if check_name(name) in named:
            raise SettingError(f"two edits have the name '{name}'; give each its own")
        named[name] = place
    return named
