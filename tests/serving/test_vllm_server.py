"""``sealign serve`` for real: vLLM on this machine's CPU, against the hooks."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import http.client
import itertools
import math
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import requests
from typer.testing import CliRunner

import sealign
from sealign.cli.app import app
from sealign.errors import ExportError
from sealign.export.verify import compare_outputs, model_outputs
from sealign.serving.client import server_outputs
from tests.edit_server import TOKEN, EditServer, completion_body, engine_command
from tests.serving.served_model import (
    COUNT,
    EDITS,
    ON_SERVER,
    STARTED,
    Answer,
    answers_by_hooks,
    assert_same,
    cached_tokens,
    long_body,
    start,
    streamed,
)

pytestmark = ON_SERVER

ARMS = (None, *STARTED, "model:linear", "model:rescaled", "model:stream")
"""How requests ask for them; ``model:`` is by the name of a model, which LoRAs have."""


def test_the_edits_of_the_tests_change_answers(expected: dict[str | None, list[Answer]]) -> None:
    for name in EDITS:
        assert sum(a[0] != b[0] for a, b in zip(expected[name], expected[None], strict=True)) >= 3, name
    # The gate is closed for some tokens, too.
    assert sum(a[0] != b[0] for a, b in zip(expected["gated"], expected["shift"], strict=True)) >= 3


def check_answers(
    server: EditServer,
    prompts: list[list[int]],
    expected: dict[str | None, list[Answer]],
    arms: Sequence[str | None],
) -> None:
    """One arm after another, each with all prompts at once; single requests are made by other tests."""
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        for name in arms:
            wanted = expected[name.removeprefix("model:") if name else None]
            answers = pool.map(functools.partial(server.complete, edit=name), prompts)
            for found, answer in zip(answers, wanted, strict=True):
                assert_same(found, answer)


def test_verify(server: EditServer, smollm2: Any, folder: Path, edits: dict[str, sealign.Edit]) -> None:
    model, tokenizer = smollm2
    # Answers are compared by other tests, so a short one is enough beside the log-probabilities of the prompts.
    deployed = {name: server_outputs(server.url, name, tokenizer, max_new_tokens=2) for name in (*STARTED, "smollm2")}
    base = model_outputs(model, tokenizer, max_new_tokens=2)
    for name in STARTED:
        with sealign.apply_edit(model, edits[name]):
            edited = model_outputs(model, tokenizer, max_new_tokens=2)
        agreement = compare_outputs(name, base, edited, deployed[name], tolerance=1e-3)
        assert agreement.passed, agreement
        assert agreement.applied == pytest.approx(1.0, abs=0.01)
        another = deployed["tanh" if name != "tanh" else "rescaled"]
        assert not compare_outputs(name, base, edited, another, tolerance=1e-3).passed
        assert not compare_outputs(name, base, edited, deployed["smollm2"], tolerance=9).fired
    with pytest.raises(ExportError, match="there is no edit 'absent' on this server"):
        server_outputs(server.url, "absent", tokenizer)
    command = ["verify", "--edit", str(folder / "edits" / "rescaled"), "--against"]
    result = CliRunner().invoke(app, [*command, f"vllm={server.url}#rescaled"])
    assert result.exit_code == 0, result.stderr
    assert "equal" in result.stdout
    result = CliRunner().invoke(app, [*command, f"vllm={server.url}"])
    assert result.exit_code == 2
    assert "names no edit; write" in result.stderr


def check_hundreds(
    server: EditServer,
    prompts: list[list[int]],
    expected: dict[str | None, list[Answer]],
    arms: Sequence[str | None],
) -> None:
    pairs = [(arm, number) for number in range(len(prompts)) for arm in arms]
    jobs = pairs * math.ceil(192 / len(pairs))

    def run(job: tuple[str | None, int]) -> list[int]:
        return server.complete(prompts[job[1]], job[0], count=COUNT)

    with concurrent.futures.ThreadPoolExecutor(96) as pool:
        answers = list(pool.map(run, jobs))
    for (arm, number), found in zip(jobs, answers, strict=True):
        assert_same(found, expected[arm.removeprefix("model:") if arm else None][number])


def test_several_prompts_and_several_choices_of_one_request(
    server: EditServer, prompts: list[list[int]], expected: dict[str | None, list[Answer]]
) -> None:
    body = completion_body("", "rescaled", COUNT) | {"prompt": prompts[:3]}
    choices = server.post("/v1/completions", **body).json()["choices"]
    for choice, wanted in zip(choices, expected["rescaled"], strict=False):
        assert_same(choice["token_ids"], wanted)
    assert min(expected["rescaled"][0][1][:6]) > 0.2
    body = completion_body(prompts[0], "rescaled", COUNT) | {"n": 3, "temperature": 0.01, "seed": 1}
    for choice in server.post("/v1/completions", **body).json()["choices"]:
        assert_same(choice["token_ids"], expected["rescaled"][0], near=0.2)  # so far ahead, the others are e^20 rarer


def test_streaming(server: EditServer, prompts: list[list[int]], expected: dict[str | None, list[Answer]]) -> None:
    for name in ("tanh", "model:linear"):
        pieces = list(streamed(server, completion_body(prompts[1], name, COUNT)))
        assert len(pieces) > 5
        ids = [token for piece in pieces for choice in piece["choices"] for token in choice["token_ids"] or ()]
        assert_same(ids, expected[name.removeprefix("model:")][1])


def test_chat(server: EditServer, smollm2: Any, edits: dict[str, sealign.Edit]) -> None:
    model, tokenizer = smollm2
    messages = [{"role": "user", "content": "What happens if you swallow chewing gum?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    with sealign.apply_edit(model, edits["rescaled"]):
        wanted = answers_by_hooks(model, [ids])[0]
    body = {"model": "smollm2", "messages": messages, "max_tokens": COUNT, "temperature": 0, "return_token_ids": True}
    answer = server.post("/v1/chat/completions", **body, vllm_xargs={"sealign_edit": "rescaled"}).json()
    assert_same(answer["choices"][0]["token_ids"], wanted)


def check_isolation(
    server: EditServer,
    smollm2: Any,
    edits: dict[str, sealign.Edit],
    arms: Sequence[str | None],
) -> None:
    model, tokenizer = smollm2
    text = (Path(sealign.__file__).parent / "demonstrations" / "data" / "neutral.txt").read_text()
    for shift, order in enumerate((arms, arms[::-1])):  # each arm comes before and after each other arm
        ids = tokenizer.encode(text)[60 * shift :][:270]  # two blocks of 128, and a part of one
        answers = {}
        for arm in order:  # all with the same prompt: none may find blocks of one before it
            cached, answers[arm] = cached_tokens(server, ids, arm)
            assert cached == 0, arm
        for arm in order:  # each finds its own
            cached, again = cached_tokens(server, ids, arm)
            assert cached >= 256, arm
            assert again == answers[arm]
        assert_same(answers[None], answers_by_hooks(model, [ids], 8)[0])
        for arm in ("rescaled", "tanh"):
            with sealign.apply_edit(model, edits[arm]):
                assert_same(answers[arm], answers_by_hooks(model, [ids], 8)[0])
    # A client's own salt still keeps its blocks apart, with an edit and without.
    ids = tokenizer.encode(text)[300:570]
    for salt in ("one", "other"):
        assert cached_tokens(server, ids, "rescaled", cache_salt=salt)[0] == 0
    assert cached_tokens(server, ids, "rescaled", cache_salt="one")[0] >= 256
    # A client cannot store blocks where an edit's requests look for theirs.
    salt = f"sealign {edits['rescaled'].hash} "
    assert server.post("/v1/completions", **completion_body(ids, None, 4, cache_salt=salt)).status_code == 400


def test_every_edit_answers_as_its_hooks(
    server: EditServer, prompts: list[list[int]], expected: dict[str | None, list[Answer]]
) -> None:
    check_answers(server, prompts, expected, ARMS)


def test_hundreds_at_once_each_get_their_own_edit(
    server: EditServer, prompts: list[list[int]], expected: dict[str | None, list[Answer]]
) -> None:
    check_hundreds(server, prompts, expected, ARMS)


def test_no_request_reads_blocks_that_another_edit_stored(
    server: EditServer, smollm2: Any, edits: dict[str, sealign.Edit]
) -> None:
    check_isolation(server, smollm2, edits, (None, "rescaled", "tanh", "model:linear"))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "says", "change"),
    [
        (404, "no edit 'absent'", {"vllm_xargs": {"sealign_edit": "absent"}}),
        (404, "no edit 'later'", {"vllm_xargs": {"sealign_edit": "later"}}),
        (404, "no edit", {"vllm_xargs": {"sealign_edit": ["tanh"]}}),
        (404, "no edit", {"vllm_xargs": {"sealign_edit": "../edits/tanh"}}),
        (404, "no edit", {"vllm_xargs": {"sealign_edit": ""}}),
        (400, "unknown key", {"vllm_xargs": {"sealign_edits": "tanh"}}),
        (400, "unknown key", {"vllm_xargs": {"sealign_edit": "tanh", "sealign_strength": 2}}),
        (400, "name one of them", {"model": "linear", "vllm_xargs": {"sealign_edit": "tanh"}}),
        (400, "outside vllm_xargs", {"sealign_edit": "tanh"}),
        (400, "outside vllm_xargs", {"extra_body": {"vllm_xargs": {"sealign_edit": "tanh"}}}),
        (400, "name one of them", {"model": "tanh", "vllm_xargs": {"sealign_edit": "linear"}}),
        (404, "does not exist", {"model": "later"}),
    ],
)
def test_an_edit_that_cannot_be_had_is_refused_before_any_token(
    server: EditServer, status: int, says: str, change: dict[str, Any], stream: bool
) -> None:
    body = {"model": "smollm2", "prompt": "The sea is", "max_tokens": 4, "stream": stream} | change
    answer = server.post("/v1/completions", **body)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]
    chat = {k: v for k, v in body.items() if k != "prompt"} | {"messages": [{"role": "user", "content": "The sea?"}]}
    assert server.post("/v1/chat/completions", **chat).status_code == status


def test_paths_that_take_no_edit_refuse_one(server: EditServer) -> None:
    named = {"vllm_xargs": {"sealign_edit": "tanh"}}
    beam = server.post("/v1/completions", model="smollm2", prompt="The sea is", use_beam_search=True, n=2, **named)
    assert beam.status_code == 400
    assert "beam search" in beam.json()["error"]["message"]
    tokens = server.post("/tokenize", model="smollm2", prompt="The sea is", **named)
    assert tokens.status_code == 400
    assert "takes no edits" in tokens.json()["error"]["message"]
    quoted = server.post("/tokenize", model="smollm2", prompt='{"sealign_edit": "tanh"}')
    assert quoted.status_code == 200


@pytest.mark.parametrize(
    "outer",
    [
        '{"model": "smollm2", "prompt": "x", "messages": [], "other": DEEP}',
        '{"model": "smollm2", "prompt": DEEP, "messages": DEEP}',
        '{"model": "smollm2", "prompt": "x", "messages": [], "vllm_xargs": {"sealign_edit": DEEP}}',
        '{"model": "smollm2", "prompt": "x", "messages": [], "chat_template_kwargs": {"a": DEEP}}',
        '{"model": "smollm2", "sealign_edit": DEEP}',
    ],
)
def test_json_that_is_nested_too_deeply_is_a_wrong_request(server: EditServer, outer: str) -> None:
    """Where the limits of the libraries lie is not known here, but none may fail at them."""
    for depth in (200, 900, 1_100, 5_000, 100_000):
        data = outer.replace("DEEP", "[" * depth + "]" * depth)
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/sealign/edits"):
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
            answer = requests.post(f"{server.url}{path}", data=data, headers=headers, timeout=60)
            assert answer.status_code < 500, (path, depth, answer.text[:500])
            assert answer.status_code >= 400 or depth < 100_000, (path, depth)


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(server: EditServer) -> None:
    for path, status in (("/v1/completions", 413), ("/sealign/edits", 401), ("/nothing", 404)):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as connection:
            connection.putrequest("POST", path)
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", str(100 * 2**20))
            connection.endheaders(b'{"prompt": "')
            assert connection.getresponse().status == status


def test_an_edit_named_by_header_or_query_string_is_refused(server: EditServer) -> None:
    body = {"model": "smollm2", "prompt": "The sea is", "max_tokens": 2}
    for headers, query in (({"X-Sealign-Edit": "tanh"}, ""), ({}, "?sealign_edit=tanh")):
        answer = requests.post(f"{server.url}/v1/completions{query}", json=body, headers=headers, timeout=60)
        assert answer.status_code == 400
        assert 'send it as "vllm_xargs"' in answer.json()["error"]["message"]


def test_only_the_administrator_sees_and_changes_edits(server: EditServer) -> None:
    for method, path, body in (("GET", "", {}), ("POST", "", {"name": "later"}), ("DELETE", "/tanh", {})):
        for token in (None, "wrong", ""):
            assert server.admin(method, path, token=token, **body).status_code == 401
    listed = {edit["name"]: edit for edit in server.admin("GET").json()}
    assert {name: edit["route"] for name, edit in listed.items()} == {
        name: "lora" if name == "linear" else "plugin" for name in STARTED
    }
    for name, edit in listed.items():  # when it started, it compared each edit with the hooks
        assert (edit["compared_with"], edit["difference"] < 1e-3) == ("hooks", True), name


@pytest.mark.parametrize("name", ["../edits/later", "/etc", "..", "", "absent", "owner/name", "later\n", "x" * 200])
def test_what_is_loaded_is_named_and_never_a_path(server: EditServer, name: str) -> None:
    answer = server.admin("POST", name=name)
    assert answer.status_code in (404, 409)
    assert server.admin("POST", name="later", folder="/etc").status_code == 400


def test_edits_are_listed_as_models_and_counted(server: EditServer, prompts: list[list[int]]) -> None:
    def counted() -> dict[str, float]:
        text = requests.get(f"{server.url}/metrics", timeout=60).text
        lines = [
            line.rpartition(" ") for line in text.splitlines() if line.startswith("sealign_") and "_created" not in line
        ]
        return {name: float(value) for name, _, value in lines}

    models = requests.get(f"{server.url}/v1/models", timeout=60).json()["data"]
    assert {model["id"]: model.get("parent") for model in models} == {
        "smollm2": None,
        **dict.fromkeys(STARTED, "smollm2"),
    }
    before = counted()
    for arm in ("stream", "model:stream", "model:stream", None):
        server.complete(prompts[0], arm, count=5, ignore_eos=True)
    added = {name: value - before.get(name, 0) for name, value in counted().items() if value != before.get(name)}
    assert added == {
        'sealign_requests_total{edit="stream"}': 3,
        'sealign_prompt_tokens_total{edit="stream"}': 3 * len(prompts[0]),
        'sealign_generated_tokens_total{edit="stream"}': 15,
    }


def test_edits_come_and_go_under_load(
    server: EditServer, prompts: list[list[int]], expected: dict[str | None, list[Answer]]
) -> None:
    finished, answered = threading.Event(), queue.SimpleQueue[int]()
    arms = (None, "rescaled", "model:linear")

    def load(worker: int) -> None:
        for done in itertools.count(worker):
            if finished.is_set():
                return
            arm, number = arms[done % 3], done % len(prompts)
            assert_same(
                server.complete(prompts[number], arm), expected[arm.removeprefix("model:") if arm else None][number]
            )
            answered.put(number)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        workers = [pool.submit(load, worker) for worker in range(6)]
        rounds, end = 0, time.monotonic() + 60
        try:
            while (rounds < 2 or answered.qsize() <= 20) and time.monotonic() < end:
                for name, route in (("later", "plugin"), ("later-lora", "lora")):
                    answer = server.admin("POST", name=name)
                    found = answer.json()
                    assert (answer.status_code, found["route"], found["compared_with"]) == (200, route, "base model")
                    assert server.admin("POST", name=name).status_code == 409
                    for number in (0, 3):
                        assert_same(server.complete(prompts[number], name), expected[name][number])
                    assert server.admin("DELETE", f"/{name}").status_code == 200
                    gone = server.post("/v1/completions", **completion_body(prompts[0], name, 4))
                    assert gone.status_code == 404
                    assert server.admin("DELETE", f"/{name}").status_code == 404
                rounds += 1
        finally:
            finished.set()
        for worker in workers:
            worker.result()
    assert rounds >= 1
    assert answered.qsize() > 20


def test_unloading_waits_for_requests_that_run(
    server: EditServer, prompts: list[list[int]], expected: dict[str | None, list[Answer]]
) -> None:
    assert server.admin("POST", name="later").status_code == 200
    long = streamed(server, long_body(prompts[1], "later"))
    next(long)
    pieces = streamed(server, completion_body(prompts[0], "later", 50) | {"ignore_eos": True})
    ids = list(next(pieces)["choices"][0]["token_ids"])
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        unloading = pool.submit(server.admin, "DELETE", "/later")
        end = time.monotonic() + 20
        while "later" in [edit["name"] for edit in server.admin("GET").json()] and time.monotonic() < end:
            time.sleep(0.05)
        refused = server.post("/v1/completions", **completion_body(prompts[0], "later", 4))
        assert refused.status_code == 404
        ids += [token for piece in pieces for choice in piece["choices"] for token in choice["token_ids"] or ()]
        assert not unloading.done()
        long.close()  # type: ignore[attr-defined]
        assert unloading.result().status_code == 200
    assert len(ids) == 50
    assert_same(ids[:COUNT], expected["later"][0])


def test_a_client_that_leaves_frees_its_edit(server: EditServer, prompts: list[list[int]]) -> None:
    def in_flight() -> int:
        return next(edit["in_flight"] for edit in server.admin("GET").json() if edit["name"] == "tanh")

    pieces = streamed(server, long_body(prompts[0], "tanh"))
    next(pieces)
    assert in_flight() == 1
    pieces.close()  # type: ignore[attr-defined]
    end = time.monotonic() + 20
    while in_flight() and time.monotonic() < end:
        time.sleep(0.2)
    assert in_flight() == 0


def test_killed_and_started_again(
    server: EditServer, folder: Path, prompts: list[list[int]], expected: dict[str | None, list[Answer]]
) -> None:
    """The last test of this server, which is killed in the middle of an answer; the next asks for a key."""
    pieces = streamed(server, long_body(prompts[0], "tanh"))
    next(pieces)
    server.stop(signal.SIGKILL)
    with pytest.raises(requests.RequestException):
        list(pieces)
    more = ("--edits-dir", str(folder / "edits"), "--api-key", "client")
    with start(folder, STARTED, *more, log="restarted") as again:
        assert again.post("/v1/completions", model="smollm2", prompt="The sea is").status_code == 401
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", again.port, timeout=30)) as connection:
            connection.putrequest("POST", "/v1/completions")
            connection.putheader("Content-Length", str(100 * 2**20))
            connection.endheaders(b'{"prompt": "')  # and nothing more
            assert connection.getresponse().status == 401
        headers = {"Authorization": "Bearer client"}
        for name in (None, *STARTED, "model:linear"):
            wanted = expected[name.removeprefix("model:") if name else None]
            for ids, answer in zip(prompts[:3], wanted, strict=False):
                body = completion_body(ids, name, COUNT)
                found = requests.post(f"{again.url}/v1/completions", json=body, headers=headers, timeout=120).json()
                assert_same(found["choices"][0]["token_ids"], answer)
        assert again.admin("POST", token="client", name="later").status_code == 401
        assert again.admin("POST", name="later").status_code == 200


def test_compiled(
    folder: Path,
    smollm2: Any,
    edits: dict[str, sealign.Edit],
    prompts: list[list[int]],
    expected: dict[str | None, list[Answer]],
) -> None:
    """Without LoRAs vLLM compiles the model, with the operators in its graph; an administrator is not provided for.

    It starts when the other servers of this file have ended: memory may not hold both.
    """
    with start(folder, STARTED, "--no-lora", log="compiled", token=None) as server:
        log = server.log.read_text()
        assert "'mode': <CompilationMode.DYNAMO_TRACE_ONCE" in log
        assert "Warming up model for the compilation" in log
        check_hundreds(server, prompts, expected, arms=(None, *STARTED))
        check_isolation(server, smollm2, edits, arms=(None, "rescaled", "tanh"))
        assert server.admin("GET").status_code == 403


@pytest.mark.usefixtures("edits")
def test_what_keeps_a_server_from_starting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rescaled = f"rescaled={folder / 'edits' / 'rescaled'}"
    cases = {
        ("--edit", str(folder / "edits" / "rescaled")): "has no name; write --edit NAME=",
        ("--edit", rescaled, "--edit", rescaled): "two edits have the name 'rescaled'",
        ("--edit", "a/b=" + str(folder)): "cannot name an edit",
        ("--edit", "gone=" + str(folder / "gone")): "gone",
        (): "there is no edit to serve",
        ("--edits-dir", str(folder / "gone")): "there is no folder",
        ("--edit", rescaled, "--additional-config", "{}"): "is set by sealign serve itself",
    }
    command = [engine_command("sealign"), "serve", *next(iter(cases))]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (process.returncode, next(iter(cases.values())) in process.stderr) == (2, True)
    for name, stand_in in {"find_spec": lambda _: True, "vllm_version": lambda: "0.32.0"}.items():
        monkeypatch.setattr(f"sealign.serving.launch.{name}", stand_in)  # as in the engines' environment
    for arguments, says in cases.items():
        result = CliRunner().invoke(app, ["serve", *arguments])
        assert result.exit_code == 2, arguments
        assert says in result.stderr
