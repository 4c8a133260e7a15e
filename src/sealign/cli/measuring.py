"""The options that choose how answers are measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sealign.demonstrations.prompts import Prompt
    from sealign.evaluation.statistics import Aim


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
    from sealign.cli.options import named_values
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
