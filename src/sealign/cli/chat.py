"""``sealign chat``: converse with an edited model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from sealign.cli import options
from sealign.cli.app import app, output
from sealign.cli.loading import ModelOptions, with_model_options

if TYPE_CHECKING:
    from sealign.edits.handle import EditHandle
    from sealign.playground.conversation import Conversation

_COMMANDS = ("/on", "/off", "/strength", "/compare", "/reset", "/help", "/quit")

_HELP = """[bold]/on[/]             switch the edit on
[bold]/off[/]            switch it off
[bold]/strength X[/]     change its strength, for example /strength 0.5
[bold]/compare TEXT[/]   answer TEXT with and without the edit
[bold]/reset[/]          forget the conversation
[bold]/help[/]           show this
[bold]/quit[/]           leave"""


@app.command()
@with_model_options(options.EditedModel)
def chat(
    model: ModelOptions,
    edit: options.Edit,
    strength: options.Strength = None,
    max_new_tokens: options.MaxNewTokens = 128,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System message at the start of the conversation.")
    ] = None,
    chat_template_arg: options.ChatTemplateArg = None,
    ignore_mismatch: options.IgnoreMismatch = False,
) -> None:
    """Converse with an edited model.

    Commands in the conversation switch the edit on and off, change its strength and compare answers.
    """
    from sealign.edits.attach import apply_edit
    from sealign.edits.provenance import warn_of_other_tokenizer
    from sealign.errors import SettingError
    from sealign.methods.edit_sources import fit_settings, load_edit_source
    from sealign.models.prompt_format import prompt_format_of
    from sealign.playground.conversation import Conversation

    loaded = load_edit_source(edit, strength=strength)
    if loaded.prefix:
        raise SettingError(
            f"'{edit}' puts demonstrations before each prompt, which a conversation does not support; use sealign "
            "generate"
        )
    written = prompt_format_of(fit_settings(loaded), chat_template_kwargs=options.template_arguments(chat_template_arg))
    base, tokenizer = model.or_base_of(loaded).load()
    if not ignore_mismatch:
        warn_of_other_tokenizer(tokenizer, loaded)
    conversation = Conversation(
        base, tokenizer, system=system, max_new_tokens=max_new_tokens, use_cache=loaded.is_causal, prompt_format=written
    )
    with apply_edit(base, loaded, ignore_mismatch=ignore_mismatch) as handle:
        output.print(_HELP)
        while True:
            try:
                line = output.input(_prompt(handle)).strip()
            except (EOFError, KeyboardInterrupt):
                output.print()
                break
            if line == "/quit":
                break
            if line:
                _answer(line, handle, conversation)


def _prompt(handle: EditHandle) -> str:
    strength = "" if handle.strength is None else f", strength {handle.strength:g}"
    state = f"edit on{strength}" if handle.enabled else "edit off"
    return f"[bold cyan]({state})>[/] "


def _answer(line: str, handle: EditHandle, conversation: Conversation) -> None:
    """Carry out a command, or send the line to the model and print its answer."""
    from sealign.errors import SealignError, SettingError, unknown_name

    command, _, rest = line.partition(" ")
    rest = rest.strip()
    try:
        if line.startswith("/") and command not in _COMMANDS:
            raise SettingError(unknown_name("command", command, _COMMANDS))
        if not line.startswith("/"):
            output.print(escape(conversation.say(line)))
        elif command in ("/on", "/off"):
            handle.switch(command == "/on")
        elif command == "/strength":
            handle.set_strength(rest)
        elif command == "/compare" and rest:
            for enabled, name in ((False, "base"), (True, "edited")):
                with handle.switched(enabled):
                    output.print(f"[bold]{name}:[/] {escape(conversation.answer_once(rest))}")
        elif command == "/reset":
            conversation.reset()
        else:
            output.print(_HELP)
    except SealignError as error:
        output.print(f"[bold red]error:[/] {escape(str(error))}")
    except KeyboardInterrupt:
        output.print("[dim]stopped[/]")
