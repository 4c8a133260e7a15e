"""Settings of the collection of activations."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sealign.configuration import Config
from sealign.models.prompt_format import PromptFormat

TokenChoice = Literal["last", "mean", "random"]
"""Which token of a sequence gives its activation: the last, the mean over all, or one at random (seeded)."""

NeutralChoice = Literal["prompt", "generated"]
"""The neutral sequence: the prompt, or the prompt and the model's own greedy completion."""


class CollectConfig(Config):
    """Settings of the collection of activations.

    Attributes:
        token: Which token gives a sequence's activation: ``last``, ``mean`` over all tokens, or ``random``.
        neutral: The neutral sequence: ``prompt``, or ``generated``, the prompt and the model's greedy completion.
        max_new_tokens: Maximum number of generated tokens. Must be at least 1.
        prompt_format: How prompts are written: ``auto``, ``chat``, ``few_shot``, ``few_shot_chat`` or ``plain``.
        batch_size: Number of sequences to run together. Must be at least 1.
        seed: Seed of the random token.

    Raises:
        SettingError: A value is unknown or out of range.

    Example:
        >>> CollectConfig(token="mean").token
        'mean'
    """

    token: Annotated[TokenChoice, Field(title="token choice")] = "last"
    neutral: Annotated[NeutralChoice, Field(title="neutral choice")] = "prompt"
    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    prompt_format: PromptFormat = PromptFormat()
    batch_size: Annotated[int, Field(ge=1)] = 16
    seed: int = 0
