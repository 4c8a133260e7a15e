"""ServedModel: a model on a server that ``sealign serve`` started, as an engine for evaluations."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
from numpy.typing import NDArray

from sealign.edits.edit import Edit
from sealign.errors import ServingError, first_sentence
from sealign.evaluation.choices import ChoiceRequest, ChoiceScore, OnScored
from sealign.progress import Track, no_progress

TOKEN_VARIABLE = "SEALIGN_ADMIN_TOKEN"
"""Environment variable that holds the administrator's token, here and in the environment of the server."""

_TIMEOUT = 600.0
"""Largest number of seconds to wait for an answer: requests wait in the server's queue."""


class ReadTokens(NamedTuple):
    """What a model on a server makes of the tokens of a text.

    Attributes:
        log_probabilities: Log-probability of each token from the second on, in nats, (t - 1,).
        greedy: Whether each of them is the likeliest token, (t - 1,).
    """

    log_probabilities: NDArray[np.float64]
    greedy: NDArray[np.bool_]


class ServedModel:
    """A model on a server that ``sealign serve`` started with ``--edits-dir``, and the edits loaded there for a while.

    An edit is written into the folder of the server's ``--edits-dir``, loaded by the administrator's route, and removed
    again; the server applies it as the hooks do, or refuses it. The slots of the server must have room for it: an edit
    that is evaluated should be in the folder when the server starts. Requests name the edit as their model.

    Args:
        url: URL of the server, with or without ``/v1``.
        edits_dir: The folder of the server's ``--edits-dir``, as it is seen from here.
        api_key: API key of the server. Default: the variable ``OPENAI_API_KEY``.
        token: The administrator's token. Default: the variable ``SEALIGN_ADMIN_TOKEN``.
        at_once: Number of requests that are sent at the same time. Must be at least 1.

    Attributes:
        name: Name of the base model on the server.
        context_length: Largest number of tokens of a request and its answer.
        version: Version of vLLM.

    Raises:
        ServingError: The server cannot be reached, or is not one of ``sealign serve``.
    """

    def __init__(
        self,
        url: str,
        edits_dir: str | Path,
        *,
        api_key: str | None = None,
        token: str | None = None,
        at_once: int = 32,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.at_once = at_once
        self._folder = Path(edits_dir)
        if not self.url.startswith(("http://", "https://")):
            raise ServingError(f"'{url}' is no URL of a server; write http://HOST:PORT")
        self._client = {"Authorization": f"Bearer {api_key or os.environ.get('OPENAI_API_KEY') or 'none'}"}
        self._administrator = {"Authorization": f"Bearer {token or os.environ.get(TOKEN_VARIABLE, '')}"}
        card = self._ask("GET", "/v1/models")["data"][0]
        self.name: str = card["id"]
        self.context_length: int = card["max_model_len"]
        self.version = str(self._ask("GET", "/version")["version"])
        self._ask("GET", "/sealign/edits", headers=self._administrator)
        if not self._folder.is_dir():
            raise ServingError(f"there is no folder '{self._folder}'; give that of the server's --edits-dir")

    def _ask(self, method: str, path: str, *, headers: Mapping[str, str] | None = None, body: Any = None) -> Any:
        """Return the JSON of an answer."""
        data = None if body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", **(self._client if headers is None else headers)}
        try:
            with urlopen(Request(f"{self.url}{path}", data, sent, method=method), timeout=_TIMEOUT) as answer:
                return json.load(answer)
        except HTTPError as error:
            raise ServingError(f"the server at {self.url} refused {path}: {_reason(error)}") from error
        except (OSError, HTTPException, ValueError) as error:
            raise ServingError(f"the server at {self.url} did not answer: {first_sentence(error)}") from error

    @contextmanager
    def loaded(self, edit: Edit | None) -> Iterator[str]:
        """Load an edit while a ``with`` block runs; a context manager that yields the name that requests give as model.

        Args:
            edit: The edit; None for the base model.

        Raises:
            ServingError: The server refuses the edit.
        """
        if edit is None:
            yield self.name
            return
        served = {
            each["hash"]: each["name"] for each in self._ask("GET", "/sealign/edits", headers=self._administrator)
        }
        if edit.hash in served:
            yield served[edit.hash]
            return
        name = f"evaluated-{edit.hash[:16]}"
        folder = self._folder / name
        shutil.rmtree(folder, ignore_errors=True)  # of an evaluation that was killed
        edit.save_pretrained(folder)
        try:
            self._ask("POST", "/sealign/edits", headers=self._administrator, body={"name": name})
            try:
                yield name
            finally:
                self._ask("DELETE", f"/sealign/edits/{name}", headers=self._administrator)
        finally:
            with suppress(OSError):
                shutil.rmtree(folder)

    def read(self, texts: Sequence[Sequence[int]], model: str) -> Iterator[tuple[int, ReadTokens]]:
        """Yield (index of the text, what the model makes of its tokens), in the order in which answers come.

        Args:
            texts: Token ids of each text, at least 2, and fewer than ``context_length``.
            model: Name of the model or edit.

        Raises:
            ServingError: The server refuses a text.
        """
        yield from self._at_once([lambda ids=ids: self._read(ids, model) for ids in texts])  # type: ignore[misc]

    def _read(self, ids: Sequence[int], model: str) -> ReadTokens:
        answer = self._complete(model, ids, max_tokens=1, prompt_logprobs=0)
        entries = [entry[str(token)] for entry, token in zip(answer["prompt_logprobs"][1:], ids[1:], strict=True)]
        logs = np.array([float(entry["logprob"]) for entry in entries])
        return ReadTokens(logs, np.array([entry["rank"] == 1 for entry in entries], dtype=np.bool_))

    def score_choices(
        self, requests: Sequence[ChoiceRequest], model: str, *, track: Track = no_progress, on_scored: OnScored
    ) -> None:
        """Score continuations as ``sealign.evaluation.score_choices`` does, each in a request of its own.

        Args:
            requests: Contexts and continuations.
            model: Name of the model or edit.
            track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.
            on_scored: Called with (index of the request, its scores) of the requests that are finished.
        """
        where = [(index, branch) for index, each in enumerate(requests) for branch in range(len(each.continuations))]
        texts = [(*requests[index].context, *requests[index].continuations[branch]) for index, branch in where]
        scores: list[dict[int, ChoiceScore]] = [{} for _ in requests]
        for number, read in track(self.read(texts, model), "Scoring", len(texts)):
            index, branch = where[number]
            start = len(requests[index].context) - 1
            scores[index][branch] = ChoiceScore(
                float(read.log_probabilities[start:].sum()), bool(read.greedy[start:].all())
            )
            if len(scores[index]) == len(requests[index].continuations):
                on_scored([(index, [scores[index][each] for each in sorted(scores[index])])])

    def answer(
        self, prompts: Sequence[Sequence[int]], model: str, max_new_tokens: int, ends: Sequence[int]
    ) -> list[list[int]]:
        """Return the greedy answers to prompts as token ids, up to and with the first end token.

        Args:
            prompts: Token ids of the prompts.
            model: Name of the model or edit.
            max_new_tokens: Maximum number of tokens of an answer. Must be at least 1.
            ends: Token ids that end an answer.
        """
        found: list[list[int]] = [[] for _ in prompts]

        def ask(ids: Sequence[int]) -> list[int]:
            return list(self._complete(model, ids, max_tokens=max_new_tokens, stop_token_ids=list(ends))["token_ids"])

        for index, answer in self._at_once([lambda ids=ids: ask(ids) for ids in prompts]):  # type: ignore[misc]
            found[index] = answer
        return found

    def _complete(self, model: str, ids: Sequence[int], **settings: Any) -> Any:
        body = {"model": model, "prompt": list(ids), "temperature": 0, "return_token_ids": True} | settings
        return self._ask("POST", "/v1/completions", body=body)["choices"][0]

    def _at_once(self, calls: Iterable[Callable[[], Any]]) -> Iterator[tuple[int, Any]]:
        """Yield (index, result) of calls as they end; the first error ends those that have not begun."""
        with ThreadPoolExecutor(self.at_once) as pool:
            futures: dict[Future[Any], int] = {pool.submit(call): index for index, call in enumerate(calls)}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                for future in futures:
                    future.cancel()


def _reason(error: HTTPError) -> str:
    """Return why a server refused a request: its own words, if it has some."""
    with suppress(ValueError, KeyError, TypeError):
        found = json.load(error)
        return str(found["error"]["message"] if "error" in found else found["detail"])
    return f"status {error.code}"
