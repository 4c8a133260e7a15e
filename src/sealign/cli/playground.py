"""``sealign playground``: a local web page to try edits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from sealign.cli import options
from sealign.cli.app import app, quiet_harness, require_extra
from sealign.cli.consoles import messages, output
from sealign.cli.loading import MODEL_OPTIONS, ModelOptions, parse_names, with_model_options

if TYPE_CHECKING:
    from sealign.playground.playground import Playground
    from sealign.playground.served_playground import ServedPlayground


@app.command()
@with_model_options(options.EditedModel)
def playground(
    model: ModelOptions,
    edit: Annotated[
        list[str] | None,
        typer.Option(
            "--edit",
            metavar="[NAME=]EDIT",
            help=f"{options.EDIT_HELP} With --server, the name of an edit there. Each has a switch and a strength of "
            "its own on the page. Repeat the option for several edits.",
        ),
    ] = None,
    edits_dir: Annotated[
        Path | None,
        options.with_note(options.EDITS_DIR, "the page loads them by their path in it, and saves new ones there."),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            "--host",
            metavar="ADDRESS",
            help="Address to listen at. The page has no password: whoever reaches another address than the default can "
            "use the model.",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, metavar="N", help="Port to listen at; 0 takes a free one.")
    ] = 7860,
    server: Annotated[str | None, options.SERVER] = None,
    ignore_mismatch: options.IgnoreMismatch = False,
) -> None:
    """Try edits on a web page of this machine.

    The base model and the edited model answer side by side. Edits are switched on and off, their strengths changed, and
    each token of an answer shows what they did to it. Stop the playground with Ctrl+C.
    """
    require_extra("playground", "starlette", "uvicorn")
    from sealign.errors import SettingError
    from sealign.playground.web_server import open_socket, serve_page

    if edits_dir is not None and not edits_dir.is_dir():
        raise SettingError(f"there is no folder '{edits_dir}'; give --edits-dir the folder that holds the edits")
    if server is not None:
        _check_without_model(model, edits_dir, ignore_mismatch)
    with open_socket(host, port) as bound:
        if server is None:
            served: Playground | ServedPlayground = _load(model, _named_edits(edit or []), edits_dir, ignore_mismatch)
        else:
            served = _connect(server, edit or [])
        serve_page(served, bound, host=host, on_start=lambda address: output.print(f"Playground: {address}"))


def _load(model: ModelOptions, sources: dict[str, str], edits_dir: Path | None, ignore_mismatch: bool) -> Playground:
    """Load the model and the edits."""
    quiet_harness()  # which a search on the page uses
    from sealign.methods.registry import load_edit
    from sealign.models.embedded_model import EMBEDDED
    from sealign.playground.offered_edits import OfferedEdits
    from sealign.playground.playground import Playground

    loaded = {name: load_edit(source) for name, source in sources.items()}
    chosen = model.or_base_of(next(iter(loaded.values()), None))
    base, tokenizer = chosen.load()
    with messages.status("Checking the edits"):
        offered = OfferedEdits(base, tokenizer, loaded, folder=edits_dir, ignore_mismatch=ignore_mismatch)
    for one in offered.initial:
        for remark in one.remarks:
            messages.print(f"[yellow]warning:[/] {escape(f'{one.name}: {remark}')}", soft_wrap=True)
    return Playground(base, tokenizer, offered, name=chosen.name or EMBEDDED)


def _connect(server: str, names: list[str]) -> ServedPlayground:
    """Connect to a server."""
    require_extra("serve", "openai")
    from sealign.playground.served_playground import ServedPlayground

    with messages.status("Connecting to the server"):
        return ServedPlayground(server, names)


def _check_without_model(model: ModelOptions, edits_dir: Path | None, ignore_mismatch: bool) -> None:
    """Raise an error if an option would have no effect, because the server has loaded the model and the edits.

    Raises:
        SettingError: Such an option is given.
    """
    from sealign.errors import SettingError

    given = {"--edits-dir": edits_dir is not None, "--ignore-mismatch": ignore_mismatch}
    given["--model"] = model.name is not None
    for name, (_, default) in MODEL_OPTIONS.items():
        given[f"--{name.replace('_', '-')}"] = getattr(model, name) != default
    if used := [name for name, is_given in given.items() if is_given]:
        raise SettingError(
            f"{used[0]} has no effect with --server, which has loaded the model and the edits; leave it out"
        )


def _named_edits(given: list[str]) -> dict[str, str]:
    """Return single edits by name; those that a plus joins are named one by one.

    Args:
        given: Values of ``--edit``.
    """
    from sealign.methods.edit_sources import single_sources

    texts: list[str] = []
    for text in given:
        name, separator, source = text.partition("=")
        if not (separator and name and "/" not in name):
            texts += single_sources(text)
        elif len(parts := single_sources(source)) == 1:
            texts.append(text)
        else:
            texts += [f"{name}.{number}={part}" for number, part in enumerate(parts, start=1)]
    return parse_names(texts, "--edit")
