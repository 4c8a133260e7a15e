"""The container file and the compose example, parsed: what they name exists. Neither is built or run here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from sealign.cli.app import app
from sealign.serving.settings import TOKEN_VARIABLE
from sealign.serving.vllm_version import TESTED

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy"


@pytest.fixture
def instructions() -> list[tuple[str, str]]:
    """The instructions of the container file, and what follows each."""
    text = re.sub(r"^#.*\n", "", (FOLDER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line.strip())]


@pytest.fixture
def service() -> dict[str, Any]:
    (found,) = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"].values()
    return found


def test_the_container_file_is_well_formed(instructions: list[tuple[str, str]]) -> None:
    names = [name for name, _ in instructions]
    assert names[0] == "FROM"
    assert set(names) <= {"FROM", "COPY", "RUN", "ENV", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    values = dict(instructions)
    assert values["FROM"].startswith(f"vllm/vllm-openai:v{TESTED}.")
    assert json.loads(values["ENTRYPOINT"]) == ["sealign", "serve"]
    assert json.loads(values["HEALTHCHECK"].partition("CMD ")[2])[-1].endswith(f":{values['EXPOSE']}/health")


def test_what_the_container_file_copies_exists(instructions: list[tuple[str, str]]) -> None:
    """From the root, which is the context of the compose example; what the package is built from is among it."""
    copied = [source for name, rest in instructions if name == "COPY" for source in rest.split()[:-1]]
    for source in copied:
        assert (ROOT / source).exists(), source
    assert {"pyproject.toml", "README.md", "LICENSE", "src"} <= set(copied)


def test_the_compose_example_starts_what_the_container_file_has(
    service: dict[str, Any], instructions: list[tuple[str, str]]
) -> None:
    context = (FOLDER / service["build"]["context"]).resolve()
    assert context == ROOT
    assert (context / service["build"]["dockerfile"]).is_file()
    port = dict(instructions)["EXPOSE"]
    command = service["command"]
    assert command[command.index("--port") + 1] == port
    assert service["ports"] == [f"127.0.0.1:{port}:{port}"]
    mounted = {volume.split(":")[1]: volume.split(":")[0] for volume in service["volumes"]}
    assert command[command.index("--edits-dir") + 1] in mounted
    assert dict(instructions)["VOLUME"] in mounted
    assert f"SEALIGN_CACHE={dict(instructions)['VOLUME']}" == dict(instructions)["ENV"]
    assert TOKEN_VARIABLE in service["environment"]


def test_the_compose_example_names_volumes_and_options_that_exist(service: dict[str, Any]) -> None:
    whole = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    named = {volume.split(":")[0] for volume in service["volumes"]}
    assert {volume for volume in named if not volume.startswith(".")} == set(whole["volumes"])
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {option for parameter in serve.params for option in parameter.opts}
    given = {word for word in service["command"] if word.startswith("--")}
    assert given - known == {"--host", "--port"}  # those of vLLM
