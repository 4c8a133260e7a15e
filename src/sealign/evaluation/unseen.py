"""What no edit was fitted on: the demonstrations, task items and prompts that may be scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sealign.demonstrations.demonstration import Demonstration, prompt_hash
from sealign.demonstrations.prompts import Prompt
from sealign.demonstrations.splits import split_demonstrations
from sealign.edits.intervention import Intervention
from sealign.errors import SettingError
from sealign.evaluation.evaluation_config import EvaluationConfig


def fitted_prompts(edits: Iterable[Intervention]) -> frozenset[str]:
    """Return the hashes of the prompts that edits were fitted on, from their records."""
    parts = (part for edit in edits for part in edit.parts)
    return frozenset(number.partition("-")[0] for part in parts for number in part.record.fitted_on)


def item_prompts(item: Mapping[str, Any]) -> frozenset[str]:
    """Return the hashes of the texts of a task item that may be the prompt of a demonstration.

    These are the texts of all its fields and, as in BBQ, its context followed by its question.

    Args:
        item: Row of the data set of a task.

    Example:
        >>> item = {"question": "Who?", "context": "Two people meet.", "label": 1}
        >>> prompt_hash("Two people meet. Who?") in item_prompts(item)
        True
    """
    texts = [value for value in item.values() if isinstance(value, str)]
    if isinstance(item.get("context"), str) and isinstance(item.get("question"), str):
        texts.append(f"{item['context']} {item['question']}")
    return frozenset(map(prompt_hash, texts))


def unseen_items(items: Iterable[Mapping[str, Any]], fitted: frozenset[str]) -> list[int]:
    """Return the numbers of the task items on whose prompts no edit was fitted.

    Args:
        items: Rows of the data set of a task.
        fitted: Result of ``fitted_prompts``.
    """
    return [number for number, item in enumerate(items) if not fitted or not fitted & item_prompts(item)]


def choose_items(
    loaded: Mapping[str, Any], task: str, config: EvaluationConfig, fitted: frozenset[str]
) -> tuple[dict[str, list[int]], int]:
    """Return the numbers of the items to score, by member of a group of tasks, and how many were left out.

    Items are left out if an edit was fitted on their prompts.

    Args:
        loaded: The task or group as ``load_task`` returns it.
        task: Name of the task or group.
        config: Settings of the evaluation, which limit or choose the items.
        fitted: Result of ``fitted_prompts``.

    Raises:
        SettingError: The edits were fitted on all items of the task or of a member.
    """
    chosen, asked = {}, 0
    for name, member in loaded["tasks"].items():
        items = list(member.eval_docs)
        numbers = list(range(len(items)))[: config.limit] if config.items is None else list(config.items[task])
        unseen = set(unseen_items(items, fitted))
        chosen[name] = [number for number in numbers if number in unseen]
        asked += len(numbers)
        if numbers and not chosen[name]:  # the harness would take an empty choice for all items
            raise SettingError(
                f"the edits were fitted on all {len(numbers)} items of task '{name}'; leave the task out, or fit with "
                "a holdout"
            )
    return chosen, asked - sum(map(len, chosen.values()))


def seen_note(prompts: Iterable[Prompt], edits: Iterable[Intervention]) -> str | None:
    """Return a warning if an edit was fitted on some of the prompts to answer, else None.

    Args:
        prompts: Prompts to answer.
        edits: Edits, whose records say what they were fitted on.
    """
    asked, fitted = [prompt.hash for prompt in prompts], fitted_prompts(edits)
    seen = sum(each in fitted for each in asked)
    if not seen:
        return None
    return f"an edit was fitted on {seen} of the {len(asked)} prompts, whose answers do not show what it does on others"


def split_seen(
    demonstrations: Sequence[Demonstration],
    edits: Iterable[Intervention],
    *,
    fits: bool = False,
    holdout: float | None = None,
    seed: int = 0,
) -> tuple[list[Demonstration], list[Demonstration]]:
    """Return the demonstrations to fit on, and those to score, which no edit was fitted on.

    A demonstration counts as fitted on if its prompt does, since completions of one prompt are alike.

    Args:
        demonstrations: All demonstrations.
        edits: Edits, whose records say what they were fitted on.
        fits: Whether further methods are fitted on the demonstrations.
        holdout: Fraction of the prompts that these methods leave out; None for none. Ignored unless ``fits``.
        seed: Seed of the choice.

    Raises:
        DemonstrationError: As for ``split_demonstrations``.
    """
    fitted, rest = list(demonstrations), [] if fits else list(demonstrations)
    if fits and holdout is not None:
        fitted, rest = split_demonstrations(demonstrations, holdout=holdout, seed=seed)
    seen = fitted_prompts(edits)
    return fitted, [item for item in rest if item.prompt_hash not in seen]


def divide_items(
    task: str,
    items: Sequence[Any],
    parts: Sequence[Sequence[Demonstration]],
    *,
    holdout: float,
    seed: int,
) -> tuple[list[int], list[int]]:
    """Return the numbers of the development items and of the test items of a task.

    An item with the prompt of a demonstration goes with it, and is left out if the candidates were fitted on it.

    Args:
        task: Name of the task, for the message.
        items: Items of the task.
        parts: Demonstrations to fit on, to compare on and to test on.
        holdout: Fraction of the other items for the test.
        seed: Seed of their split.

    Raises:
        SettingError: A part has fewer than 2 items.
    """
    prompts = [item_prompts(item) for item in items]
    hashes = [{each.prompt_hash for each in part} for part in parts]
    shared = [[number for number, own in enumerate(prompts) if own & part] for part in hashes]
    taken = {number for numbers in shared for number in numbers}
    rest = [number for number in range(len(prompts)) if number not in taken]
    shuffled = np.random.default_rng(seed).permutation(rest).tolist()
    cut = round((1 - holdout) * len(rest))
    development, test = sorted(shared[1] + shuffled[:cut]), sorted(shared[2] + shuffled[cut:])
    if min(len(development), len(test)) < 2:
        raise SettingError(
            f"task '{task}' has {len(prompts)} items, of which {len(development)} can be compared and {len(test)} "
            "tested, but each part needs at least 2; use more items"
        )
    return development, test
