"""A stand-in for ``sealign serve``: a tiny model behind the routes of vLLM that the playground uses."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import sealign


class StubServer:
    """The server's state.

    Args:
        model, tokenizer: A tiny model.
        edits: Edits by name.
        knows_edits: Whether requests select edits, as ``sealign serve`` does, and plain vLLM does not.
    """

    def __init__(
        self, model: Any, tokenizer: Any, edits: Mapping[str, sealign.Edit], *, knows_edits: bool = True
    ) -> None:
        self.model, self.tokenizer, self.edits, self.knows_edits = model, tokenizer, edits, knows_edits
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.pause = 0.0
        self.fail = False
        routes = [
            Route("/v1/models", self.models),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        self.application = Starlette(routes=routes)

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    async def tokenize(self, request: Request) -> Response:
        body = await request.json()
        return JSONResponse(
            {"tokens": self.prompt(body) if "messages" in body else self.tokenizer.encode(body["prompt"])}
        )

    def prompt(self, body: Any) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            body["messages"], tokenize=False, add_generation_prompt=True, **body.get("chat_template_kwargs", {})
        )
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def refused(self, body: Any) -> Response | None:
        self.requests.append(body)
        name = body.get("vllm_xargs", {}).get("sealign_edit")
        if self.fail:
            return JSONResponse({"error": {"message": "the engine is dead. Sorry", "code": 500}}, status_code=500)
        if self.knows_edits and name is not None and name not in self.edits:
            return JSONResponse({"error": {"message": f"there is no edit '{name}'", "code": 404}}, status_code=404)
        return None

    @torch.no_grad()
    def logits(self, ids: list[int], body: Any) -> torch.Tensor:
        name = body.get("vllm_xargs", {}).get("sealign_edit")
        edit = self.edits.get(name) if self.knows_edits else None
        # Requests are answered in several threads.
        with self.lock, nullcontext() if edit is None else sealign.apply_edit(self.model, edit):
            return self.model(input_ids=torch.tensor([ids])).logits[0]  # type: ignore[no-any-return]

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        if (refusal := self.refused(body)) is not None:
            return refusal
        choice: dict[str, Any] = {"index": 0, "text": "x", "finish_reason": "length"}
        if "prompt_logprobs" in body:
            logs = torch.log_softmax(self.logits(body["prompt"], body).double(), dim=-1)
            choice["prompt_logprobs"] = [None]
            for row, token in zip(logs, body["prompt"][1:], strict=False):
                kept = {*row.topk(body["prompt_logprobs"]).indices.tolist(), token}
                choice["prompt_logprobs"].append(
                    {str(i): {"logprob": float(row[i]), "decoded_token": self.tokenizer.decode([i])} for i in kept}
                )
        return JSONResponse(
            {"id": "1", "object": "text_completion", "created": 0, "model": "tiny", "choices": [choice]}
        )

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        if (refusal := self.refused(body)) is not None:
            return refusal
        return StreamingResponse(self.chunks(body), media_type="text/event-stream")

    def chunks(self, body: Any) -> Iterator[str]:
        """Greedy decoding, a token a chunk; the end token comes in the last one."""
        ids = self.prompt(body)
        for number in range(body["max_tokens"]):
            time.sleep(self.pause)
            token = int(self.logits(ids, body)[-1].argmax())
            ids.append(token)
            ends = token == self.model.generation_config.eos_token_id
            reason = "stop" if ends else "length" if number + 1 == body["max_tokens"] else None
            text = "" if ends else self.tokenizer.decode([token])
            choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason, "token_ids": [token]}
            chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "tiny", "choices": [choice]}
            yield f"data: {json.dumps(chunk)}\n\n"
            if ends:
                break
        yield "data: [DONE]\n\n"


@contextmanager
def running(application: Any) -> Iterator[str]:
    """Serve an application in a thread, and return its address."""
    server = uvicorn.Server(uvicorn.Config(application, port=0, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()
