"""A server started as a user starts one: ``sealign serve`` in the environment of ``make engines-env``, on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import requests

import sealign
from sealign.fitting.edit_config import EditConfig

ENVIRONMENT = Path(__file__).resolve().parents[1] / ".venv-vllm"
TOKEN = "only-for-tests"
START_SECONDS = 900


def engine_command(name: str) -> str:
    """The path of a command in the environment of the engines; a missing one fails, since nothing was tested then."""
    path = ENVIRONMENT / "bin" / name
    if not path.is_file():
        pytest.fail(
            f"{path} is not there; run make engines-env, or leave these tests out with: pytest -m 'not engines'"
        )
    return str(path)


class EditServer:
    """A running server; a context manager that ends it."""

    def __init__(self, folder: Path, *arguments: str, name: str = "server", token: str | None = TOKEN) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{name}.log"
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        # A thread for each worker, on any core: otherwise all servers of the tests would share the first core.
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        environment.pop("SEALIGN_ADMIN_TOKEN", None)
        if token:
            environment["SEALIGN_ADMIN_TOKEN"] = token
        command = [engine_command("sealign"), "serve", *arguments]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--max-model-len", "1024"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def wait(self) -> EditServer:
        """Return when it answers."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log.read_text()[-6000:]}")
            try:
                if requests.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return self
            except requests.ConnectionError:
                time.sleep(1)
        raise RuntimeError(f"no answer within {START_SECONDS} s:\n{self.log.read_text()[-6000:]}")

    def __enter__(self) -> EditServer:
        try:
            return self.wait()
        except BaseException:
            self.stop(signal.SIGKILL)
            raise

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGTERM)

    def stop(self, sign: int) -> None:
        """End the server and every process that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, sign)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(60)

    def post(self, path: str, **body: Any) -> requests.Response:
        """Send a request as a client does."""
        return requests.post(f"{self.url}{path}", json=body, timeout=300)

    def complete(self, prompt: list[int] | str, edit: str | None = None, *, count: int = 12, **more: Any) -> list[int]:
        """Return the ids of a greedy completion, with an edit named in ``vllm_xargs``."""
        answer = self.post("/v1/completions", **completion_body(prompt, edit, count, **more))
        assert answer.status_code == 200, answer.text
        ids: list[int] = answer.json()["choices"][0]["token_ids"]
        return ids

    def admin(self, method: str, path: str = "", *, token: str | None = TOKEN, **body: Any) -> requests.Response:
        """Send a request as the administrator does."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return requests.request(
            method, f"{self.url}/sealign/edits{path}", headers=headers, json=body or None, timeout=120
        )


def completion_body(prompt: list[int] | str, edit: str | None, count: int, **more: Any) -> dict[str, Any]:
    """The body of a greedy completion; a model of this name is asked for where ``edit`` begins with ``model:``."""
    body: dict[str, Any] = {"model": "smollm2", "prompt": prompt, "max_tokens": count, "temperature": 0}
    body |= {"return_token_ids": True} | more
    if edit is not None and edit.startswith("model:"):
        body["model"] = edit.removeprefix("model:")
    elif edit is not None:
        body["vllm_xargs"] = {"sealign_edit": edit}
    return body


def fit_and_save(
    model: Any, tokenizer: Any, configs: Mapping[str, EditConfig], folder: Path
) -> dict[str, sealign.Edit]:
    """Fit an edit for each configuration into ``folder/NAME``; those that read the same activations share them."""
    demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=16)
    collected: dict[Any, Any] = {}
    edits = {}
    for name, config in configs.items():
        if config.needs_pass_per_layer:
            edits[name] = sealign.fit_edit(model, tokenizer, demonstrations, config=config)
        else:
            settings = config.collect_config()
            key = config.read_site, settings.model_dump_json()
            if key not in collected:
                collected[key] = sealign.collect_activations(
                    model, tokenizer, demonstrations, site=config.read_site, config=settings
                )
            edits[name] = sealign.fit_edit_from_activations(
                model, tokenizer, collected[key], demonstrations, config=config
            )
        edits[name].save_pretrained(folder / name)
    return edits
