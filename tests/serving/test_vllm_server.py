"""``sealign serve`` for real: vLLM on this machine's CPU, against the hooks."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import math
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from typer.testing import CliRunner

import sealign
from sealign import LEACEConfig, MeanDifferenceConfig, SEAConfig
from sealign.cli.app import app
from sealign.errors import ExportError
from sealign.export.verify import compare_outputs, reference_outputs
from sealign.fitting.edit_config import EditConfig
from sealign.serving.client import server_outputs
from tests.edit_server import TOKEN, EditServer, completion_body, engine_command

pytestmark = [pytest.mark.engines, pytest.mark.slow, pytest.mark.timeout(900)]

COUNT = 12
NEAR = 2e-3
"""Two next tokens whose logits are nearer than this may change places between two ways of adding the same numbers."""

QUESTIONS = (
    "The capital of France is",
    "What happens if you swallow chewing gum? I think that",
    "To repair a puncture, first find the hole:",
    "My grandmother always said that",
    "Water boils at",
    "The three largest cities of the country are",
    "def fibonacci(n):",
    "Is it true that bats are blind?",
)
EDITS: dict[str, EditConfig] = {
    "linear": SEAConfig(layers="last:10", rank=(4, 9), normalization="none", combine="negative"),
    "rescaled": SEAConfig(layers="last:8", explained_variance=0.9, centered=True, strength=0.5),
    "tanh": SEAConfig(layers="last:5", site="attention", feature_map="tanh", combine="positive", strength=0.3),
    "stream": SEAConfig(layers="last:6", site="residual", rank=(3, 12), combine="negative", strength=0.3),
    "shift": MeanDifferenceConfig(layers=(10, 14), strength=2.0),
    "erased": LEACEConfig(site="mlp", layers=(12, 20), strength=3.0),
    "later": SEAConfig(layers=(20, 24), rank=(2, 5), centered=True),
    "later-lora": SEAConfig(layers="last:9", rank=(2, 7), normalization="none", combine="negative"),
}
STARTED = ("linear", "rescaled", "tanh", "stream", "shift", "erased")
ARMS = (None, *STARTED, "model:linear")
"""How requests ask for them; ``model:`` is by the name of a model, which LoRAs have."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module")
def edits(smollm2: Any, folder: Path) -> dict[str, sealign.Edit]:
    model, tokenizer = smollm2
    demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=40)
    made = {}
    for name, config in EDITS.items():
        made[name] = sealign.fit_edit(model, tokenizer, demonstrations, config=config)
        made[name].save_pretrained(folder / "edits" / name)
    return made


Answer = tuple[list[int], list[float]]


