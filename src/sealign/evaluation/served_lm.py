"""ServedLM: a model of lm-evaluation-harness that runs on a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sealign.errors import SettingError
from sealign.evaluation.choices import ChoiceRequest, OnScored
from sealign.evaluation.harness import SealignLM
from sealign.evaluation.served_model import ServedModel


class ServedLM(SealignLM):
    """``SealignLM`` whose model is on a server; tokens, journals and tasks are the same.

    Args:
        served: The server.
        name: Name of the model or edit on the server.
        skeleton: The model without weights, whose configuration is read.
        **settings: As for ``SealignLM``, without ``edit``.
    """

    def __init__(self, served: ServedModel, name: str, skeleton: Any, **settings: Any) -> None:
        super().__init__(skeleton, **settings)
        self._device = torch.device("cpu")  # of what is sent to the server
        self._served = served
        self._name = name

    @property
    def max_length(self) -> int:
        """Number of tokens that can be read and predicted from; the server counts one that it must generate."""
        return self._served.context_length - 2

    def _score_choices(self, requests: Sequence[ChoiceRequest], on_scored: OnScored) -> None:
        self._served.score_choices(requests, self._name, track=self._track, on_scored=on_scored)

    def _answer_batch(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        return self._served.answer(prompts, self._name, max_new_tokens, self.end_tokens)

    def _runs_batches(self) -> bool:
        return True

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:  # noqa: ARG002
        """Return context and greedy completion of each row; the harness cuts off what follows ``stop``."""
        if settings.get("do_sample") or settings.get("temperature"):
            raise SettingError("a task samples answers, which a server does not repeat; evaluate it without --server")
        prompts = [row[seen.bool()].tolist() for row, seen in zip(context, settings["attention_mask"], strict=True)]
        answers = self._served.answer(prompts, self._name, max_length - context.shape[1], self.end_tokens)
        longest = max(map(len, answers))
        pad = int(self.tokenizer.pad_token_id)
        rows = [[*row.tolist(), *ids, *[pad] * (longest - len(ids))] for row, ids in zip(context, answers, strict=True)]
        return torch.tensor(rows)
