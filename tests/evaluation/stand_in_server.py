"""A stand-in for a server of ``sealign serve``: its routes, answered in this process by a tiny model with hooks."""

from __future__ import annotations

import contextlib
import json
import threading
from email.message import Message
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request

import pytest
import torch

import sealign

TOKEN = "only-for-tests"
URL = "http://127.0.0.1:9"


class StandInServer:
    """Answers the requests of ``ServedModel``; ``asked`` counts the completions by model."""

    def __init__(self, model: Any, folder: Path, *, context: int, slots: int = 1) -> None:
        self.asked: dict[str, int] = {}
        self.edits: dict[str, sealign.Edit] = {}
        self._model = model
        self._folder = folder
        self._context = context
        self._slots = slots
        self._lock = threading.Lock()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the requests of ``ServedModel`` come here."""
        monkeypatch.setattr("sealign.evaluation.served_model.urlopen", self.urlopen)
        monkeypatch.setenv("SEALIGN_ADMIN_TOKEN", TOKEN)

    def urlopen(self, request: Request, timeout: float) -> BytesIO:
        with self._lock:  # hooks are attached to the one model
            status, found = self.answer(request)
        content = BytesIO(json.dumps(found).encode())
        if status != 200:
            raise HTTPError(request.full_url, status, "refused", Message(), content)
        return content

    def answer(self, request: Request) -> tuple[int, Any]:
        assert isinstance(request.data, bytes | None)
        path, body = request.full_url.removeprefix(URL), json.loads(request.data or b"{}")
        if path == "/v1/models":
            return 200, {"data": [{"id": "tiny", "max_model_len": self._context}]}
        if path == "/version":
            return 200, {"version": "0.32.0"}
        if path.startswith("/sealign/edits"):
            if request.get_header("Authorization") != f"Bearer {TOKEN}":
                return 401, {"detail": "this route needs the administrator's token"}
            return self._administer(request.get_method(), path.removeprefix("/sealign/edits").lstrip("/"), body)
        return self._complete(body)

    def _administer(self, method: str, name: str, body: dict[str, str]) -> tuple[int, Any]:
        if method == "POST":
            if len(self.edits) == self._slots:
                return 409, {"error": {"message": "all slots are taken; unload an edit"}}
            self.edits[body["name"]] = sealign.Edit.from_pretrained(self._folder / body["name"])
        elif method == "DELETE":
            del self.edits[name]
        return 200, [{"name": name, "hash": edit.hash} for name, edit in self.edits.items()]

    @torch.no_grad()
    def _complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        name, ids = body["model"], body["prompt"]
        self.asked[name] = self.asked.get(name, 0) + 1
        if len(ids) + body["max_tokens"] > self._context:
            return 400, {"error": {"message": f"{len(ids)} tokens are too many"}}
        edit = self.edits.get(name)
        with contextlib.nullcontext() if edit is None else sealign.apply_edit(self._model, edit):
            logs = torch.log_softmax(self._model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
            found = self._model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=body["max_tokens"],
                do_sample=False,
                eos_token_id=body.get("stop_token_ids"),
                pad_token_id=0,
            )[0, len(ids) :].tolist()
        choice: dict[str, Any] = {"token_ids": found}
        if "prompt_logprobs" in body:
            entries = [
                {str(token): {"logprob": float(row[token]), "rank": int((row > row[token]).sum()) + 1}}
                for row, token in zip(logs, ids[1:], strict=False)
            ]
            choice["prompt_logprobs"] = [None, *entries]
        return 200, {"choices": [choice]}
