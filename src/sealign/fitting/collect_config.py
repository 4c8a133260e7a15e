"""Settings of the collection of activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from sealign.errors import SettingError, unknown_name
from sealign.models.prompt_format import PromptFormat

TokenChoice = Literal["last", "mean", "random"]
"""Which token of a sequence gives its activation: the last, the mean over all, or one at random (seeded)."""

NeutralChoice = Literal["prompt", "generated"]
"""What the neutral sequence is: the prompt, or the prompt and the model's own greedy completion."""


@dataclass(frozen=True)
class CollectConfig:
    """How activations are collected.

    Attributes:
        token: which token gives a sequence's activation: ``last``, ``mean`` or ``random``.
        neutral: the neutral sequence: ``prompt``, or ``generated`` by the model after the prompt.
        max_new_tokens: at most this many generated tokens, at least 1.
        prompt_format: how prompts are written.
        batch_size: sequences run together, at least 1.
        seed: of the random token.

    Raises:
        SettingError: a value is unknown or out of range.

    Example:
        >>> CollectConfig(token="mean").token
        'mean'
    """

    token: TokenChoice = "last"
    neutral: NeutralChoice = "prompt"
    max_new_tokens: int = 32
    prompt_format: PromptFormat = PromptFormat()
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.token not in get_args(TokenChoice):
            raise SettingError(unknown_name("token choice", self.token, get_args(TokenChoice)))
        if self.neutral not in get_args(NeutralChoice):
            raise SettingError(unknown_name("neutral choice", self.neutral, get_args(NeutralChoice)))
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}, but it must be at least 1")
