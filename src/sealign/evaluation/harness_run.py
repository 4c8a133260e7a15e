"""Run a model on a task of lm-evaluation-harness."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval import evaluator

from sealign.errors import SettingError
from sealign.evaluation.harness import SealignLM
from sealign.evaluation.rouge import without_resampling
from sealign.evaluation.samples import TaskSamples

FEW_SHOT_SEED = 1234
"""Seed of the few-shot examples; the default of lm-evaluation-harness."""


def run_task(
    lm: SealignLM,
    task: str,
    loaded: Mapping[str, Any],
    *,
    items: Mapping[str, Sequence[int]] | None = None,
    max_new_tokens: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
) -> TaskSamples:
    """Run a model on a task and return the samples that the harness recorded.

    Args:
        lm: The model.
        task: Name of the task.
        loaded: The task as ``load_task`` returns it. It can be run again, for other models, with the same settings.
        items: Mapping from task, or from each member of a group, to the numbers of the items to run; None runs all.
        max_new_tokens: Maximum number of tokens of an answer, instead of the limit of the task.
        num_fewshot: Number of worked examples before each item, instead of that of the task.
        apply_chat_template: Whether to write each prompt as a conversation, with examples as turns.
        system_instruction: System message, or, without the chat template, text before each prompt.

    Raises:
        SettingError: The harness fixes the number of examples of the task at 0.
    """
    # Does what ``simple_evaluate`` does, without its search for a git repository and for details of the machine.
    for loaded_task in loaded["tasks"].values():
        fixed = loaded_task.get_config("num_fewshot")
        if fixed == 0 and num_fewshot:
            raise SettingError(
                f"num_fewshot is {num_fewshot}, but the harness fixes it at 0 for task '{task}'; evaluate this task "
                "without --num-fewshot"
            )
        if num_fewshot is not None or fixed is None:
            loaded_task.set_config(key="num_fewshot", value=num_fewshot or 0)
        loaded_task.set_fewshot_seed(seed=FEW_SHOT_SEED)
        if max_new_tokens is not None:
            loaded_task.set_config(key="generation_kwargs", value={"max_gen_toks": max_new_tokens}, update=True)
        if items is not None:
            loaded_task.doc_iterator = functools.partial(_chosen_docs, loaded_task)
    # The harness divides by probabilities that underflow if a model is broken; ``item_scores`` does not.
    with np.errstate(divide="ignore", invalid="ignore"), without_resampling():
        found = evaluator.evaluate(
            lm=lm,
            task_dict=dict(loaded),
            samples=None if items is None else {name: sorted(set(numbers)) for name, numbers in items.items()},
            bootstrap_iters=0,
            log_samples=True,
            system_instruction=system_instruction,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
        )
    return TaskSamples.of(task, found)


def _chosen_docs(task: Any, *, samples: Sequence[int], **_: Any) -> Iterator[tuple[int, Any]]:
    """Yield (position, document) of the chosen documents of a task, as the harness does, without reading the others."""
    docs = task.eval_docs
    return enumerate(docs[number] for number in samples)
