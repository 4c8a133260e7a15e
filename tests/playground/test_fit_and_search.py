"""Searches by requests: what they report, what they leave behind, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

import sealign
from sealign.evaluation.tuning import tune
from sealign.evaluation.tuning_config import TuneConfig
from sealign.playground import fit_and_search
from sealign.playground.application import playground_application
from sealign.playground.offered_edits import OfferedEdits
from sealign.playground.playground import Playground
from tests.conftest import our_hooks
from tests.evaluation.planted import planted_demonstrations, planted_model
from tests.evaluation_data import HARNESS_WARNINGS
from tests.playground.test_application import as_lines, asked, the, tokens

pytestmark = HARNESS_WARNINGS

QUICK: dict[str, Any] = {"name": "best", "methods": ["mean_difference"], "layers": "1,2", "max_minutes": 30.0}
MANY = planted_demonstrations(20)


@pytest.fixture(scope="module")
def planted(tokenizer: Any) -> Any:
    return planted_model(len(tokenizer))


@pytest.fixture
def client(planted: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    (tmp_path / "edits").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    offered = OfferedEdits(planted, tokenizer, {}, folder=tmp_path / "edits")
    application = playground_application(Playground(planted, tokenizer, offered, name="tiny"))
    with TestClient(application, base_url="http://127.0.0.1:7860") as client:
        yield client
    assert list((tmp_path / "temporary").iterdir()) == []
    assert our_hooks(planted) == 0


def test_a_search_is_that_of_tune(client: TestClient, planted: Any, tokenizer: Any, tmp_path: Path) -> None:
    plain = {"message": "What is ice?", "max_new_tokens": 5}
    before = asked(client, "answer", **plain)
    events = asked(client, "search", **QUICK, rows=as_lines(MANY))
    assert asked(client, "answer", **plain) == before  # the model is as it was
    config = TuneConfig(methods=["mean_difference"], layers="1,2", max_minutes=30.0)
    expected = tune(planted, tokenizer, MANY, config=config, output=tmp_path / "tuned")
    assert expected.edit is not None
    assert expected.report is not None
    row, verdict, edit = expected.report.main, the(events, "verdict"), the(events, "edit")
    assert row is not None
    assert row.difference is not None
    assert (verdict["word"], verdict["sentence"]) == (expected.report.verdict.word, expected.report.verdict.sentence)
    assert verdict["margin"] == [row.difference.difference, row.difference.low, row.difference.high]
    for name, found in (("random", row.random), ("reversed", row.reversed)):
        assert found is not None
        assert verdict[name] == [found.difference, found.low, found.high]
    damage = expected.report.damage["winner"]
    assert verdict["loss"] == [damage.loss_increase, *damage.loss_interval]
    assert verdict["divergence"] == damage.mean_divergence
    assert verdict["domain_divergence"] == expected.report.domain_damage["winner"].mean_divergence
    assert expected.results is not None
    assert verdict["held_out"] == len(expected.results.tasks["preference"].questions)
    # Every candidate of one layer has been shown, a round of layers at a time, before anything was measured.
    rounds = [event["candidates"] for event in events if event["event"] == "scanned"]
    assert [{layer for each in found for layer in each["layers"]} for found in rounds] == [{1}, {2}]
    scanned = {
        (each.candidate.edit.site, tuple(each.candidate.edit.layers), each.candidate.config.token): each.efficiency
        for each in expected.scanned
        if len(each.candidate.edit.layers) == 1
    }
    shown = {
        (each["site"], tuple(each["layers"]), each["token"]): each["efficiency"] for found in rounds for each in found
    }
    assert shown == scanned
    stages = [event["stage"] if event["event"] == "progress" else event["event"] for event in events]
    assert stages.index("Computing sensitivities") < stages.index("scanned") < stages.index("Measuring damage")
    # The edit acts, and other pages are not told of it.
    assert (edit["strength"], edit["layers"]) == (expected.edit.strength, list(expected.edit.layers))
    assert edit["name"] not in client.get("/api/playground").text
    active = [{"name": edit["name"], "strength": edit["strength"]}]
    answers = asked(client, "answer", message="What is ice?", edits=active, max_new_tokens=5)
    assert len(tokens(answers, "edited")) == 5
    # It is saved with what was measured, also at another strength.
    for strength, folder in ((edit["strength"], "own"), (0.5, "weak")):
        asked(client, "save", name=edit["name"], strength=strength, folder=folder)
        card = (tmp_path / "edits" / folder / "README.md").read_text()
        assert f"**{verdict['sentence']}**" in card
        assert ("At strength" in card) == (folder == "weak")
    assert sealign.load_edit(tmp_path / "edits" / "own").hash == expected.edit.hash


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": as_lines(MANY[:5])}, "each part needs at least 2; give more demonstrations"),
        ({"rows": as_lines(MANY[:1])}, "the text has 1 demonstrations, but 2 are needed"),
        ({"methods": []}, "methods, sites and tokens must each have at least 1 name"),
        ({"methods": ["leace"], "deployable": True}, "no candidate is left; search more methods or sites"),
        ({"layers": "9"}, "9"),
        ({"max_minutes": 0.0}, "max_minutes"),
        ({"name": "a/b"}, "cannot name an edit"),
    ],
)
def test_what_is_refused(client: TestClient, changes: dict[str, Any], words: str) -> None:
    *_, last = asked(client, "search", **(QUICK | {"rows": as_lines(MANY[:16])} | changes))
    assert last["event"] == "error"
    assert words in last["message"]
    assert "\n" not in last["message"]


def test_a_model_that_cannot_be_differentiated(
    client: TestClient, planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = type(planted).forward
    monkeypatch.setattr(type(planted), "forward", lambda *args, **given: torch.no_grad()(forward)(*args, **given))
    *_, last = asked(client, "search", **QUICK, rows=as_lines(MANY[:16]))
    assert last["event"] == "error"
    assert last["message"].startswith("the model cannot be differentiated (")
    assert last["message"].endswith("; fit one method, or search with the model before quantisation")


def test_no_candidate_has_a_gain(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sealign.evaluation.search.choose_finalists", lambda *_: [])
    events = asked(client, "search", **QUICK, rows=as_lines(MANY[:16]))
    verdict = the(events, "verdict")
    assert verdict["sentence"].startswith("No evidence: no candidate has a gain")
    assert verdict["winner"] is None
    assert [event["event"] for event in events][-2:] == ["verdict", "finished"]


def test_a_search_without_its_packages(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_and_search, "find_spec", lambda name: None if name == "lm_eval" else object())
    words = "A search needs lm_eval; install it with: pip install 'sealign[eval]'"
    assert client.get("/api/playground").json()["search"]["obstacle"] == words
    *_, last = asked(client, "search", **QUICK, rows=as_lines(MANY[:16]))
    assert last == {"event": "error", "message": words}


def test_a_table_and_its_wrong_row(client: TestClient) -> None:
    table = [json.loads(line) for line in as_lines(MANY[:12]).splitlines()]
    found = asked(client, "fit", name="new", method="mean_difference", table=table)
    assert the(found, "verdict") == the(
        asked(client, "fit", name="new", method="mean_difference", rows=as_lines(MANY[:12])), "verdict"
    )
    table[6]["negative"] = "  "
    *_, last = asked(client, "fit", name="new", method="mean_difference", table=table)
    assert (last["event"], last["row"]) == ("error", 7)
    assert last["message"].startswith("row 7: 'negative' is '  '")
