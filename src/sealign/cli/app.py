"""The application that commands register with, and how it reports errors."""

from __future__ import annotations

import errno
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from sealign import __version__
from sealign.cli.consoles import messages, output, print_log, show_warning
from sealign.errors import SealignError, SettingError
from sealign.spellings import respelled

ERROR_EXIT_CODE = 2

CommandFunction = TypeVar("CommandFunction", bound=Callable[..., Any])

_RESUMABLE = ("fit", "evaluate", "reproduce", "tune")
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

PANELS: dict[str, tuple[str, ...]] = {
    "Start here": ("demo",),
    "Make an edit": ("fit", "tune", "inspect"),
    "Try it and measure it": ("generate", "chat", "playground", "evaluate", "compare", "plot"),
    "Deploy it": ("export", "verify", "serve", "edits"),
    "The paper": ("reproduce",),
    "Housekeeping": ("cache",),
}
"""The commands in the order in which they are used, by the panel of the help text."""

ORDER: tuple[str, ...] = tuple(name for names in PANELS.values() for name in names)
"""The commands in the order in which they are used."""


def _panel_of(command: str) -> str:
    """Return the title of the panel in which the help text lists a command."""
    return next(title for title, names in PANELS.items() if command in names)


class _PlainHelp:
    """Mixin of commands with plain help texts, whose options are found in British and American spelling.

    The help text has no type after a flag and no braces around an argument.
    """

    def get_params(self, ctx: Any) -> Any:
        found: Any = super().get_params(ctx)  # type: ignore[misc]
        for param in found:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return found

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = [flag for param in self.get_params(ctx) for flag in (*param.opts, *param.secondary_opts)]
        spelled = respelled(args, known)
        self._refuse_repeated(ctx, spelled)
        found: list[str] = super().parse_args(ctx, spelled)  # type: ignore[misc]
        return found

    def _refuse_repeated(self, ctx: Any, args: list[str]) -> None:
        """Raise an error for a list that is given as several options, of which only the last would be used."""
        try:
            given = self.make_parser(ctx).parse_args(args=list(args))[2]  # type: ignore[attr-defined]
        except Exception:  # which the parser itself will report
            return
        for param in dict.fromkeys(given):
            if ",..." in (param.metavar or "") and given.count(param) > 1:
                raise SettingError(
                    f"{param.opts[0]} is given {given.count(param)} times; give it once, with commas between the values"
                )

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]  # type: ignore[misc]


class PlainCommand(_PlainHelp, TyperCommand):
    """Command with a plain help text."""


class PlainGroup(_PlainHelp, TyperGroup):
    """Group of commands with a plain help text."""


class _Group(PlainGroup):
    """Group of commands that reports errors caused by the user in one sentence, with exit code 2."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands in the order in which they are used."""
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = show_warning
                # Of PEFT, about transformers.
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                return super().invoke(ctx)
        except SealignError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            kept = "; run the same command again to continue from the finished batches"
            _fail(f"interrupted; nothing was written{kept if ctx.invoked_subcommand in _RESUMABLE else ''}")
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            _fail("out of memory; use --dtype bfloat16 or a smaller --batch-size, or fewer or shorter texts")
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            _fail(_describe(error))


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether Python or torch ran out of memory; torch has no type of its own for the memory of the CPU."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def _describe(error: OSError) -> str:
    reason = (error.strerror or str(error)).lower()
    place = f" '{error.filename}'" if error.filename else ""
    if error.errno in _FULL_DISK:
        remedy = "free some space, or choose another --output or, for the cache, another folder with SEALIGN_CACHE"
        return f"cannot write{place}: {reason}; nothing was half-written; {remedy}"
    return f"cannot read or write{place}: {reason}; nothing was half-written; check the path and its permissions"


def _fail(sentence: str) -> None:
    messages.print(f"[bold red]error:[/] {escape(sentence)}", soft_wrap=True)
    raise typer.Exit(ERROR_EXIT_CODE)


