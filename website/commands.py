"""Prints the reference of the command line as Markdown, from the application itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import typer
from rich.markup import escape
from rich.text import Text

from sealign.cli.app import PANELS, app
from sealign.methods.registry import METHODS

BEGINNING = """# Commands

Every command with its options, as `sealign COMMAND --help` prints them."""


def commands_page() -> str:
    """Return the page: each command in the order of the help text, ``fit`` with the settings of every method."""
    root: Any = typer.main.get_command(app)
    blocks = [BEGINNING]
    for panel, names in PANELS.items():
        blocks.append(f"## {panel}")
        for name in names:
            blocks += _command(root.commands[name], ["sealign", name])
            if name == "fit":
                blocks += _settings(root.commands[name])
    return "\n\n".join(blocks) + "\n"


def _command(command: Any, words: list[str]) -> Iterator[str]:
    title = " ".join(words)
    yield f"{'#' * (len(words) + 1)} {title}"
    yield _markdown(command.help)
    inner = getattr(command, "commands", {})
    if not inner:
        context = command.make_context(title, [], resilient_parsing=True)
        yield f"```text\n{' '.join([title, *command.collect_usage_pieces(context)])}\n```"
        yield from _options(context.command.params, context, lambda panel: not panel.startswith("Settings of"))
    for name, subcommand in inner.items():
        yield from _command(subcommand, [*words, name])


def _settings(fit: Any) -> Iterator[str]:
    for method in METHODS:
        context = fit.make_context("fit", ["--method", method], resilient_parsing=True)
        yield f"#### Settings of {method}"
        yield from _options(context.command.params, context, lambda panel: panel.startswith("Settings of"))


def _options(params: Iterable[Any], context: Any, wanted: Any) -> Iterator[str]:
    for param in params:
        record = param.get_help_record(context)
        if record and wanted(getattr(param, "rich_help_panel", None) or ""):
            default = escape(record[1].removeprefix(param.help))  # "[default: 0]" is text, but looks like markup
            yield f"`{record[0].partition(' <')[0]}`\n:   {_markdown(param.help + default)}"


def _markdown(text: str) -> str:
    """Return a help text without its markup, and with what Markdown would read as its own escaped."""
    paragraphs = Text.from_markup(text).plain.split("\n\n")
    return "\n\n".join(one if one.startswith(" ") else re.sub(r"([\\`*_<\[\]{}|])", r"\\\1", one) for one in paragraphs)


if __name__ == "__main__":
    print(commands_page(), end="")
