"""Chat template: a conversation as the text that a model reads before it answers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sealign.demonstrations.demonstration import Turn
from sealign.errors import ModelError, SettingError, first_sentence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPEN_THOUGHT = re.compile(
    r"(?:<((?:\w+:)?(?:think|thinking|thought|reasoning))>|(\[THINK\])|(<\|START_THINKING\|>)|(◁think▷))\s*\Z"
)
_CLOSED = ("</{}>", "[/THINK]", "<|END_THINKING|>", "◁/think▷")

_ANSWER = "An answer."
"""Made-up answer, to see what a template writes before one."""

_DATE_CODES = "aAbBcCdDeFGgHhIjklMmnpPrRSTtuUVwWxXyYzZ"


def chat_text(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], *, arguments: Mapping[str, Any], date: str
) -> str:
    """Return a conversation in the chat template of a tokenizer, up to the beginning of the model's answer.

    Contents are given to the template as text, or as a list of parts where it expects parts. What the template writes
    between the name of the role and an answer, such as the channel of gpt-oss, is part of the result. Thoughts that the
    template opens for the model are closed, so that an answer follows.

    Args:
        tokenizer: Tokenizer with a chat template.
        turns: The conversation, which ends with a turn of the user.
        arguments: Arguments of the template, such as ``enable_thinking``.
        date: Date and time in ISO format that the template gets as the present.

    Raises:
        ModelError: The template refuses the conversation, or leaves out the text of a turn.
    """
    arguments = {**arguments, **dated_template(tokenizer, arguments.get("chat_template"), date)}
    reason = ""
    for as_parts in (False, True):
        messages: list[dict[str, Any]] = [
            {"role": role, "content": [{"type": "text", "text": content}] if as_parts else content}
            for role, content in turns
        ]
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments))
        except Exception as error:  # templates are programs, which fail in any way
            reason = reason or first_sentence(error)
            continue
        lost = [turn.role for turn in turns if turn.role != "assistant" and turn.content.strip() not in text]
        if not lost:
            return _close_thoughts(text + _opening(tokenizer, messages, text, arguments))
        reason = reason or f"it leaves out the text of the {lost[0]} turn"
    if any(turn.role == "system" for turn in turns):
        remedy = "leave out the system turn"
    else:
        remedy = "begin with a system turn if it needs one, or use the prompt format few_shot or plain"
    raise ModelError(f"the model's chat template refuses the conversation ({reason}); {remedy}")


def check_template_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> None:
    """Raise an error for an argument that a chat template does not use.

    Args:
        tokenizer: Tokenizer with a chat template.
        arguments: Arguments of the template by name; ``chat_template`` is the name of one of several templates.

    Raises:
        SettingError: An argument is reserved, or does not occur in the template.
    """
    if not arguments:
        return
    own = {"tools", "documents", "chat_template"}
    reserved = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"} - own
    template = _template(tokenizer, arguments.get("chat_template"))
    for name in arguments:
        if name in reserved:
            raise SettingError(f"the chat template argument '{name}' is set by Sealign; leave it out")
        if name != "chat_template" and not re.search(rf"\b{re.escape(name)}\b", template):
            raise SettingError(f"the model's chat template does not use the argument '{name}'; check its name")


def _template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> str:
    """Return the template that transformers chooses."""
    try:
        return str(tokenizer.get_chat_template(name))
    except ValueError as error:
        known = sorted(tokenizer.chat_template) if isinstance(tokenizer.chat_template, dict) else []
        raise ModelError(
            f"the model has the chat templates {', '.join(known)} and no default; choose one by the chat template "
            f"argument chat_template={known[0] if known else 'NAME'}"
        ) from error


def dated_template(tokenizer: PreTrainedTokenizerBase, name: str | None, date: str) -> dict[str, str]:
    """Return the template as an argument of ``apply_chat_template``, with a fixed date where it asks for the present.

    Templates ask by the function ``strftime_now``, which is hidden by a macro of this name.

    Args:
        tokenizer: Tokenizer with a chat template.
        name: Name of one of several templates, or None.
        date: Date and time in ISO format.
    """
    template = _template(tokenizer, name)
    if "strftime_now" not in template:
        return {"chat_template": template} if name is not None else {}
    moment = datetime.fromisoformat(date)
    codes = [f"%{flag}{code}" for code in _DATE_CODES for flag in ("", "-")] + ["%f"]
    values = {code: moment.strftime(code) for code in codes} | {"%%": "%"}
    replaced = "".join(f"|replace({code!r}, {value!r})" for code, value in values.items())
    macro = f"{{%- macro strftime_now(format) -%}}{{{{ format{replaced} }}}}{{%- endmacro +%}}"
    return {"chat_template": macro + template}


def _opening(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], text: str, arguments: Mapping[str, Any]
) -> str:
    """Return what a template writes between a prompt and its answer; empty for thoughts, which are closed instead.

    Args:
        tokenizer, arguments: As for ``chat_text``.
        messages: The conversation as the template takes it.
        text: The conversation in the template.
    """
    if "add_generation_prompt" not in _template(tokenizer, arguments.get("chat_template")):
        return ""  # what follows is then the name of the role, which such templates leave to the model
    content = _ANSWER if isinstance(messages[-1]["content"], str) else [{"type": "text", "text": _ANSWER}]
    answered: list[dict[str, Any]] = [*messages, {"role": "assistant", "content": content}]
    try:
        whole = str(tokenizer.apply_chat_template(answered, tokenize=False, **arguments))
    except Exception:  # as above; a template may take no answer
        return ""
    before, answer, _ = whole.rpartition(_ANSWER)
    opening = before[len(text) :] if answer and before.startswith(text) else ""
    return "" if not opening.strip() or re.search("think|thought|reasoning", opening, re.IGNORECASE) else opening


def _close_thoughts(text: str) -> str:
    opened = _OPEN_THOUGHT.search(text)
    if opened is None:
        return text
    assert opened.lastindex is not None
    closed = _CLOSED[opened.lastindex - 1].format(opened[opened.lastindex])
    return f"{text.rstrip()}\n\n{closed}\n\n"
