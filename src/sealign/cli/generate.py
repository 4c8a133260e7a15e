"""``sealign generate``: answers of the base and the edited model side by side."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from sealign.cli import option_values, options
from sealign.cli.app import app
from sealign.cli.consoles import messages
from sealign.cli.loading import ModelOptions, load_edit, with_model_options

if TYPE_CHECKING:
    from sealign.evaluation.answers import Answers


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
    strength: options.Strengths = None,
    max_new_tokens: options.MaxNewTokens = 64,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.SamplingSeed = None,
    prompt_format: options.FittedPromptStyle = None,
    preamble: options.Preamble = None,
    chat_template_arg: options.ChatTemplateArg = None,
    ignore_mismatch: options.IgnoreMismatch = False,
    json: options.Json = False,
) -> None:
    """Answer prompts with the base model and with the edited model, side by side.

    Answers are decoded greedily, or sampled with --temperature, from the same random numbers for both models. With
    several values of --strength, the model is loaded once and the answers follow one another.
    """
    from sealign.cli.display import print_answers, print_json
    from sealign.errors import SettingError
    from sealign.evaluation.answers import check_sampling, compare_answers
    from sealign.methods.edit_sources import fit_settings
    from sealign.models.prompt_format import prompt_format_of

    chosen: list[float | None] = [*option_values.strengths(strength)] or [None]
    sampling = option_values.sampling(temperature, top_p, seed)
    prompts = list(prompt or []) or _read_lines()
    if not prompts:
        raise SettingError('there is no prompt; give one with --prompt "...", or lines on standard input')
    edits = [load_edit(edit, each) for each in chosen]
    check_sampling(edits[0], sampling)
    written = prompt_format_of(
        fit_settings(edits[0]), prompt_format, preamble, option_values.template_arguments(chat_template_arg)
    )
    base, tokenizer = model.or_base_of(edits[0]).load()
    answers: list[list[Answers]] = []
    for loaded in edits:
        with messages.status("Answering"):
            found = compare_answers(
                base,
                tokenizer,
                loaded,
                prompts,
                prompt_format=written,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                base=[answer.base for answer in answers[0]] if answers else None,
                ignore_mismatch=ignore_mismatch,
            )
        answers.append(found)
    shown = [loaded.strength if each is None else each for loaded, each in zip(edits, chosen, strict=True)]
    if json:
        pairs = zip(shown, answers, strict=True)
        print_json([{"strength": each, **dataclasses.asdict(one)} for each, found in pairs for one in found])
    else:
        print_answers(answers, shown)


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
