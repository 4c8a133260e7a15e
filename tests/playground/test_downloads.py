"""Edits that leave the page: as zipped folders and exports to download, and pushed to the Hub."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient

import sealign
from sealign.edits.model_card import NOT_EVALUATED, shown_effect
from sealign.export.control_vector import export_control_vector
from sealign.export.gguf import export_gguf_lora
from sealign.export.lora import export_lora
from sealign.playground import downloads
from sealign.playground.application import playground_application
from sealign.playground.offered_edits import OfferedEdits
from sealign.playground.playground import Playground
from tests.conftest import our_hooks
from tests.export.tiny_gguf import write_llama
from tests.hub_stand_in import HubStandIn, hub_stand_in
from tests.playground.test_application import asked, the
from tests.tiny_models import build_model

LINEAR = sealign.SEAConfig(rank=(3, 2), layers=(1, 3), normalization="none", strength=0.7)


@pytest.fixture(scope="module")
def base(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny model, and the GGUF file that it is said to be loaded from."""
    model = build_model("llama", vocab_size=len(tokenizer), intermediate_size=96)
    file = write_llama(model, tmp_path_factory.mktemp("base") / "base.gguf")
    model.name_or_path = str(file)
    return model, file


@pytest.fixture(scope="module")
def edits(base: tuple[Any, Path], tokenizer: Any) -> dict[str, sealign.Edit]:
    items = sealign.load_demonstrations("bundled:fairness", limit=6)
    configs: dict[str, Any] = {
        "linear": LINEAR,
        "rescaled": sealign.SEAConfig(rank=(3, 2), layers=(1, 3), strength=0.7),
        "shift": sealign.MeanDifferenceConfig(site="residual", layers=(1, 2), strength=0.5),
    }
    return {name: sealign.fit_edit(base[0], tokenizer, items, config=config) for name, config in configs.items()}


def serve(model: Any, tokenizer: Any, edits: Any, host: str = "127.0.0.1") -> TestClient:
    application = playground_application(
        Playground(model, tokenizer, OfferedEdits(model, tokenizer, edits), name="tiny"), host=host
    )
    return TestClient(application, base_url="http://127.0.0.1:7860")


@pytest.fixture
def client(
    base: tuple[Any, Path], tokenizer: Any, edits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TestClient]:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    with serve(base[0], tokenizer, edits) as client:
        yield client
    assert list((tmp_path / "temporary").iterdir()) == []
    assert our_hooks(base[0]) == 0


def downloaded(client: TestClient, name: str, strength: float, form: str) -> tuple[str, bytes]:
    """The name and the content of a file."""
    response = client.post("/api/download", json={"name": name, "strength": strength, "form": form})
    assert response.status_code == 200, response.text
    assert response.headers["content-security-policy"].startswith("default-src 'self'; ")
    (found,) = re.findall(r'^attachment; filename="([^"]+)"$', response.headers["content-disposition"])
    return found, response.content


def test_the_edit_itself(client: TestClient, edits: Any, tmp_path: Path) -> None:
    name, content = downloaded(client, "rescaled", -1.5, "edit")
    assert name == "rescaled.zip"
    zipfile.ZipFile(io.BytesIO(content)).extractall(tmp_path)
    assert sealign.load_edit(tmp_path / "rescaled").hash == edits["rescaled"].with_strength(-1.5).hash


def test_exports_are_those_of_the_library(
    client: TestClient, base: tuple[Any, Path], edits: Any, tmp_path: Path
) -> None:
    model, file = base
    linear, shift = edits["linear"].with_strength(0.3), edits["shift"].with_strength(2.0)
    export_lora(model, linear, tmp_path / "lora")
    name, content = downloaded(client, "linear", 0.3, "lora")
    assert name == "linear-lora.zip"
    with zipfile.ZipFile(io.BytesIO(content)) as found:
        for path in (tmp_path / "lora").iterdir():
            assert found.read(f"linear-lora/{path.name}") == path.read_bytes(), path.name
    export_gguf_lora(model, file, linear, tmp_path / "lora.gguf")
    assert downloaded(client, "linear", 0.3, "gguf_lora") == (
        "linear-lora.gguf", (tmp_path / "lora.gguf").read_bytes(),
    )  # fmt: skip
    export_control_vector(shift, tmp_path / "vector.gguf", architecture="llama")
    assert downloaded(client, "shift", 2.0, "control_vector") == (
        "shift-control-vector.gguf", (tmp_path / "vector.gguf").read_bytes(),
    )  # fmt: skip


