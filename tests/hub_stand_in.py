"""A stand-in for the Hugging Face Hub: repositories in memory, served on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml


class HubStandIn:
    """Repositories by id, each a mapping from file name to content, and the requests that came.

    Attributes:
        url: Address of the server.
        repositories: Files of each repository.
        requests: Method and path of each request, in order.
        created: What each request to create a repository said of it.
        refuses: Whether uploads are refused.
    """

    def __init__(self) -> None:
        self.url = ""
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.refuses = False

    def model(self, repo_id: str) -> dict[str, Any]:
        """What the Hub tells of a repository."""
        files = self.repositories[repo_id]
        card = files.get("README.md", b"").decode()
        data = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else {}
        base = data.get("base_model")
        return {
            "id": repo_id,
            "sha": self.commit(repo_id),
            "private": False,
            "downloads": len(repo_id),
            "tags": [*data.get("tags", []), *([f"base_model:{base}"] if base else [])],
            "cardData": data,
            "siblings": [{"rfilename": name} for name in files],
        }

    def commit(self, repo_id: str) -> str:
        """The commit of a repository, from its content."""
        return hashlib.sha1(repr(sorted(self.repositories[repo_id].items())).encode()).hexdigest()


@contextmanager
def hub_stand_in(monkeypatch: pytest.MonkeyPatch, cache: Any) -> Iterator[HubStandIn]:
    """Serve a stand-in, and let the Hub's client of this process use it.

    Args:
        monkeypatch: Sets the client's settings.
        cache: Folder for what the client downloads.
    """
    from huggingface_hub import constants

    hub = HubStandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_stand_in")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            words, asked = parts.path.strip("/").split("/"), parse_qs(parts.query)
            hub.requests.append(f"{self.command} {parts.path}")
            if parts.path == "/api/models":
                models = map(hub.model, hub.repositories)
                wanted, query = set(asked.get("filter", [])), asked.get("search", [""])[0]
                found = [each for each in models if wanted <= set(each["tags"]) and query in each["id"]]
                self.answer(sorted(found, key=lambda each: -each["downloads"])[: int(asked["limit"][0])])
            elif words[4:5] == ["tree"]:
                files = hub.repositories["/".join(words[2:4])].items()
                self.answer([{"type": "file", "path": name, "size": len(own), "oid": "0"} for name, own in files])
            elif words[:2] == ["api", "models"] and "/".join(words[2:4]) in hub.repositories:
                self.answer(hub.model("/".join(words[2:4])))
            elif words[2:3] == ["resolve"] and words[4] in hub.repositories.get("/".join(words[:2]), {}):
                repo_id = "/".join(words[:2])
                self.answer_file(hub.repositories[repo_id][words[4]], hub.commit(repo_id))
            else:
                self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            words = urlsplit(self.path).path.strip("/").split("/")
            hub.requests.append(f"POST {self.path}")
            if hub.refuses:
                self.answer({"error": "You have no right to write here"}, 403)
            elif words == ["api", "repos", "create"]:
                given = json.loads(body)
                hub.created.append(given)
                repo_id = "/".join(filter(None, (given.get("organization"), given["name"])))
                hub.repositories.setdefault(repo_id, {})
                self.answer({"url": f"{hub.url}/{repo_id}"})
            elif words == ["api", "validate-yaml"]:
                self.answer({"errors": [], "warnings": []})
            elif words[4] == "preupload":
                told = {"uploadMode": "regular", "shouldIgnore": False}
                files = [told | {"path": file["path"]} for file in json.loads(body)["files"]]
                self.answer({"files": files})
            else:
                repo_id = "/".join(words[2:4])
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        hub.repositories[repo_id][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                commit = hub.commit(repo_id)
                self.answer({"success": True, "commitOid": commit, "commitUrl": f"{hub.url}/{repo_id}/commit/{commit}"})

        def answer(self, data: Any, status: int = 200, headers: Any = None) -> None:
            self.send(json.dumps(data).encode(), status, {"Content-Type": "application/json", **(headers or {})})

        def answer_file(self, content: bytes, commit: str) -> None:
            etag = hashlib.sha1(content).hexdigest()
            self.send(content, 200, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})

        def send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    return Handler