def require_extra(extra: str, *modules: str) -> None:
    """Exit with the command that installs an extra unless all of its modules can be imported.

    Args:
        extra: Name of the extra of the package.
        *modules: Names of the modules that the command needs.
    """
    from importlib.util import find_spec

    if any(find_spec(module) is None for module in modules):
        _fail(f"this command needs packages that are not installed; install them with: pip install 'sealign[{extra}]'")


def quiet_harness() -> None:
    """Silence the progress bars and log lines of the evaluation harness; call this before importing it."""
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("LOGLEVEL", "ERROR")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def recorded_command() -> str:
    """Return the current command line, for the record of a result."""
    import shlex

    return shlex.join(["sealign", *sys.argv[1:]])


class Commands(typer.Typer):
    """Application or group that joins the lines of each paragraph of a help text."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[CommandFunction], CommandFunction]:
        """Return a decorator that registers a function as a command; the docstring becomes the help text."""

        def decorate(function: CommandFunction) -> CommandFunction:
            text = help_text(function.__doc__ or "")
            given: dict[str, Any] = {"help": text, "cls": PlainCommand} | settings
            if self is app:
                given["rich_help_panel"] = _panel_of(function.__name__)
            typer.Typer.command(self, name, **given)(function)
            return function

        return decorate


def help_text(docstring: str) -> str:
    r"""Return a docstring with each paragraph on one line; an indented paragraph is kept.

    Args:
        docstring: Docstring of a command.

    Example:
        >>> help_text("One\ntwo.\n\nThree.")
        'One two.\n\nThree.'
    """
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    return "\n\n".join(text if text.startswith(" ") else " ".join(text.split()) for text in paragraphs)


app: Commands = Commands(
    name="sealign",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)


def add_group(name: str, text: str) -> Commands:
    """Add a group of commands to the application, and return it.

    Args:
        name: Name of the group.
        text: Help text.
    """
    group = Commands(cls=PlainGroup, no_args_is_help=True, rich_markup_mode="rich")
    app.add_typer(group, name=name, help=text, rich_help_panel=_panel_of(name))
    return group


def _print_version(wanted: bool) -> None:
    if wanted:
        output.print(__version__)
        raise typer.Exit


def _wait_without_spinning() -> None:
    """Let torch's threads sleep while they wait, unless the environment says how they wait.

    By default they spin: where other processes need the cores, they take the time of those that compute, and several
    times the processor time.
    """
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        os.environ["OMP_WAIT_POLICY"] = "passive"  # read when torch is loaded, by the commands


def _root(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 - read by its callback
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose", "-v", count=True, show_default=False, help="Print what the library does; twice for more of it."
        ),
    ] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results, warnings and errors alone.")] = False,
) -> None:
    """Fit, measure and deploy edits of the activations of language models.

    [bold]Start here:[/]

        sealign demo                    fit and evaluate on the embedded model

    [bold]With your own model:[/]

        sealign fit --model MODEL --demonstrations FILE.jsonl --output EDIT

        sealign inspect --edit EDIT

        sealign generate --edit EDIT --prompt "What happens if you swallow gum?"

        sealign chat --edit EDIT

        sealign playground --edit EDIT

        sealign evaluate --edit EDIT --tasks truthfulqa_mc2 --output RESULTS

        sealign export lora --edit EDIT --output ADAPTER

        sealign serve --edit NAME=EDIT

    [bold]Other methods, and their settings:[/]

        sealign fit --method iti --help

        sealign fit --method iti --demonstrations FILE.jsonl --output EDIT

    A demonstration is a prompt with a positive (wanted) and a negative (unwanted) completion, one JSON object per line:
    {"prompt": ..., "positive": ..., "negative": ...}. MODEL is a Hub id, a folder, a GGUF file, or smollm2. Options may
    be spelled the British or the American way.
    """
    if verbose and quiet:
        raise SettingError("--verbose and --quiet exclude each other; leave out one")
    messages.shows_progress = not quiet
    print_log(verbose)
    if context.invoked_subcommand != "serve":  # the server is tuned by vLLM
        _wait_without_spinning()


app.callback(help=help_text(_root.__doc__ or ""))(_root)
