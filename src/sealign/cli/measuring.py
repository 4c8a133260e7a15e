"""The options that choose what is answered, how prompts are written, and how answers are measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sealign.demonstrations.prompts import Prompt
    from sealign.evaluation.statistics import Aim

Prompts = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        metavar="SOURCE",
        help="Open-ended prompts that every arm answers greedily: a text file with one prompt per line; a .jsonl "
        "file with prompt or messages; or bundled:NAME, such as bundled:positivity.",
    ),
]
Classifiers = Annotated[
    list[str] | None,
    typer.Option(
        "--classifier",
        metavar="MODEL[:LABEL]",
        help="Measure the answers to --prompts by the probability of a label: folder or Hub id of a "
        "text-classification model. NAME= before it names the measure. Repeat the option for several.",
    ),
]
Scorers = Annotated[
    list[str] | None,
    typer.Option(
        "--scorer",
        metavar="SCORER",
        help="Measure the answers to --prompts by a function: tokens, distinct-N, repetition, refusal, "
        "regex:PATTERN, or module:function of your own, of the texts of prompt and answer. NAME= before it names "
        "the measure. Repeat the option for several.",
    ),
]
Aims = Annotated[
    list[str] | None,
    typer.Option(
        "--aim",
        metavar="NAME=AIM",
        help="Which values of a measure are good: higher, lower or a number, as in repetition=lower. The verdict "
        "depends on measures with an aim; the others are shown. Repeat the option for several.",
    ),
]
Criterion = Annotated[
    str | None,
    typer.Option(
        "--criterion",
        metavar="TEXT",
        help="What --judge compares answers of the edited and the base model by, as in 'how polite the answer is'. "
        r"\[default: quality]",
    ),
]
AnswerTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        min=1,
        metavar="N",
        help=r"Maximum number of generated tokens in an answer to a prompt of --prompts. Must be at least 1. "
        r"\[default: 64]",
    ),
]
ApplyChatTemplate = Annotated[
    bool,
    typer.Option(
        "--apply-chat-template",
        help="Write the prompts of tasks, demonstrations and --prompts with the chat template. Without it, prompts "
        "of tasks are raw, and the others are written as the first edit was fitted.",
    ),
]
NumFewshot = Annotated[
    int | None,
    typer.Option(
        "--num-fewshot",
        min=0,
        metavar="N",
        help=r"Number of worked examples before each item of a task. \[default: that of the task]",
    ),
]
SystemInstruction = Annotated[
    str | None,
    typer.Option(
        "--system-instruction",
        metavar="TEXT",
        help="System message of every prompt; text before it where no chat template is used.",
    ),
]


def answer_settings(
    prompts: str | None,
    classifiers: Sequence[str],
    scorers: Sequence[str],
    aims: Sequence[str],
    criterion: str | None,
    max_new_tokens: int | None,
    device: str,
) -> dict[str, Any]:
    """Return the settings of ``EvaluationConfig`` for answers to prompts; empty without prompts.

    Args:
        prompts: Value of ``--prompts``.
        classifiers: Values of ``--classifier``.
        scorers: Values of ``--scorer``.
        aims: Values of ``--aim``.
        criterion: Value of ``--criterion``.
        max_new_tokens: Value of ``--max-new-tokens``.
        device: Device of the classifiers.

    Raises:
        SettingError: A measure cannot be loaded, an aim is malformed, or an option is given without prompts.
        DemonstrationError: The prompts cannot be read.
    """
    from sealign.demonstrations.prompts import load_prompts
    from sealign.errors import SettingError
    from sealign.evaluation.answer_classifier import load_classifier
    from sealign.evaluation.answer_measures import load_scorer
    from sealign.evaluation.answer_task import MAX_NEW_TOKENS
    from sealign.evaluation.results import ANSWERS

    given = {
        "--classifier": classifiers,
        "--scorer": scorers,
        "--aim": aims,
        "--criterion": criterion,
        "--max-new-tokens": max_new_tokens,
    }
    if prompts is None:
        for option, value in given.items():
            if value:
                raise SettingError(f"{option} is for the answers to prompts, but there are none; give --prompts")
        return {}
    asked: list[Prompt] = load_prompts(prompts)
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module in the current folder, as with python -m
    settings: dict[str, Any] = {
        "prompts": asked,
        "measures": [
            *(load_classifier(text, device=device) for text in classifiers),
            *(load_scorer(text) for text in scorers),
        ],
        "aims": _aims(aims),
        "max_new_tokens": {ANSWERS: max_new_tokens or MAX_NEW_TOKENS},
    }
    return settings if criterion is None else settings | {"criterion": criterion}


def _aims(given: Sequence[str]) -> dict[str, Aim]:
    """Return the values of ``--aim`` by name of the measure."""
    from sealign.cli.option_values import named_values
    from sealign.errors import SettingError

    aims: dict[str, Aim] = {}
    for name, text in named_values(given, "--aim", "repetition=lower").items():
        if text == "higher" or text == "lower":
            aims[name] = text  # type: ignore[assignment]
            continue
        try:
            aims[name] = float(text)
        except ValueError:
            raise SettingError(
                f"--aim gives {name} the value '{text}', but it must be higher, lower or a number"
            ) from None
    return aims


def measuring_device(device: str) -> str:
    """Return the device of a classifier: that of the model, unless the model is spread or placed by itself."""
    import torch

    if device in ("auto", "split"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def check_effect(
    tasks: str, has_own: bool, apply_chat_template: bool, num_fewshot: int | None, arguments: dict[str, Any]
) -> None:
    """Raise an error if an option of prompts would have no effect."""
    from sealign.cli.option_values import names
    from sealign.errors import SettingError

    if num_fewshot is not None and not names(tasks):
        raise SettingError("--num-fewshot is for the tasks of --tasks, but there are none; leave it out")
    if arguments and not apply_chat_template and not has_own:
        raise SettingError("--chat-template-arg has no effect on raw prompts; add --apply-chat-template")
