"""``sealign generate``: base and edited answers side by side."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from sealign.cli import options
from sealign.cli.app import app, messages, output


@app.command()
def generate(
    edit: options.Edit,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="A prompt; give it several times, or lines on standard input."),
    ] = None,
    model: options.EditedModel = None,
    strength: options.Strength = None,
    max_new_tokens: options.MaxNewTokens = 64,
    prompt_format: options.FittedPromptStyle = None,
    preamble: options.Preamble = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    ignore_mismatch: options.IgnoreMismatch = False,
    json: options.Json = False,
) -> None:
    """Answer prompts greedily with the base and with the edited model, side by side.

    EDIT may also be the folder of a method that sealign baseline wrote.
    """
    from sealign.cli.display import answers_table, print_json
    from sealign.cli.loading import load_at_strength
    from sealign.edits.edit import Edit
    from sealign.errors import SettingError
    from sealign.evaluation.answers import compare_answers
    from sealign.models.loading import load_model
    from sealign.models.prompt_format import prompt_format_of

    prompts = list(prompt or []) or _read_lines()
    if not prompts:
        raise SettingError('there is no prompt; give one with --prompt "...", or lines on standard input')
    loaded = load_at_strength(edit, strength)
    fitted = loaded.record.fit if isinstance(loaded, Edit) else {}
    written = prompt_format_of(fitted, prompt_format, preamble)
    with messages.status("Loading the model"):
        base, tokenizer = load_model(model or loaded.record.model.id, dtype=dtype, device=device)
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
    """Return the lines on standard input that are not empty; none from a terminal."""
    from sealign.errors import SettingError

    if sys.stdin.isatty():
        return []
    try:
        return [line.strip() for line in sys.stdin if line.strip()]
    except UnicodeDecodeError as error:
        raise SettingError(f"standard input is not {error.encoding.upper()}; save the prompts in that form") from error
