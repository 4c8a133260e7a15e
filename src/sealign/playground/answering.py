"""Answers of the base model and of the edited model to a conversation, token by token and side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sealign.edits.attach import apply_edit
from sealign.edits.handle import EditHandle
from sealign.edits.intervention import Intervention
from sealign.models.eval_mode import eval_mode
from sealign.models.generation import generate_ids
from sealign.models.sampling import Sampling
from sealign.models.structure import input_device
from sealign.playground.alternating import alternate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE_ARM = "base"
EDITED_ARM = "edited"


def answer_both(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edit: Intervention | None,
    prompts: Mapping[str, Sequence[int]],
    *,
    max_new_tokens: Mapping[str, int],
    sampling: Sampling | None,
    on_token: Callable[[str, int], None],
    on_end: Callable[[str], None],
) -> None:
    """Generate the answers of the base model and of the edited model, a token of each in turn.

    Each answer is what ``generate`` of transformers gives alone, with a key-value cache of its own, greedily or from
    the same random numbers.

    Args:
        model: The base model.
        tokenizer: Tokenizer of the model.
        edit: The edit, which was checked against the model; None if none is switched on.
        prompts: Token ids of the prompt of each arm, under ``base`` and ``edited``.
        max_new_tokens: Largest number of tokens of the answer of each arm.
        sampling: How tokens are drawn; greedy decoding if None.
        on_token: Function of the arm and each of its tokens, end tokens included. An error that it raises stops both.
        on_end: Function of the arm that is called when its answer is complete.
    """
    with eval_mode(model), attached(model, edit) as handle:

        def arm(name: str) -> Callable[[Callable[[], None]], None]:
            def answer(pause: Callable[[], None]) -> None:
                def take(token: int) -> None:
                    on_token(name, token)
                    pause()

                use_cache = edit is None or name == BASE_ARM or edit.is_causal
                generate_ids(
                    model,
                    tokenizer,
                    [prompts[name]],
                    max_new_tokens[name],
                    use_cache=use_cache,
                    sampling=sampling,
                    on_token=take,
                )
                on_end(name)

            return answer

        def switch(name: str) -> None:
            if handle is not None:
                handle.switch(name == EDITED_ARM)

        alternate({name: arm(name) for name in prompts}, before_turn=switch, device=input_device(model))


@contextmanager
def attached(model: PreTrainedModel, edit: Intervention | None) -> Iterator[EditHandle | None]:
    """Attach an edit that was checked against the model inside a ``with`` block, or nothing.

    Args:
        model: The base model.
        edit: The edit, or None.
    """
    if edit is None:
        yield None
    else:
        with apply_edit(model, edit, ignore_mismatch=True) as handle:
            yield handle
