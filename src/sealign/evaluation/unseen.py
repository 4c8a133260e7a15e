"""What no edit was fitted on: the demonstrations and task items that may be scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sealign.demonstrations.demonstration import Demonstration, prompt_hash
from sealign.demonstrations.splits import split_demonstrations
from sealign.edits.intervention import Intervention


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
