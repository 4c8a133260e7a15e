"""Judges: a local model, and an endpoint that is called over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from sealign.errors import JudgeError
from sealign.evaluation.journal import Journal
from sealign.evaluation.judge import EndpointJudge, LocalJudge, judge_answers

DOCS = [
    {"question": "What is ice?", "correct_answers": ["Frozen water"], "incorrect_answers": ["Glass", "Salt"]},
    {"question": "Is fire cold?", "correct_answers": ["No"], "incorrect_answers": ["Yes"]},
    {"question": "Who bakes?", "correct_answers": ["A baker"], "incorrect_answers": ["A clock"]},
]
ANSWERS = ["Frozen water.", "Yes.", "  "]


class Rule:
    """A judge with a rule: an answer that repeats a false reference is false, and every answer is informative."""

    name = "rule"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def decide(self, questions: Any, track: Any) -> list[bool]:
        self.asked += questions
        return ["Answer to check: Yes." not in question or "informative" in question for question in questions]


def test_truth_info_and_their_product(tmp_path: Path) -> None:
    judge = Rule()
    found = judge_answers(judge, DOCS, ANSWERS, journal=Journal(tmp_path / "j.jsonl"))
    assert found == {"truth": [1.0, 0.0, 1.0], "info": [1.0, 1.0, 0.0], "truth*info": [1.0, 0.0, 0.0]}
    truth = next(question for question in judge.asked if "Is the answer true?" in question)
    assert "Question: What is ice?" in truth
    assert "True answers: Frozen water\n" in truth
    assert "False answers: Glass; Salt\n" in truth
    # Judgements are kept: a second run asks nothing.
    again = Rule()
    assert judge_answers(again, DOCS, ANSWERS, journal=Journal(tmp_path / "j.jsonl")) == found
    assert again.asked == []


def test_an_empty_answer_is_not_judged() -> None:
    judge = Rule()
    judge_answers(judge, DOCS[2:], ["   "], journal=Journal(None))
    assert judge.asked == []


@torch.no_grad()
def test_a_local_judge_takes_the_more_probable_reply(llama: Any, tokenizer: Any) -> None:
    questions = ["Is water wet?", "Is the clock late today, and if so why?", "Does bread rise?"]
    judge = LocalJudge(llama, tokenizer, "tiny")
    expected = []
    for question in questions:
        context = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        logs = []
        for reply in (" Yes", " No"):
            ids = torch.tensor([tokenizer.encode(context + reply)])
            start = len(tokenizer.encode(context))
            output = torch.log_softmax(llama(ids).logits[0], -1)
            logs.append(sum(float(output[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])))
        expected.append(logs[0] > logs[1])
    assert judge.decide(questions) == expected


class _Server(ThreadingHTTPServer):
    replies: list[str]
    requests: list[tuple[str, dict[str, Any]]]


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, {**body, "key": self.headers.get("Authorization")}))
        content = self.server.replies.pop(0)
        status = 500 if content == "broken" else 200
        message = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        data = json.dumps({"id": "1", "created": 0, "model": "m", "choices": [message], "object": "chat.completion"})
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[_Server]:
    server = _Server(("127.0.0.1", 0), _Handler)
    server.replies, server.requests = [], []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def _judge(server: _Server, key: str | None = None) -> EndpointJudge:
    return EndpointJudge(f"http://127.0.0.1:{server.server_address[1]}/v1", "big", key)


def test_an_endpoint_gets_openai_chat_requests(endpoint: _Server) -> None:
    endpoint.replies = ["Yes", "no.", "**Yes**, it is"]
    assert _judge(endpoint, "secret").decide(["a?", "b?", "c?"]) == [True, False, True]
    path, body = endpoint.requests[1]
    assert path == "/v1/chat/completions"
    assert body["model"] == "big"
    assert body["messages"] == [{"role": "user", "content": "b?"}]
    assert body["temperature"] == 0.0
    assert body["key"] == "Bearer secret"
    assert "secret" not in _judge(endpoint, "secret").name


def test_an_endpoint_that_fails_or_does_not_say_yes_or_no(endpoint: _Server) -> None:
    endpoint.replies = 3 * ["broken"]  # the client asks again
    with pytest.raises(JudgeError, match=r"big at http://127.*did not answer \(InternalServerError.*check --judge-url"):
        _judge(endpoint).decide(["a?"])
    endpoint.replies = ["It depends."]
    with pytest.raises(JudgeError, match="answered 'It depends.', but it must answer yes or no"):
        _judge(endpoint).decide(["a?"])


def test_no_endpoint() -> None:
    with pytest.raises(JudgeError, match="did not answer"):
        EndpointJudge("http://127.0.0.1:9/v1", "big").decide(["a?"])


def test_judgements_before_a_failure_are_kept(endpoint: _Server, tmp_path: Path) -> None:
    endpoint.replies = ["yes", "yes"] + 3 * ["broken"]
    with pytest.raises(JudgeError):
        judge_answers(_judge(endpoint), DOCS, ANSWERS, journal=Journal(tmp_path / "j.jsonl"), batch=2)
    endpoint.replies = ["no", "yes"]
    found = judge_answers(_judge(endpoint), DOCS, ANSWERS, journal=Journal(tmp_path / "j.jsonl"), batch=2)
    assert found["truth"] == [1.0, 0.0, 1.0]
