"""``sealign serve``: the server of vLLM, in which each request can select an edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sealign.cli import options
from sealign.cli.app import app
from sealign.cli.consoles import messages


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: options.Model = None,
    edit: Annotated[
        list[str] | None,
        typer.Option(
            "--edit",
            metavar="NAME=EDIT",
            help=f"{options.SINGLE_EDIT_HELP} Requests select the edit by NAME. Repeat the option for several edits.",
        ),
    ] = None,
    edits_dir: Annotated[
        Path | None,
        options.with_note(options.EDITS_DIR, "an administrator loads them by name."),
    ] = None,
    max_edits: Annotated[
        int,
        typer.Option(
            "--max-edits",
            min=1,
            metavar="N",
            help="Maximum number of LoRAs, and also of other edits, that can be loaded at the same time.",
        ),
    ] = 4,
    no_lora: Annotated[
        bool,
        typer.Option(
            "--no-lora",
            help="Apply edits that are exactly LoRAs with the plug-in, like all other edits, instead of with vLLM's "
            "LoRA code. This is faster on a CPU.",
        ),
    ] = False,
    untested_vllm: Annotated[
        bool,
        typer.Option("--untested-vllm", help="Accept a version of vLLM that edits were not tested with."),
    ] = False,
) -> None:
    """Serve a model with vLLM; each request can select an edit.

    A request selects an edit with "model": NAME, or with "vllm_xargs": {"sealign_edit": NAME}. Options that are not
    listed here are passed to vllm serve, for example --port 8000.

    When the server starts, each edit is compared with the hooks on one prompt, if the base model fits in memory, else
    with the base model. A server that does nothing or something else for an edit does not start.

    To list, load and unload edits while the server runs, set SEALIGN_ADMIN_TOKEN in the server's environment.
    """
    from sealign.serving.launch import canary_variables, require_vllm, server_command, start_server

    require_vllm(untested=untested_vllm)
    with messages.status("Reading the edits"):
        command, variables = server_command(
            model,
            parse_named_edits(edit or []),
            edits_dir=edits_dir,
            max_edits=max_edits,
            loras=not no_lora,
            arguments=context.args,
        )
    with messages.status("Computing what the edits should answer"):
        expected = canary_variables(command, variables)
    messages.say("Starting vLLM")
    start_server(command, variables | expected)


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
