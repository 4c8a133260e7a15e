from __future__ import annotations

import socket
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import sealign
from sealign.errors import SealignError
from sealign.evaluation.answer_classifier import load_classifier
from sealign.evaluation.local_tasks import load_task
from sealign.hub import hub_access, is_reachable

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_reachable_is_what_accepts_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("http_proxy", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert is_reachable(f"{url}/path")
    assert not is_reachable(url)
    assert not is_reachable("https://no.such.host.invalid")
    monkeypatch.setenv("http_proxy", "http://proxy:1")
    assert is_reachable(url)


@pytest.mark.usefixtures("online")
def test_where_the_hub_cannot_be_reached_its_clients_are_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setitem(sys.modules, "datasets.config", datasets)
    with pytest.raises(KeyError), hub_access():
        assert constants.HF_HUB_OFFLINE
        assert datasets.HF_HUB_OFFLINE
        raise KeyError
    assert not constants.HF_HUB_OFFLINE
    assert not datasets.HF_HUB_OFFLINE
    with hub_access(Path("folder")):
        assert not constants.HF_HUB_OFFLINE


@pytest.mark.usefixtures("online")
def test_a_client_that_is_imported_meanwhile_is_online_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "datasets.config", raising=False)
    with hub_access():
        late = types.SimpleNamespace(HF_HUB_OFFLINE=constants.HF_HUB_OFFLINE)
        monkeypatch.setitem(sys.modules, "datasets.config", late)
    assert not late.HF_HUB_OFFLINE


@pytest.mark.usefixtures("online")
def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sealign.hub.is_reachable", lambda _: pytest.fail("tried"))
    with hub_access():
        pass
    assert constants.HF_HUB_OFFLINE


def _no_task() -> None:
    class Manager:
        def load(self, _: list[str]) -> None:
            raise ConnectionError("Couldn't reach the Hub. More of it.")

    load_task(Manager(), "bbq")  # type: ignore[arg-type]


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda: sealign.load_model("owner/none"), "cannot load model 'owner/none'"),
        (lambda: sealign.load_edit("owner/none"), "'owner/none' is neither a folder nor a repository"),
        (lambda: sealign.load_demonstrations("owner/none"), "cannot load dataset 'owner/none' from the Hub"),
        (lambda: load_classifier("owner/none", device="cpu"), "cannot load the classifier 'owner/none'"),
        (_no_task, r"the data of task 'bbq' cannot be loaded \(ConnectionError: Couldn't reach the Hub\); check the"),
    ],
    ids=["model", "edit", "demonstrations", "classifier", "task"],
)
def test_without_a_network_one_sentence_comes_at_once(
    use: Callable[[], Any], says: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: pytest.fail("tried again"))
    with pytest.raises(SealignError, match=says):
        use()
    assert "Retrying" not in capfd.readouterr().err
