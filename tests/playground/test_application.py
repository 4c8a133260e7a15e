"""The application by its requests: answers, effects, damage, loading, and what is refused."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

import sealign
from sealign.demonstrations.splits import split_demonstrations
from sealign.evaluation.damage import measure_damage
from sealign.evaluation.fit_and_judge import fit_and_judge
from sealign.methods.composition import Composition
from sealign.playground import playground as playground_module
from sealign.playground.application import playground_application
from sealign.playground.offered_edits import OfferedEdits
from sealign.playground.page_requests import MAX_BODY
from sealign.playground.pasted_rows import read_pasted
from sealign.playground.playground import Playground
from sealign.playground.token_effects import token_effects
from tests.conftest import our_hooks

STRONG = [{"name": "mild", "strength": 3.0}]
BOTH = [{"name": "mild", "strength": 3.0}, {"name": "shift", "strength": -2.0}]


@pytest.fixture
def client(model: Any, tokenizer: Any, edits: Any, tmp_path: Path) -> Iterator[TestClient]:
    edits["shift"].save_pretrained(tmp_path / "late")
    offered = OfferedEdits(model, tokenizer, edits, folder=tmp_path)
    application = playground_application(Playground(model, tokenizer, offered, name="tiny"))
    with TestClient(application, base_url="http://127.0.0.1:7860") as client:
        yield client


def asked(client: TestClient, job: str, /, **body: Any) -> list[dict[str, Any]]:
    """The events of a request."""
    response = client.post(f"/api/{job}", json=body)
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


def the(events: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (found,) = (event for event in events if event["event"] == name)
    return found


def tokens(events: list[dict[str, Any]], arm: str) -> list[int]:
    return [event["id"] for event in events if event["event"] == "token" and event["arm"] == arm]


def generated(model: Any, tokenizer: Any, turns: list[tuple[str, str]], length: int, **given: Any) -> list[int]:
    """What transformers generates for turns in the chat template."""
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            pad_token_id=0,
            **({"do_sample": False} | given),
        )
    return output[0, ids.shape[1] :].tolist()


def test_the_page_and_its_description(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for name, kind in (("page.css", "text/css"), ("page.js", "text/javascript")):
        assert name in page.text
        assert client.get(f"/{name}").headers["content-type"].startswith(kind)
    about = client.get("/api/playground").json()
    assert [edit["name"] for edit in about["edits"]] == ["mild", "shift"]
    assert about["folders"] == ["late"]
    assert about["model"] == "tiny"
    assert set(about["presets"]) == {
        "conciseness",
        "fairness",
        "formality",
        "politeness",
        "positivity",
        "truthfulness",
    }
    assert all(about["presets"].values())


def test_every_response_confines_the_page(client: TestClient) -> None:
    for path in ("/", "/page.js", "/api/playground", "/nowhere", "/api/answer"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'self'; ")
        assert headers["x-content-type-options"] == "nosniff"


def test_the_files_of_the_page_name_nothing_outside() -> None:
    folder = Path(playground_module.__file__).parent / "page"
    for file in folder.iterdir():
        # The name of SVG's elements looks like an address, but nothing asks for it.
        text = file.read_text(encoding="utf-8").replace('"http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?:|url\(|@import|[\"'`(]//", text), file.name
        assert "innerHTML" not in text, file.name  # what a model writes is never read as HTML


@pytest.mark.parametrize("active", [[], STRONG, BOTH], ids=["none", "one", "composed"])
def test_answers_are_those_of_the_models(
    client: TestClient, model: Any, tokenizer: Any, edits: Any, active: list[Any]
) -> None:
    events = asked(client, "answer", message="What is ice?", edits=active, max_new_tokens=9)
    turns = [("user", "What is ice?")]
    base = generated(model, tokenizer, turns, 9)
    assert tokens(events, "base") == base
    parts = [edits[edit["name"]].with_strength(edit["strength"]) for edit in active]
    if parts:
        with sealign.apply_edit(model, Composition(parts)):
            edited = generated(model, tokenizer, turns, 9)
        assert edited != base
    else:
        edited = base
    assert tokens(events, "edited") == edited
    for arm, ids in (("base", base), ("edited", edited)):
        end = next(event for event in events if event["event"] == "end" and event["arm"] == arm)
        assert end["text"] == tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert end["complete"] is False
        pieces = [event["text"] for event in events if event["event"] == "token" and event["arm"] == arm]
        assert "".join(pieces).strip() == end["text"].rstrip("\N{REPLACEMENT CHARACTER}")
    assert [event["event"] for event in events][0 :: len(events) - 1] == ["started", "finished"]


def test_each_arm_has_its_own_history(client: TestClient, model: Any, tokenizer: Any, edits: Any) -> None:
    earlier = [{"user": "Hello.", "base": "Good day.", "edited": "Hi, hi."}]
    events = asked(
        client, "answer", message="What is ice?", edits=STRONG, earlier=earlier, system="Be brief.", max_new_tokens=6
    )
    for arm, said in (("base", "Good day."), ("edited", "Hi, hi.")):
        turns = [("system", "Be brief."), ("user", "Hello."), ("assistant", said), ("user", "What is ice?")]
        with sealign.apply_edit(model, edits["mild"], strength=3.0) as handle, handle.switched(arm == "edited"):
            assert tokens(events, arm) == generated(model, tokenizer, turns, 6)


def test_sampled_answers(client: TestClient, model: Any, tokenizer: Any) -> None:
    settings = {"temperature": 1.4, "top_p": 0.8, "seed": 11}
    events = asked(client, "answer", message="What is ice?", max_new_tokens=12, **settings)
    torch.manual_seed(11)
    expected = generated(
        model, tokenizer, [("user", "What is ice?")], 12, do_sample=True, temperature=1.4, top_p=0.8, top_k=0
    )
    assert tokens(events, "base") == tokens(events, "edited") == expected
    others = asked(client, "answer", message="What is ice?", max_new_tokens=12, **(settings | {"seed": 12}))
    assert tokens(others, "base") != expected


def test_an_answer_that_ends(client: TestClient, model: Any, tokenizer: Any) -> None:
    third = generated(model, tokenizer, [("user", "What is ice?")], 3)[2]
    model.generation_config.eos_token_id = third
    try:
        events = asked(client, "answer", message="What is ice?", max_new_tokens=9)
        answer = tokens(events, "edited")
        assert answer[-1] == third
        last = [event for event in events if event["event"] == "token"][-1]
        assert last["end"] is True
        assert all(event["complete"] for event in events if event["event"] == "end")
        effects = the(asked(client, "effects", message="What is ice?", edits=STRONG, answer=answer), "effects")
    finally:
        model.generation_config.eos_token_id = None
    # The end has an effect of its own, but is not a token of the answer.
    divergences = [token["divergence"] for token in effects["tokens"]]
    assert len(divergences) == len(answer)
    assert effects["mean_divergence"] == pytest.approx(sum(divergences[:-1]) / (len(answer) - 1))


def test_effects(client: TestClient, model: Any, tokenizer: Any, edits: Any) -> None:
    earlier = [{"user": "Hello.", "base": "Good day.", "edited": "Hi, hi."}]
    answer = [77, 12, 60, 3, 18]
    effects = the(asked(client, "effects", message="And ice?", edits=BOTH, earlier=earlier, answer=answer), "effects")
    turns = [("user", "Hello."), ("assistant", "Hi, hi."), ("user", "And ice?")]
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns], tokenize=False, add_generation_prompt=True
    )
    parts = [edits[edit["name"]].with_strength(edit["strength"]) for edit in BOTH]
    expected = token_effects(model, tokenizer.encode(text, add_special_tokens=False), answer, Composition(parts))
    for shown, effect in zip(effects["tokens"], expected, strict=True):
        assert shown["divergence"] == pytest.approx(effect.divergence, rel=1e-6)
        assert (shown["base"], shown["edited"]) == (pytest.approx(effect.base), pytest.approx(effect.edited))
        for name in ("base_alternatives", "edited_alternatives"):
            assert [one["log_probability"] for one in shown[name]] == pytest.approx(
                [one.log_probability for one in getattr(effect, name)]
            )
            assert [one["name"] for one in shown[name]] == [
                tokenizer.decode([one.token]) if "\ufffd" not in tokenizer.decode([one.token]) else
                tokenizer.convert_ids_to_tokens(one.token)
                for one in getattr(effect, name)
            ]  # fmt: skip
    mean = sum(effect.divergence for effect in expected) / 5
    assert effects["mean_divergence"] == pytest.approx(mean, rel=1e-6)


def test_damage(client: TestClient, model: Any, tokenizer: Any, edits: Any) -> None:
    events = asked(client, "damage", edits=STRONG)
    found = the(events, "damage")
    expected = measure_damage(model, tokenizer, edits["mild"].with_strength(3.0))
    assert found["loss_increase"] == expected.loss_increase
    assert found["loss_interval"] == list(expected.loss_interval)
    assert found["divergence"] == expected.mean_divergence
    assert found["divergence_interval"] == list(expected.divergence_interval)
    assert found["texts"] == len(expected.tokens)
    progress = [event for event in events if event["event"] == "progress"]
    assert [event["done"] for event in progress] == list(range(progress[0]["total"]))
    # It is computed once for a strength, and anew for another.
    assert the(asked(client, "damage", edits=STRONG), "damage") == found
    assert the(asked(client, "damage", edits=BOTH), "damage")["divergence"] != found["divergence"]


def test_an_edit_that_is_loaded_later(client: TestClient) -> None:
    loaded = the(asked(client, "load", path="late"), "edit")
    assert (loaded["name"], loaded["method"]) == ("/late", "mean_difference")
    late, early = (
        asked(client, "answer", message="What is ice?", edits=[{"name": name, "strength": 4}], max_new_tokens=8)
        for name in ("/late", "shift")
    )
    assert tokens(late, "edited") == tokens(early, "edited")
    assert [edit["name"] for edit in client.get("/api/playground").json()["edits"]] == ["mild", "shift"]


def as_lines(demonstrations: Iterable[sealign.Demonstration]) -> str:
    """Demonstrations as JSON lines."""
    rows = ({"prompt": one.prompt, "positive": one.positive, "negative": one.negative} for one in demonstrations)
    return "\n".join(map(json.dumps, rows))


ROWS = as_lines(
    sealign.Demonstration(f"{word} or not?", f"Yes, {word}.", f"No, never {word}.")
    for word in ["ice", "snow", "rain", "fog", "sun", "wind", "hail", "dew", "mist", "frost", "thaw", "cloud"]
)


def test_a_fit_and_its_verdict(client: TestClient, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    events = asked(client, "fit", name="new", method="mean_difference", rows=ROWS)
    expected = fit_and_judge(model, tokenizer, read_pasted(ROWS), config=sealign.MeanDifferenceConfig())
    verdict, edit = the(events, "verdict"), the(events, "edit")
    assert (verdict["word"], verdict["sentence"]) == (expected.verdict.word, expected.verdict.sentence)
    assert verdict["held_out"] == expected.held_out == 4
    margin = expected.effects[0]
    assert margin.random is not None
    assert verdict["margin"] == [margin.edited.difference, margin.edited.low, margin.edited.high]
    assert verdict["random"] == [margin.random.difference, margin.random.low, margin.random.high]
    assert verdict["divergence"] == expected.damage["edited"].mean_divergence
    stages = {event["stage"] for event in events if event["event"] == "progress"}
    assert {"Collecting activations", "Choosing the strength", "Scoring held-out demonstrations"} <= stages
    # It acts under its name, which other pages are not told.
    name = edit["name"]
    assert re.fullmatch("new#[0-9a-f]{8}", name)
    assert (edit["method"], edit["strength"]) == ("mean_difference", expected.edit.strength)
    answer = asked(client, "answer", message="What is ice?", edits=[{"name": name, "strength": 9}], max_new_tokens=6)
    with sealign.apply_edit(model, expected.edit, strength=9.0):
        assert tokens(answer, "edited") == generated(model, tokenizer, [("user", "What is ice?")], 6)
    assert name not in client.get("/api/playground").text
    # It is saved with the strength of the page.
    saved = the(asked(client, "save", name=name, strength=0.25, folder="mine"), "saved")
    assert saved["path"] == str(tmp_path / "mine")
    assert sealign.load_edit(tmp_path / "mine").hash == expected.edit.with_strength(0.25).hash
    again = asked(client, "save", name=name, strength=0.5, folder="mine")[-1]
    assert again["event"] == "error"
    assert sealign.load_edit(tmp_path / "mine").strength == 0.25


def test_a_bundled_behaviour_is_fitted(client: TestClient) -> None:
    events = asked(client, "fit", name="short", method="mean_difference", behaviour="conciseness")
    assert "the positive completion is shorter in" in the(events, "remark")["message"]
    assert the(events, "verdict")["held_out"] == len(
        split_demonstrations(sealign.load_demonstrations("bundled:conciseness"), holdout=0.3, seed=0)[1]
    )


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("fit", {"name": "../x", "method": "sea", "rows": ROWS}, "cannot name an edit"),
        ("fit", {"name": "x", "method": "icl", "rows": ROWS}, "unknown method 'icl'"),
        ("fit", {"name": "x", "method": "sea"}, "give one of the three"),
        ("fit", {"name": "x", "method": "sea", "rows": ROWS, "behaviour": "fairness"}, "give one of the three"),
        ("fit", {"name": "x", "method": "sea", "behaviour": "fairnes"}, "did you mean 'fairness'?"),
        ("fit", {"name": "x", "method": "sea", "rows": ROWS + "\n{"}, "the text, line 13: not JSON"),
        ("fit", {"name": "x", "method": "sea", "rows": ROWS.partition("\n")[0]}, "the text has 1 demonstrations"),
        ("save", {"name": "mild", "strength": 1, "folder": "../out"}, "cannot name an edit"),
        ("save", {"name": "mild", "strength": 1, "folder": "late"}, "late"),
        ("save", {"name": "mild", "strength": 1001, "folder": "new"}, "must be in [-1000, 1000]"),
        ("save", {"name": "none", "strength": 1, "folder": "new"}, "unknown edit 'none'"),
        ("answer", {"message": "x", "edits": [{"name": "mild", "strength": 1000.5}]}, "must be in [-1000, 1000]"),
        ("damage", {"edits": [{"name": "mild", "strength": -2000}]}, "must be in [-1000, 1000]"),
        ("effects", {"message": "x", "edits": [{"name": "no", "strength": 1}], "answer": [4]}, "unknown edit 'no'"),
        ("answer", {"message": "  "}, "the message is empty"),
        ("answer", {"message": "x", "temperature": 0}, "temperature is 0.0, but it must be above 0; try 0.7"),
        ("answer", {"message": "x", "temperature": 1, "top_p": 1.5}, "top_p is 1.5, but it must be in (0, 1]"),
        ("answer", {"message": "x " * 3000}, "start a new one or say less"),
        ("answer", {"message": "x", "template_arguments": {"mood": 1}}, "does not use the argument 'mood'"),
        ("answer", {"message": "x", "template_arguments": {"chat_template": "{{ 1 }}"}}, "model's own chat templates"),
        ("effects", {"message": "x", "answer": [400]}, "answer has the token 400, but the model has 400 tokens"),
        ("effects", {"message": "x", "answer": [4] * 2048}, "answer has 2048 tokens, but the context has room for 204"),
        ("damage", {}, "no edit is switched on"),
        ("load", {"path": "../late"}, "outside the folder"),
    ],
)  # fmt: skip
def test_what_is_refused_while_the_stream_runs(
    client: TestClient, model: Any, path: str, body: dict[str, Any], words: str
) -> None:
    *_, last = asked(client, path, **body)
    assert last["event"] == "error"
    assert words in last["message"]
    assert our_hooks(model) == 0


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("answer", b"{", "the request is refused: invalid JSON: EOF"),
        ("answer", b"{}", "message is missing: field required"),
        ("answer", b'{"message": 3}', "message is 3: input should be a valid string"),
        ("answer", b'{"message": "x", "max_new_tokens": 0}', "max_new_tokens is 0: input should be greater than or"),
        ("answer", b'{"message": "x", "max_new_tokens": 9999}', "max_new_tokens is 9999"),
        ("answer", b'{"message": "x", "seed": 1.5}', "seed is 1.5"),
        ("answer", b'{"message": "x", "temprature": 1}', "temprature is 1: extra inputs are not permitted"),
        ("answer", b'{"message": "x", "edits": [{"name": "mild", "strength": "1"}]}', "edits.0.strength is '1'"),
        ("answer", b'{"message": "x", "edits": [{"name": "mild", "strength": NaN}]}', "edits.0.strength is nan"),
        ("effects", b'{"message": "x", "answer": []}', "answer is []"),
        ("effects", b'{"message": "x", "answer": [-1]}', "answer.0 is -1"),
    ],
)
def test_bodies_are_read_strictly(client: TestClient, path: str, body: bytes, words: str) -> None:
    response = client.post(f"/api/{path}", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert words in response.json()["error"]


def test_other_bodies(client: TestClient) -> None:
    response = client.post("/api/answer", content=b'{"message": "x"}', headers={"content-type": "text/plain"})
    assert response.status_code == 415  # that of a form of another site, which a browser sends without asking
    for content in (b" " * (MAX_BODY + 1), iter([b" " * MAX_BODY, b"  "])):
        response = client.post("/api/answer", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 413
        assert "larger than 1048576 bytes" in response.json()["error"]
    assert client.get("/api/answer").status_code == 405


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:7860"}, 200),
        ({"host": "localhost:9"}, 200),
        ({"host": "LOCALHOST"}, 200),
        ({"host": "[::1]:7860"}, 200),
        ({"host": "192.168.1.5:7860"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:7860"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://127.0.0.1:7860"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:7861"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_only_the_page_itself_may_ask(client: TestClient, headers: dict[str, str], status: int) -> None:
    response = client.get("/api/playground", headers=headers)
    assert response.status_code == status
    assert (status == 200) == ("presets" in response.json())


def test_a_crash_leaves_the_playground_usable(client: TestClient, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = asked(client, "answer", message="What is ice?", edits=STRONG, max_new_tokens=5)
    forward, calls = type(model).forward, []

    def crash(*args: Any, **given: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory. Tried")
        return forward(*args, **given)

    monkeypatch.setattr(type(model), "forward", crash)
    events = asked(client, "answer", message="What is ice?", edits=STRONG, max_new_tokens=5)
    assert "(RuntimeError: out of memory)" in the(events, "error")["message"]
    assert len([event for event in events if event["event"] == "token"]) == 3
    monkeypatch.undo()
    assert our_hooks(model) == 0
    assert asked(client, "answer", message="What is ice?", edits=STRONG, max_new_tokens=5) == before


def test_two_pages_do_not_see_each_others_settings(client: TestClient) -> None:
    def settings(number: int) -> dict[str, Any]:
        active = [{"name": "mild", "strength": float(number)}] if number else []
        return {"message": "What is ice?", "edits": active, "max_new_tokens": 10, "temperature": 0.5 + number}

    alone = [asked(client, "answer", **settings(number)) for number in range(4)]
    together: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda n=number: together.update({n: asked(client, "answer", **settings(n))}))
        for number in range(4)
    ]
    application: Any = client.app
    queue, free = application.state.queue, threading.Event()
    queue._executor.submit(free.wait, 30)  # the model is busy until all have asked
    for thread in threads:
        thread.start()
    while len(queue._jobs) < len(threads) and all(thread.is_alive() for thread in threads):
        time.sleep(0.01)
    free.set()
    for thread in threads:
        thread.join()
    waited = 0
    for number, expected in enumerate(alone):
        found = [event for event in together[number] if event["event"] != "waiting"]
        waited += len(together[number]) - len(found)
        assert found == expected
    assert waited > 0
