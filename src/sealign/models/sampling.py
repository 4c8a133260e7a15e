"""Sampling: how the tokens of an answer are drawn, in place of greedy decoding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from pydantic import Field

from sealign.configuration import Config


class Sampling(Config):
    """Settings of sampled answers.

    Attributes:
        temperature: Sampling temperature. Must be above 0.
        top_p: Nucleus sampling threshold, in (0, 1].
        seed: Seed of the sampling. Each batch of answers starts from it, so that with and without an edit, and at each
            strength, the same random numbers are used.

    Raises:
        SettingError: A value is out of range.

    Example:
        >>> Sampling(temperature=0.8).top_p
        1.0
    """

    temperature: Annotated[float, Field(gt=0, examples=[0.7])]
    top_p: Annotated[float, Field(gt=0, le=1, examples=[0.95])] = 1.0
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of ``generate`` of transformers; no token is excluded by its rank alone."""
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Seed torch inside a ``with`` block, and restore the state of its generators afterwards."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            yield


GREEDY: dict[str, bool | None] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
"""Arguments of ``generate`` of transformers for greedy decoding."""
