"""``sealign generate``: answers of the base and the edited model side by side."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from sealign.cli import options
from sealign.cli.app import app, messages, output
from sealign.cli.loading import ModelOptions, with_model_options


@app.command()
@with_model_options(options.EditedModel)
def generate(
    model: ModelOptions,
    edit: options.Edit,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            metavar="TEXT",
            help="Prompt to answer. Repeat the option for several. Without it, every line of standard input is one.",
        ),
    ] = None,
    strength: options.Strength = None,
    max_new_tokens: options.MaxNewTokens = 64,
    prompt_format: options.FittedPromptStyle = None,
    preamble: options.Preamble = None,
    chat_template_arg: options.ChatTemplateArg = None,
    ignore_mismatch: options.IgnoreMismatch = False,
    json: options.Json = False,
) -> None:
    """Answer prompts with the base model and with the edited model, side by side.

    Answers are decoded greedily.
    """
    from sealign.cli.display import answers_table, print_json
    from sealign.errors import SettingError
    from sealign.evaluation.answers import compare_answers
    from sealign.methods.edit_sources import fit_settings, load_edit_source
    from sealign.models.prompt_format import prompt_format_of

    prompts = list(prompt or []) or _read_lines()
    if not prompts:
        raise SettingError('there is no prompt; give one with --prompt "...", or lines on standard input')
    loaded = load_edit_source(edit, strength=strength)
    written = prompt_format_of(
        fit_settings(loaded), prompt_format, preamble, options.template_arguments(chat_template_arg)
    )
    base, tokenizer = model.or_base_of(loaded).load()
    with messages.status("Answering"):
        answers = compare_answers(
            base,
            tokenizer,
            loaded,
            prompts,
            prompt_format=written,
            max_new_tokens=max_new_tokens,
            ignore_mismatch=ignore_mismatch,
        )
    if json:
        print_json([{"prompt": a.prompt, "base": a.base, "edited": a.edited} for a in answers])
        return
    output.print(answers_table(prompts, [a.base for a in answers], [a.edited for a in answers]))


def _read_lines() -> list[str]:
    """Return the lines of standard input that are not empty; an empty list if it is a terminal."""
    from sealign.errors import SettingError

    if sys.stdin.isatty():
        return []
    try:
        return [line.strip() for line in sys.stdin if line.strip()]
    except UnicodeDecodeError as error:
        encoding = error.encoding.upper()
        raise SettingError(f"standard input is not {encoding}; save the prompts as {encoding}") from error
