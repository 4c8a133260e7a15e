"""``sealign chat``: converse with an edited model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from sealign.cli import option_values, options
from sealign.cli.app import app
from sealign.cli.consoles import output
from sealign.cli.line_input import HISTORY_NAME, LineInput
from sealign.cli.loading import ModelOptions, load_edit, say_strength, with_model_options

if TYPE_CHECKING:
    from sealign.edits.handle import EditHandle
    from sealign.edits.intervention import Intervention
    from sealign.playground.conversation import Conversation

_COMMANDS = ("/on", "/off", "/strength", "/compare", "/reset", "/help", "/quit")

_HELP = """[bold]/on[/]             switch the edit on
[bold]/off[/]            switch it off
[bold]/strength X[/]     change its strength, for example /strength 0.5 or /strength 0.5,1
[bold]/compare TEXT[/]   answer TEXT with and without the edit
[bold]/reset[/]          forget the conversation
[bold]/help[/]           show this
[bold]/quit[/]           leave"""


@app.command()
@with_model_options(options.EditedModel)
def chat(
    model: ModelOptions,
    edit: options.Edit,
    strength: options.Strengths = None,
    max_new_tokens: options.MaxNewTokens = 128,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.SamplingSeed = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System message at the start of the conversation.")
    ] = None,
    chat_template_arg: options.ChatTemplateArg = None,
    ignore_mismatch: options.IgnoreMismatch = False,
) -> None:
    """Converse with an edited model.

    Commands in the conversation switch the edit on and off, change its strength and compare answers. With several
    values of --strength, each message is answered at each of them, in a conversation of its own.
    """
    from sealign.cache import cache_dir
    from sealign.edits.attach import apply_edit
    from sealign.edits.provenance import warn_of_other_tokenizer
    from sealign.errors import SettingError
    from sealign.evaluation.answers import check_sampling
    from sealign.methods.edit_sources import fit_settings, load_edit_source
    from sealign.models.prompt_format import prompt_format_of
    from sealign.playground.conversation import Conversation

    chosen: list[float | None] = [*option_values.strengths(strength)] or [None]
    sampling = option_values.sampling(temperature, top_p, seed)
    edits = [load_edit(edit, each) for each in chosen]
    loaded = edits[0]
    check_sampling(loaded, sampling)
    if loaded.prefix:
        raise SettingError(
            f"'{edit}' puts demonstrations before each prompt, which a conversation does not support; use sealign "
            "generate"
        )
    if len(chosen) > 1 and loaded.strength is None:
        raise SettingError(f"--strength is {strength}, but several edits have no common strength in a chat; give one")
    written = prompt_format_of(
        fit_settings(loaded), chat_template_kwargs=option_values.template_arguments(chat_template_arg)
    )
    base, tokenizer = model.or_base_of(loaded).load()
    if not ignore_mismatch:
        warn_of_other_tokenizer(tokenizer, loaded)
    conversation = Conversation(
        base,
        tokenizer,
        system=system,
        max_new_tokens=max_new_tokens,
        use_cache=loaded.is_causal,
        sampling=sampling,
        prompt_format=written,
    )
    lines = LineInput(cache_dir() / HISTORY_NAME)
    with apply_edit(base, loaded, ignore_mismatch=ignore_mismatch) as handle:
        talk = _Talk(load_edit_source(edit), handle, {each: conversation.branch() for each in chosen})
        output.print(_HELP)
        while True:
            try:
                line = lines.read(talk.prompt())
            except (EOFError, KeyboardInterrupt):
                output.print()
                break
            if line == "/quit":
                break
            if line:
                talk.respond(line)


@dataclass
class _Talk:
    """A conversation for each strength.

    Attributes:
        edit: The edit at its own strength.
        handle: Handle of the attached edit.
        conversations: Mapping from strength to conversation; the only key is None for the strength of the handle.
    """

    edit: Intervention
    handle: EditHandle
    conversations: dict[float | None, Conversation]

    def prompt(self) -> str:
        """Return the prompt of the next line, in rich markup."""
        strengths = [self.handle.strength if each is None else each for each in self.conversations]
        shown = ", ".join(f"{each:g}" for each in strengths if each is not None)
        state = f"edit on{', strength ' if shown else ''}{shown}" if self.handle.enabled else "edit off"
        return f"[bold cyan]({state})>[/] "

    def respond(self, line: str) -> None:
        """Carry out a command, or send the line to the model and print its answer."""
        from sealign.errors import SealignError

        try:
            self._respond(line)
        except SealignError as error:
            output.print(f"[bold red]error:[/] {escape(str(error))}")
        except KeyboardInterrupt:
            output.print("[dim]stopped[/]")

    def _respond(self, line: str) -> None:
        from sealign.errors import SettingError, unknown_name

        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if line.startswith("/") and command not in _COMMANDS:
            raise SettingError(unknown_name("command", command, _COMMANDS))
        if not line.startswith("/"):
            self._say(line)
        elif command in ("/on", "/off"):
            self.handle.switch(command == "/on")
        elif command == "/strength":
            self._set_strengths(rest)
        elif command == "/compare" and rest:
            self._compare(rest)
        elif command == "/reset":
            for conversation in self.conversations.values():
                conversation.reset()
        else:
            output.print(_HELP)

    def _say(self, text: str) -> None:
        for strength, conversation in self.conversations.items():
            _show(conversation.say, text, self._use(strength, ""), self.edit)

    def _compare(self, text: str) -> None:
        first = next(iter(self.conversations.values()))
        with self.handle.switched(False):
            _show(first.answer_once, text, "base", self.edit)
        with self.handle.switched(True):
            for strength, conversation in self.conversations.items():
                _show(conversation.answer_once, text, self._use(strength, "edited"), self.edit)

    def _use(self, strength: float | None, only: str) -> str:
        """Set the strength of the next answer, and return the answer's name, which is ``only`` if there is one."""
        if strength is None or len(self.conversations) == 1:
            return only
        self.handle.set_strength(strength)
        return f"strength {strength:g}"

    def _set_strengths(self, text: str) -> None:
        """Go on at other strengths, each from the conversation at the first of those before."""
        from sealign.edits.strength import check_strength

        chosen = list(dict.fromkeys(check_strength(part.strip()) for part in text.split(",")))
        self.handle.set_strength(chosen[0])
        for each in chosen:
            say_strength(self.edit, each)
        first = next(iter(self.conversations.values()))
        self.conversations = {each: first if each == chosen[0] else first.branch() for each in chosen}


def _show(answer: Callable[..., str], text: str, name: str, edit: Intervention) -> None:
    """Print an answer below its name; on a terminal as it is generated, unless it is chosen among several."""
    if name:
        output.print(f"[bold]{name}:[/]", end=" ")
    if not (output.is_terminal and edit.changes_scores):
        output.print(escape(answer(text)))
        return
    try:
        answer(text, lambda piece: output.print(piece, end="", markup=False, soft_wrap=True))
    finally:
        output.print()
