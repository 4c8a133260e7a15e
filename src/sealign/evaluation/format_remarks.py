"""Remarks on edits that are evaluated on prompts of another form than those they were fitted on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sealign.edits.intervention import Intervention
from sealign.evaluation.evaluation_config import EvaluationConfig
from sealign.evaluation.preference import PREFERENCE
from sealign.evaluation.results import ANSWERS, Task
from sealign.methods.edit_sources import fit_settings
from sealign.models.prompt_format import prompt_format_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMS = {True: "with the chat template", False: "without a chat template"}


def format_remarks(
    edits: Mapping[str, Intervention], tokenizer: PreTrainedTokenizerBase, *, chat: bool, remedy: str
) -> list[str]:
    """Return a remark on each edit that was fitted with the chat template but is evaluated without it, or vice versa.

    Args:
        edits: Mapping from name to edit. Interventions that do not edit activations are left out.
        tokenizer: Tokenizer of the model.
        chat: Whether the prompts of the evaluation are written with the chat template.
        remedy: What evaluates the edit as it was fitted.
    """
    remarks = []
    for name, edit in edits.items():
        settings = fit_settings(edit)
        if "prompt_format" not in settings:
            continue
        fitted = prompt_format_of(settings).resolve(tokenizer).style.endswith("chat")
        if fitted != chat:
            remarks.append(
                f"the edit '{name}' was fitted {_FORMS[fitted]}, but these prompts are written {_FORMS[chat]}, so its "
                f"effect may differ from that in use; {remedy}"
            )
    return remarks


def add_format_remarks(
    tasks: Mapping[str, Task],
    edits: Mapping[str, Intervention],
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
) -> None:
    """Note in each task which edits were fitted on prompts of another form.

    Args:
        tasks: Mapping from name to task, whose notes are extended.
        edits: Mapping from name to edit.
        tokenizer: Tokenizer of the model.
        config: Settings of the evaluation.
    """
    chat = config.apply_chat_template
    option = f"{'leave out' if chat else 'add'} --apply-chat-template to evaluate it as it was fitted"
    of_harness = format_remarks(edits, tokenizer, chat=chat, remedy=option)
    own = format_remarks(
        edits,
        tokenizer,
        chat=config.prompt_format.resolve(tokenizer).style.endswith("chat"),
        remedy="evaluate it alone and without --apply-chat-template, so that prompts are written as it was fitted",
    )
    for name, task in tasks.items():
        task.notes.extend(own if name in (PREFERENCE, ANSWERS) else of_harness)
