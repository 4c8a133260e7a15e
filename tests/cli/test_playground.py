from __future__ import annotations

import json
import signal
import socket
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import sealign
from sealign.cli.playground import _named_edits
from sealign.errors import SettingError
from tests.cli import test_app as shared
from tests.cli.test_app import program, refused, run

cache = shared.cache
edit_folder = shared.edit_folder
model_folder = shared.model_folder
one_thread = shared.one_thread

pytest.importorskip("uvicorn")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The playgrounds that would be served."""
    found: list[Any] = []

    def serve(playground: Any, bound: socket.socket, *, host: str, on_start: Any) -> None:
        port = bound.getsockname()[1]
        on_start(f"http://{host}:{port}/")
        found.append(playground)

    monkeypatch.setattr("sealign.playground.web_server.serve_page", serve)
    return found


def test_what_is_offered(
    served: list[Any], model_folder: Path, edit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealign.load_edit(edit_folder).with_strength(0.2).save_pretrained(tmp_path / "folder" / "weak")
    weak = tmp_path / "folder" / "weak"
    edits = ["--edit", edit_folder, "--edit", f"both={edit_folder}+{weak}"]
    result = run("playground", *edits, "--edits-dir", tmp_path / "folder", "--port", 0, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("Playground: http://127.0.0.1:")
    about = served[0].describe()
    assert about["model"] == str(model_folder)  # the one that the edit was fitted on
    assert [(edit["name"], edit["strength"]) for edit in about["edits"]] == [
        ("edit", 0.7),
        ("both.1", 0.7),
        ("both.2", 0.2),
    ]
    assert about["folders"] == ["weak"]
    # Without an edit it is the embedded model, whose edits are loaded on the page.
    monkeypatch.setattr("sealign.models.loading.embedded_model", lambda: model_folder)
    assert run("playground", "--port", 0).exit_code == 0
    assert (served[1].describe()["edits"], served[1].describe()["folders"]) == ([], None)


def test_names_of_edits(tmp_path: Path) -> None:
    (tmp_path / "a+b").mkdir()
    assert _named_edits(["mild=x/y", "z", "p/q+r/s", "two=t+u", str(tmp_path / "a+b")]) == {
        "mild": "x/y",
        "z": "z",
        "q": "p/q",
        "s": "r/s",
        "two.1": "t",
        "two.2": "u",
        "a+b": str(tmp_path / "a+b"),
    }
    with pytest.raises(SettingError, match="two values of --edit have the name 'z'"):
        _named_edits(["x/z", "y/z"])


@pytest.mark.usefixtures("served")
def test_what_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused("playground", "--port", port, words=(f"cannot listen at 127.0.0.1, port {port}", "another --port"))
    refused("playground", "--host", "no.such.host.invalid", words=("must be an address of this machine",))
    refused("playground", "--host", "192.0.2.1", "--port", 0, words=("cannot listen at 192.0.2.1",))
    refused("playground", "--edits-dir", tmp_path / "none", words=("there is no folder", "--edits-dir"))
    refused("playground", "--edit", tmp_path / "none", "--port", 0, words=("there is no folder",))


def test_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.util import find_spec

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else find_spec(name))
    refused("playground", words=("pip install 'sealign[playground]'",))


def test_a_server_runs_the_model(served: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    monkeypatch.setattr("sealign.playground.served_playground.ServedPlayground", lambda *given: given)
    result = run("playground", "--server", "http://gpu:8000", "--edit", "mild", "--edit", "harsh", "--port", 0)
    assert result.exit_code == 0, result.stderr
    assert served == [("http://gpu:8000", ["mild", "harsh"])]
    monkeypatch.undo()
    refused("playground", "--server", "http://127.0.0.1:9", "--port", 0, words=("http://127.0.0.1:9 did not answer",))
    for option, *value in (
        ("--model", "smollm2"),
        ("--edits-dir", tmp_path),
        ("--ignore-mismatch",),
        ("--dtype", "float32"),
        ("--trust-remote-code",),
    ):
        words = (f"{option} has no effect with --server", "leave it out")
        refused("playground", "--server", "http://gpu:8000", option, *value, words=words)


@pytest.mark.slow
def test_as_a_process(model_folder: Path, edit_folder: Path) -> None:
    """It prints its address once the page can be opened, keeps to this machine, and ends at Ctrl+C."""
    args = ("--model", model_folder, "--edit", edit_folder, "--port", 0, "--device", "cpu")
    process = subprocess.Popen(program("playground", *args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Playground: http://127.0.0.1:")
        url = line.split()[1]
        with urllib.request.urlopen(f"{url}api/playground", timeout=60) as response:
            assert json.load(response)["edits"][0]["name"] == "edit"
        # While an answer is generated.
        body = json.dumps({"message": "What is ice?", "max_new_tokens": 1900}).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{url}api/answer", data=body, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as stream:
            assert json.loads(stream.readline())["event"] == "started"
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=60)
        assert (process.returncode, rest) == (0, ""), errors
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.wait()