def answer_by_hooks(model: Any, ids: Sequence[int], count: int = COUNT) -> Answer:
    """Greedy ids, and at each by how much its logit is ahead of the next."""
    tensor = torch.tensor([list(ids)])
    output = model.generate(
        tensor,
        attention_mask=torch.ones_like(tensor),
        max_new_tokens=count,
        do_sample=False,
        temperature=None,
        top_p=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ahead = [float(-logits[0].topk(2).values.diff()) for logits in output.logits]
    return output.sequences[0, len(ids) :].tolist(), ahead


def assert_same(found: Sequence[int], expected: Answer) -> None:
    """The same ids, up to the first that was a close call."""
    ids, ahead = expected
    sure = next((i for i, margin in enumerate(ahead) if margin < NEAR), len(ids))
    assert list(found[:sure]) == ids[:sure]
    assert sure == len(ids) or len(found) >= sure


@pytest.fixture(scope="module")
def prompts(smollm2: Any) -> list[list[int]]:
    return [smollm2[1].encode(question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def expected(smollm2: Any, edits: dict[str, sealign.Edit], prompts: list[list[int]]) -> dict[str | None, list[Answer]]:
    """By hooks: what each edit, and none, makes of each prompt."""
    model, _ = smollm2
    found: dict[str | None, list[Answer]] = {None: [answer_by_hooks(model, ids) for ids in prompts]}
    for name, edit in edits.items():
        with sealign.apply_edit(model, edit):
            found[name] = [answer_by_hooks(model, ids) for ids in prompts]
    return found


def start(folder: Path, names: Sequence[str], *more: str, log: str, token: str | None = TOKEN) -> EditServer:
    named = [argument for edit in names for argument in ("--edit", f"{edit}={folder / 'edits' / edit}")]
    return EditServer(folder, *named, "--enable-prompt-tokens-details", *more, name=log, token=token)


@pytest.fixture(scope="module")
def servers(
    folder: Path,
    edits: dict[str, sealign.Edit],  # noqa: ARG001  saves the edits
) -> Iterator[tuple[EditServer, EditServer]]:
    """A server with both routes and one without LoRAs, which vLLM on a CPU compiles only then; they start together."""
    with contextlib.ExitStack() as stack:
        both = (
            start(folder, STARTED, "--edits-dir", str(folder / "edits"), log="server"),
            start(folder, STARTED, "--no-lora", log="compiled", token=None),
        )
        for running in both:
            stack.callback(running.stop, signal.SIGTERM)
        for running in both:
            running.wait()
        yield both


@pytest.fixture
def server(servers: tuple[EditServer, EditServer]) -> EditServer:
    return servers[0]


def test_the_edits_of_the_tests_change_answers(expected: dict[str | None, list[Answer]]) -> None:
    for name in EDITS:
        assert sum(a[0] != b[0] for a, b in zip(expected[name], expected[None], strict=True)) >= 3, name


def check_answers(
    server: EditServer,
    prompts: list[list[int]],
    expected: dict[str | None, list[Answer]],
    arms: Sequence[str | None],
) -> None:
    for name in arms:
        wanted = expected[name.removeprefix("model:") if name else None]
        for ids, answer in zip(prompts, wanted, strict=True):
            assert_same(server.complete(ids, name), answer)


def test_verify(server: EditServer, smollm2: Any, folder: Path, edits: dict[str, sealign.Edit]) -> None:
    model, tokenizer = smollm2
    deployed = {name: server_outputs(server.url, name, tokenizer) for name in STARTED}
    for name in STARTED:
        base, edited = reference_outputs(model, tokenizer, edits[name])
        agreement = compare_outputs(name, base, edited, deployed[name], tolerance=1e-3)
        assert agreement.passed, agreement
        assert agreement.applied == pytest.approx(1.0, abs=0.01)
        another = deployed["tanh" if name != "tanh" else "rescaled"]
        assert not compare_outputs(name, base, edited, another, tolerance=1e-3).passed
        assert not compare_outputs(
            name, base, edited, server_outputs(server.url, "smollm2", tokenizer), tolerance=9
        ).fired
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
    body = completion_body(prompts[1], "rescaled", COUNT) | {"n": 3, "temperature": 1e-3, "seed": 1}
    for choice in server.post("/v1/completions", **body).json()["choices"]:
        assert_same(choice["token_ids"], expected["rescaled"][1])


def streamed(server: EditServer, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with requests.post(
        f"{server.url}/v1/completions", json=body | {"stream": True}, stream=True, timeout=120
    ) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                yield json.loads(line.removeprefix(b"data: "))


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
        wanted = answer_by_hooks(model, ids)
    body = {"model": "smollm2", "messages": messages, "max_tokens": COUNT, "temperature": 0, "return_token_ids": True}
    answer = server.post("/v1/chat/completions", **body, vllm_xargs={"sealign_edit": "rescaled"}).json()
    assert_same(answer["choices"][0]["token_ids"], wanted)


def cached_tokens(server: EditServer, ids: list[int], edit: str | None, **more: Any) -> tuple[int, list[int]]:
    answer = server.post("/v1/completions", **completion_body(ids, edit, 8, **more)).json()
    details = answer["usage"]["prompt_tokens_details"] or {}
    return details.get("cached_tokens") or 0, answer["choices"][0]["token_ids"]


def check_isolation(
    server: EditServer,
    smollm2: Any,
    edits: dict[str, sealign.Edit],
    arms: Sequence[str | None],
) -> None:
    model, tokenizer = smollm2
    text = (Path(sealign.__file__).parent / "demonstrations" / "data" / "neutral.txt").read_text()
    for shift, first in enumerate(arms):
        ids = tokenizer.encode(text)[60 * shift :][:400]
        order = [first, *(arm for arm in arms if arm != first)]
        answers = {}
        for arm in order:  # all with the same prompt: none may find blocks of one before it
            cached, answers[arm] = cached_tokens(server, ids, arm)
            assert cached == 0, arm
        for arm in order:  # each finds its own
            cached, again = cached_tokens(server, ids, arm)
            assert cached >= 256, arm
            assert again == answers[arm]
        assert_same(answers[None], answer_by_hooks(model, ids, 8))
        for arm in ("rescaled", "tanh"):
            with sealign.apply_edit(model, edits[arm]):
                assert_same(answers[arm], answer_by_hooks(model, ids, 8))
    # A client's own salt still keeps its blocks apart, with an edit and without.
    ids = tokenizer.encode(text)[300:700]
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
        (404, "does not exist", {"model": "tanh"}),
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


def test_only_the_administrator_sees_and_changes_edits(server: EditServer) -> None:
    for method, path, body in (("GET", "", {}), ("POST", "", {"name": "later"}), ("DELETE", "/tanh", {})):
        for token in (None, "wrong", ""):
            assert server.admin(method, path, token=token, **body).status_code == 401
    listed = {edit["name"]: edit["route"] for edit in server.admin("GET").json()}
    assert listed == {name: "lora" if name == "linear" else "plugin" for name in STARTED}


@pytest.mark.parametrize("name", ["../edits/later", "/etc", "..", "", "absent", "owner/name", "later\n", "x" * 200])
def test_what_is_loaded_is_named_and_never_a_path(server: EditServer, name: str) -> None:
    answer = server.admin("POST", name=name)
    assert answer.status_code in (404, 409)
    assert server.admin("POST", name="later", folder="/etc").status_code == 400


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
                    assert (answer.status_code, answer.json()["route"]) == (200, route)
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


def long_body(prompt: list[int], edit: str) -> dict[str, Any]:
    """A request for 16,000 tokens, so that what a test does meanwhile is in its middle."""
    return completion_body(prompt, edit, 1000) | {"ignore_eos": True, "n": 16, "temperature": 1.0}


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
    servers: tuple[EditServer, EditServer],
    smollm2: Any,
    edits: dict[str, sealign.Edit],
    prompts: list[list[int]],
    expected: dict[str | None, list[Answer]],
) -> None:
    """Without LoRAs vLLM compiles the model, with the operators in its graph; an administrator is not provided for."""
    _, server = servers
    log = server.log.read_text()
    assert "'mode': <CompilationMode.DYNAMO_TRACE_ONCE" in log
    assert "Warming up model for the compilation" in log
    check_answers(server, prompts, expected, arms=(None, *STARTED))
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
    monkeypatch.setattr("sealign.serving.launch.find_spec", lambda _: True)  # as in the engines' environment
    for arguments, says in cases.items():
        result = CliRunner().invoke(app, ["serve", *arguments])
        assert result.exit_code == 2, arguments
        assert says in result.stderr
