"""ServedPlayground: a playground whose model runs on a server that ``sealign serve`` started."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from openai import AsyncOpenAI, NotFoundError, OpenAI, OpenAIError

from sealign.demonstrations.bundled import neutral_texts
from sealign.errors import ServingError, SettingError, first_sentence
from sealign.evaluation.increase import increase_interval
from sealign.playground.answering import BASE_ARM, EDITED_ARM
from sealign.playground.listed_tokens import ListedTokens, divergence_bound, likeliest_tokens
from sealign.playground.model_queue import Job
from sealign.playground.page_requests import (
    AnswerRequest,
    ConversationRequest,
    DownloadRequest,
    EditsRequest,
    EffectsRequest,
    PageRequest,
)
from sealign.serving.settings import REQUEST_KEY

LIKELIEST = 20
"""Number of tokens whose log-probabilities are asked for at each position; vLLM's own limit by default."""

NOT_OFFERED = (
    "With --server, the page does not load, fit, search, save, download or push edits, because the server holds the "
    "model and its edits; start sealign playground without --server for that"
)
"""What the page says of the parts that it lacks."""


class ServedPlayground:
    """A model on a server, and the edits there, each of which has the strength with which the server loaded it.

    A request to the server selects one edit at most.

    Args:
        url: URL of the server, with or without ``/v1``.
        edits: Names of edits on the server.
        api_key: API key of the server. Default: the variable ``OPENAI_API_KEY``.

    Attributes:
        at_once: Number of jobs that are sent to the server at the same time.

    Raises:
        ServingError: The server cannot be reached, does not know an edit, or is not one of ``sealign serve``.
    """

    at_once = 8

    def __init__(self, url: str, edits: Sequence[str], *, api_key: str | None = None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self._connection: dict[str, Any] = {"base_url": f"{self._url}/v1", "api_key": key, "max_retries": 1}
        self._client = OpenAI(**self._connection)
        self._edits = list(edits)
        with self._errors():
            self._model = next(model.id for model in self._client.models.list())
        for name in self._edits:
            with self._errors():
                self._client.completions.create(model=self._model, prompt=[0], max_tokens=1, **self._selecting(name))
        self._refuse_other_server()

    def describe(self) -> dict[str, Any]:
        """Return what the page shows of the model and its edits at first, as values that JSON can hold."""
        edit: dict[str, Any] = {
            "method": "with the server's strength",
            "site": None,
            "layers": [],
            "strength": None,
            "remarks": [],
        }
        return {
            "model": f"{self._model} at {self._url}",
            "edits": [edit | {"name": name} for name in self._edits],
            "folders": None,
            "template_arguments": {},
            "methods": [],
            "search": None,
            "not_offered": NOT_OFFERED,
        }

    def answer(self, request: AnswerRequest, job: Job) -> None:
        """Stream both answers at the same time, and report each token and each end.

        Args:
            request: The message, the conversation before it, and the settings.
            job: Job to report to.

        Raises:
            ServingError: The server refuses the request, or is gone.
            SettingError: A setting is out of range.
        """
        sampling = request.sampling
        settings: dict[str, Any] = {"temperature": 0, "max_tokens": request.max_new_tokens}
        if sampling is not None:
            settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
        names = {BASE_ARM: None, EDITED_ARM: self._selected(request)}

        async def stream_both() -> None:
            async with AsyncOpenAI(**self._connection) as client, asyncio.TaskGroup() as group:
                watching = group.create_task(_watch(job))
                await asyncio.wait(
                    [
                        group.create_task(self._stream(client, request, job, arm, name, settings))
                        for arm, name in names.items()
                    ]
                )
                watching.cancel()

        with self._errors():
            try:
                asyncio.run(stream_both())
            except BaseExceptionGroup as group:  # the first error has cancelled the other answer
                raise group.exceptions[0] from None

    async def _stream(
        self, client: AsyncOpenAI, request: AnswerRequest, job: Job, arm: str, name: str | None, settings: Any
    ) -> None:
        extra = {"return_token_ids": True, "chat_template_kwargs": request.template_arguments}
        stream: Any = await client.chat.completions.create(
            model=self._model,
            messages=_messages(request, arm),  # type: ignore[arg-type]
            stream=True,
            **settings,
            **self._selecting(name, extra),
        )
        text, complete = "", False
        async for chunk in stream:
            for choice in chunk.choices:
                piece = choice.delta.content or ""
                ids = getattr(choice, "token_ids", None) or []
                text += piece
                complete = choice.finish_reason == "stop"
                for index, token in enumerate(ids):
                    last = index == len(ids) - 1
                    job.tell("token", arm=arm, id=token, text=piece if index == 0 else "", end=complete and last)
        job.tell("end", arm=arm, text=text.strip(), complete=complete)

    def effects(self, request: EffectsRequest, job: Job) -> None:
        """Score an answer under both models, and report what the edit does at each token.

        The server gives the likeliest tokens only, so the divergence is a lower bound; see ``divergence_bound``.

        Args:
            request: The conversation and the answer.
            job: Job to report to.

        Raises:
            ServingError, SettingError: As for ``answer``.
        """
        name = self._selected(request)
        with self._errors():
            prompt = self._tokenize(request)
            base, edited = (self._positions([*prompt, *request.answer], each)[len(prompt) :] for each in (None, name))
        tokens: list[dict[str, Any]] = []
        for token, before, after in zip(request.answer, base, edited, strict=True):
            tokens.append(
                {
                    "name": before[token][1],
                    "divergence": divergence_bound(before, after),
                    "base": before[token][0],
                    "edited": after[token][0],
                    "base_alternatives": likeliest_tokens(before),
                    "edited_alternatives": likeliest_tokens(after),
                }
            )
        divergences = [effect["divergence"] for effect in tokens]
        job.tell("effects", mean_divergence=float(np.mean(divergences)), at_least=True, tokens=tokens)

    def damage(self, request: EditsRequest, job: Job) -> None:
        """Measure an edit on the bundled neutral text, and report the progress and the result.

        Args:
            request: The edit.
            job: Job to report to.

        Raises:
            ServingError, SettingError: As for ``answer``; or no edit is switched on.
        """
        name = self._selected(request)
        if name is None:
            raise SettingError("no edit is switched on, so there is no damage to measure; switch one on")
        rows: list[list[float]] = []
        texts = neutral_texts()
        for done, text in enumerate(texts):
            job.check()
            job.tell("progress", done=done, total=len(texts))
            with self._errors():
                ids = self._post("tokenize", {"model": self._model, "prompt": text})["tokens"]
                base, edited = (self._positions(ids, each)[1:] for each in (None, name))
            losses = [np.mean([-p[i][0] for p, i in zip(arm, ids[1:], strict=True)]) for arm in (base, edited)]
            bounds = [divergence_bound(before, after) for before, after in zip(base, edited, strict=True)]
            rows.append([len(ids) - 1.0, *map(float, losses), float(np.mean(bounds))])
        tokens, base_losses, edited_losses, divergences = np.array(rows).T
        job.tell(
            "damage",
            texts=len(rows),
            loss_increase=float(np.average(edited_losses - base_losses, weights=tokens)),
            loss_interval=list(increase_interval(tokens, base_losses, edited_losses)),
            divergence=float(np.average(divergences, weights=tokens)),
            divergence_interval=list(increase_interval(tokens, np.zeros_like(divergences), divergences)),
            at_least=True,
        )

    def load(self, request: PageRequest, job: Job) -> None:  # noqa: ARG002
        """Raise: edits are not made and do not leave the page where a server runs the model.

        Raises:
            SettingError: Always.
        """
        raise SettingError(NOT_OFFERED)

    fit = search = save = forms = push = load

    def download(self, request: DownloadRequest, job: Job, *, folder: Path) -> None:  # noqa: ARG002
        """Raise, as ``load`` does."""
        self.load(request, job)

    def _selected(self, request: EditsRequest) -> str | None:
        """Return the name of the edit that a request switches on, or None."""
        if len(request.edits) > 1:
            raise SettingError(
                f"{len(request.edits)} edits are switched on, but a request to the server selects one; switch off the "
                "others"
            )
        for edit in request.edits:
            if edit.name not in self._edits:
                raise SettingError(f"unknown edit '{edit.name}'; choose one of: {', '.join(self._edits) or 'none'}")
            if edit.strength is not None:
                raise SettingError(f"strength is {edit.strength:g}, but the server sets it; leave it out")
            return edit.name
        return None

    def _selecting(self, name: str | None, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the argument of the client that selects an edit, beside other keys of the body."""
        return {"extra_body": dict(extra or {}) | ({} if name is None else {"vllm_xargs": {REQUEST_KEY: name}})}

    def _tokenize(self, request: ConversationRequest) -> list[int]:
        body = {
            "model": self._model,
            "messages": _messages(request, EDITED_ARM),
            "chat_template_kwargs": request.template_arguments,
        }
        return list(self._post("tokenize", body)["tokens"])

    def _post(self, path: str, body: Any) -> Any:
        """Return the answer of a route of vLLM's own, which is not below ``/v1``."""
        return self._client.post(f"{self._url}/{path}", cast_to=object, body=body)

    def _positions(self, ids: Sequence[int], name: str | None) -> list[ListedTokens]:
        """Return the log-probabilities at each position of a text; nothing at the first."""
        answer: Any = self._client.completions.create(
            model=self._model,
            prompt=list(ids),
            max_tokens=1,
            temperature=0,
            **self._selecting(name, {"prompt_logprobs": LIKELIEST}),
        )
        return [
            {int(token): (entry["logprob"], entry["decoded_token"] or token) for token, entry in (found or {}).items()}
            for found in answer.choices[0].prompt_logprobs
        ]

    def _refuse_other_server(self) -> None:
        """Raise unless the server rejects an edit that it does not know: others ignore the key, and edit nothing."""
        try:
            with self._errors():
                self._client.completions.create(
                    model=self._model, prompt=[0], max_tokens=1, **self._selecting("no edit has this name")
                )
        except ServingError as error:
            if isinstance(error.__cause__, NotFoundError):
                return
            raise
        raise ServingError(f"the server at {self._url} ignores edits; start it with sealign serve")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OpenAIError as error:
            raise ServingError(f"the server at {self._url} did not answer: {first_sentence(error)}") from error


async def _watch(job: Job) -> None:
    """Raise when a job is stopped, also while the server lets it wait."""
    while True:
        job.check()
        await asyncio.sleep(0.1)


def _messages(request: ConversationRequest, arm: str) -> list[dict[str, str]]:
    """Return the conversation of an arm, in which its own answers were given."""
    if not request.message.strip():
        raise SettingError("the message is empty; write one")
    found = [] if not request.system else [{"role": "system", "content": request.system}]
    for exchange in request.earlier:
        found.append({"role": "user", "content": exchange.user})
        found.append({"role": "assistant", "content": getattr(exchange, arm)})
    return [*found, {"role": "user", "content": request.message}]