def test_what_cannot_be_exported_says_why(client: TestClient) -> None:
    found = {name: the(asked(client, "forms", name=name), "forms") for name in ("linear", "rescaled", "shift")}
    allowed = {name: [form for form in downloads.FORMS if forms[form] is None] for name, forms in found.items()}
    assert allowed == {"linear": ["lora", "gguf_lora"], "rescaled": [], "shift": ["control_vector"]}
    assert found["linear"]["control_vector"].startswith("the edit acts on the site 'mlp', but a control vector is")
    assert found["rescaled"]["lora"].startswith("the edit is rescaled per token, which is not linear")
    for forms in found.values():
        for reason in filter(None, (forms[form] for form in downloads.FORMS)):
            assert "\n" not in reason
            assert "approximate" not in reason  # an option of a command
    for name, strength, form, words in (
        ("rescaled", 1.0, "lora", "the edit is rescaled per token"),
        ("linear", 1.0, "onnx", "unknown form 'onnx'"),
        ("linear", 2000.0, "lora", "must be in [-1000, 1000]"),
        ("none", 1.0, "edit", "unknown edit 'none'"),
    ):
        response = client.post("/api/download", json={"name": name, "strength": strength, "form": form})
        assert response.status_code == 400
        assert words in response.json()["error"]
    assert asked(client, "forms", name="none")[-1]["message"].startswith("unknown edit 'none'")


def test_obstacles_of_other_kinds(
    base: tuple[Any, Path], tokenizer: Any, edits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = base
    other: Any = SimpleNamespace(method="contrastive_decoding")
    for reason in downloads.export_obstacles(model, other, ignore_mismatch=False).values():
        assert reason == "the method contrastive_decoding does not edit activations, so it cannot be exported"
    monkeypatch.setattr(model, "name_or_path", "owner/tiny")
    items = sealign.load_demonstrations("bundled:fairness", limit=6)
    plain = sealign.fit_edit(model, tokenizer, items, config=LINEAR)
    reasons = downloads.export_obstacles(model, plain, ignore_mismatch=False)
    assert reasons["lora"] is None
    assert "name the file with --base of sealign export gguf --lora" in str(reasons["gguf_lora"])
    monkeypatch.setattr(downloads, "find_spec", lambda name: None if name == "peft" else object())
    reasons = downloads.export_obstacles(model, edits["linear"], ignore_mismatch=False)
    assert reasons["lora"] == "the package peft is not installed; install it with: pip install 'sealign[peft]'"
    assert reasons["gguf_lora"] is None


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    with hub_stand_in(monkeypatch, tmp_path / "hub") as hub:
        yield hub


PUSH: dict[str, Any] = {"name": "rescaled", "strength": 0.25, "repository": "me/kind", "private": True}


def test_a_push(client: TestClient, hub: HubStandIn, edits: Any, tmp_path: Path) -> None:
    events = asked(client, "push", **PUSH)
    assert the(events, "pushed")["url"].startswith(f"{hub.url}/me/kind/commit/")
    assert "The card does not say what the edit gains" in the(events, "remark")["message"]
    (tmp_path / "pulled").mkdir()
    for name, content in hub.repositories["me/kind"].items():
        (tmp_path / "pulled" / name).write_bytes(content)
    assert sealign.load_edit(tmp_path / "pulled").hash == edits["rescaled"].with_strength(0.25).hash
    assert shown_effect((tmp_path / "pulled" / "README.md").read_text()) == NOT_EVALUATED
    assert hub.created == [{"name": "kind", "organization": "me", "visibility": "private"}]


def test_pushes_that_are_refused(client: TestClient, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_a_secret_of_this_machine"
    monkeypatch.setenv("HF_TOKEN", token)
    hub.refuses = True
    events = [asked(client, "push", **PUSH)]
    assert "cannot be uploaded to 'me/kind' (" in events[-1][-1]["message"]
    for changes, words in (
        ({"repository": "kind"}, "the repository is 'kind', but it must be OWNER/NAME"),
        ({"repository": "me/a b"}, "cannot be uploaded to 'me/a b' ("),
        ({"name": "none"}, "unknown edit 'none'"),
    ):
        events.append(asked(client, "push", **(PUSH | changes)))
        assert words in events[-1][-1]["message"]
    assert token not in str(events) + client.get("/api/playground").text
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    message = asked(client, "push", **PUSH)[-1]["message"]
    assert message == (
        "the edit cannot be uploaded to 'me/kind' without a login to the Hub; run hf auth login, or set HF_TOKEN"
    )
    assert hub.repositories == {}


def test_a_push_without_a_network(client: TestClient, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = asked(client, "push", **PUSH)[-1]["message"]
    assert message.startswith("the edit cannot be uploaded to 'me/kind' (")
    assert message.endswith("and the network")
    assert "\n" not in message
    assert hub.requests == []


def test_whoever_reaches_the_page_does_not_push_with_the_login_of_this_machine(
    base: tuple[Any, Path], tokenizer: Any, edits: Any, hub: HubStandIn
) -> None:
    with serve(base[0], tokenizer, edits, host="0.0.0.0") as client:
        words = "Edits are pushed only from a page at 127.0.0.1, not at 0.0.0.0"
        assert client.get("/api/playground").json()["push_obstacle"] == words
        assert asked(client, "push", **PUSH)[-1] == {"event": "error", "message": words}
    assert hub.requests == []
