"""Settings of the collection of activations."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sealign.configuration import Config
from sealign.models.prompt_format import PromptFormat

TokenChoice = Literal["last", "mean", "completion", "random"]
"""Tokens whose mean activation represents a sequence: the last token, all tokens, those of the completion (the last
token of a prompt without one), or one random token."""

TokenSetting = Annotated[TokenChoice, Field(title="token choice")]
"""A token choice as a setting, with its name for messages."""

NeutralChoice = Literal["prompt", "generated"]
"""Neutral sequence: the prompt alone, or the prompt with the model's greedy completion."""


class CollectConfig(Config):
    """Settings of the collection of activations.

    Attributes:
        token: Tokens whose mean activation represents a sequence: ``last`` (the last token), ``mean`` (all tokens),
            ``completion`` (those of the completion; the last token of a prompt without one) or ``random`` (one random
            token).
        neutral: Neutral sequence: ``prompt`` (the prompt alone) or ``generated`` (the prompt with the model's greedy
            completion).
        max_new_tokens: Maximum number of generated tokens with ``neutral="generated"``. Must be at least 1.
        prompt_format: How prompts are written: ``auto``, ``chat``, ``few_shot``, ``few_shot_chat`` or ``plain``.
        batch_size: Number of sequences to run together. Must be at least 1.
        seed: Seed of the random token with ``token="random"``.

    Raises:
        SettingError: A value is unknown or out of range.

    Example:
        >>> CollectConfig(token="mean").token
        'mean'
    """

    token: TokenSetting = "last"
    neutral: Annotated[NeutralChoice, Field(title="neutral choice")] = "prompt"
    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    prompt_format: PromptFormat = PromptFormat()
    batch_size: Annotated[int, Field(ge=1)] = 16
    seed: int = 0
