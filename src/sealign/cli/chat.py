"""``sealign chat``: talk to an edited model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from sealign.cli import options
from sealign.cli.app import app, messages, output

if TYPE_CHECKING:
    from sealign.edits.attach import EditHandle
    from sealign.methods.method import Attached

_COMMANDS = ("/on", "/off", "/strength", "/compare", "/reset", "/help", "/quit")

_HELP = """[bold]/on[/]             switch the edit on
[bold]/off[/]            switch it off
[bold]/strength X[/]     change its strength, for example /strength 0.5
[bold]/compare TEXT[/]   answer TEXT with and without the edit
[bold]/reset[/]          forget the conversation
[bold]/help[/]           show this
[bold]/quit[/]           leave"""


@app.command()
def chat(
    edit: options.Edit,
    model: options.EditedModel = None,
    strength: options.Strength = None,
    max_new_tokens: options.MaxNewTokens = 128,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System message to begin with.")
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    ignore_mismatch: options.IgnoreMismatch = False,
) -> None:
    """Talk to an edited model, switching the edit on and off and changing its strength on the way.

    EDIT may also be the folder of a method that sealign baseline wrote; a method has no strength.
    """
    from sealign.cli.loading import load_at_strength
    from sealign.edits.edit import Edit
    from sealign.errors import SettingError
    from sealign.methods.registry import apply_change, prefix_of
    from sealign.models.loading import load_model
    from sealign.playground.conversation import Conversation

    loaded = load_at_strength(edit, strength)
    if prefix_of(loaded):
        raise SettingError(
            f"'{edit}' puts demonstrations before a prompt, and a chat has no place for them; use generate"
        )
    with messages.status("Loading the model"):
        base, tokenizer = load_model(model or loaded.record.model.id, dtype=dtype, device=device)
    use_cache = not isinstance(loaded, Edit) or loaded.settings.normalization != "feature"
    conversation = Conversation(base, tokenizer, system=system, max_new_tokens=max_new_tokens, use_cache=use_cache)
    with apply_change(base, loaded, ignore_mismatch=ignore_mismatch) as handle:
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


def _prompt(handle: EditHandle | Attached) -> str:
    from sealign.edits.attach import EditHandle

    strength = f", strength {handle.strength:g}" if isinstance(handle, EditHandle) else ""
    state = f"edit on{strength}" if handle.enabled else "edit off"
    return f"[bold cyan]({state})>[/] "


def _answer(line: str, handle: EditHandle | Attached, conversation: Any) -> None:
    """Carry out a command, or say the line to the model."""
    from sealign.edits.attach import EditHandle
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
            if not isinstance(handle, EditHandle):
                raise SettingError("only spectral edits have a strength; switch this one with /on and /off")
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
