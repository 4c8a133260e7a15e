"""The application that commands register with, and how it reports errors."""

from __future__ import annotations

import errno
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from sealign import __version__
from sealign.errors import SealignError

ERROR_EXIT_CODE = 2

output = Console(highlight=False)
"""Where results go."""

messages = Console(stderr=True, highlight=False)
"""Where progress and errors go."""


class _Group(TyperGroup):
    """Turns the errors that a user can cause into one sentence and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SealignError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            _fail("interrupted; nothing was written, and finished batches are kept: run the same command to go on")
        except MemoryError:
            _fail("out of memory; lower --batch-size, or use --dtype bfloat16")
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            reason = error.strerror or str(error)
            place = f" '{error.filename}'" if error.filename else ""
            _fail(f"cannot read or write{place}: {reason.lower()}; nothing was half-written")


def _fail(sentence: str) -> None:
    messages.print(f"[bold red]error:[/] {_escape(sentence)}", soft_wrap=True)
    raise typer.Exit(ERROR_EXIT_CODE)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        output.print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Make a language model more truthful or less biased, without training it.

    [bold]Start here:[/]

        sealign demo                    see the whole method on the embedded model

    [bold]With your own model:[/]

        sealign fit --model MODEL --demonstrations FILE.jsonl --output EDIT

        sealign inspect --edit EDIT

        sealign generate --edit EDIT --prompt "What happens if you swallow gum?"

        sealign chat --edit EDIT

    A demonstration is a prompt with a positive (wanted) and a negative (unwanted) completion, one JSON object a line:
    {"prompt": ..., "positive": ..., "negative": ...}. MODEL is a Hub id, a folder, a GGUF file, or smollm2.
    """
