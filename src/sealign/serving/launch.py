"""The command that starts vLLM's server for a model and its edits."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from sealign.cache import cache_dir
from sealign.edits.edit import Edit
from sealign.edits.record import RECORD_NAME
from sealign.errors import ServingError
from sealign.files import locate_folder
from sealign.models.embedded_model import EMBEDDED
from sealign.models.loading import checkpoint_folder
from sealign.serving.settings import PLUGIN, ServerSettings, is_lora, lora_rank, plan_slots

_RESERVED = ("--additional-config", "--worker-extension-cls", "--enable-lora", "--max-lora-rank", "--max-loras")
"""Options of ``vllm serve`` that ``sealign serve`` sets itself."""


def require_vllm() -> None:
    """Raise if vLLM is not installed.

    Raises:
        ServingError: vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise ServingError("vLLM is not installed in this environment; install it with: pip install vllm")


def start_server(command: Sequence[str], variables: Mapping[str, str]) -> NoReturn:
    """Replace this process by the server.

    Args:
        command: Arguments of the Python interpreter, from ``server_command``.
        variables: Environment variables to set, from ``server_command``.
    """
    os.execve(sys.executable, [sys.executable, *command], os.environ | variables)


def server_command(
    model: str | None,
    edits: Mapping[str, str],
    *,
    edits_dir: Path | None = None,
    max_edits: int,
    loras: bool = True,
    arguments: Sequence[str] = (),
) -> tuple[list[str], dict[str, str]]:
    """Return the command that starts the server: arguments of the Python interpreter, and environment variables.

    Args:
        model: Name or folder of the base model. None: the model of the first edit, at its revision, or the embedded
            one.
        edits: Folders or repositories of the edits that are loaded at the start, by name.
        edits_dir: Folder of edits that an administrator may load later; slots are made to fit those in it now.
        max_edits: Number of edits of each route that can be loaded at once. Must be at least 1.
        loras: Whether edits that are exactly LoRAs are served as LoRAs; if not, the plug-in serves them.
        arguments: Further options of ``vllm serve``.

    Raises:
        ServingError: No edit is given, or an option is one that ``sealign serve`` sets itself.
        EditFileError: An edit cannot be read.
        ModelError: There is no such model.
    """
    taken = [name for name in _RESERVED if any(a == name or a.startswith(f"{name}=") for a in arguments)]
    if taken:
        raise ServingError(f"{taken[0]} is set by sealign serve itself; leave it out")
    folders = {name: str(locate_folder(place)) for name, place in edits.items()}
    started = {name: Edit.from_pretrained(folder) for name, folder in folders.items()}
    planned = started | _edits_in(edits_dir)
    if not planned:
        raise ServingError("there is no edit to serve; give --edit NAME=EDIT, or --edits-dir DIR with edits in it")
    base, revision = model or EMBEDDED, None
    if model is None and started:
        first = next(iter(started.values())).base_model
        base, revision = first.id, first.revision
    adapters = {name: edit for name, edit in planned.items() if loras and is_lora(edit)}
    plan = plan_slots({name: edit for name, edit in planned.items() if name not in adapters}, max_edits=max_edits)
    command = ["-m", "vllm.entrypoints.launchers.api_server.entry"]
    command += ["--model", str(checkpoint_folder(base, revision=revision)), "--served-model-name", base]
    command += ["--additional-config", json.dumps(plan.to_config())]
    command += ["--worker-extension-cls", "sealign.serving.worker.EditWorker"]
    if adapters:
        places = max(max_edits, len(adapters.keys() & started.keys()))
        rank = lora_rank(list(adapters.values()))
        command += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(places)]
    settings = ServerSettings(
        base, folders, None if edits_dir is None else str(edits_dir.resolve()), str(cache_dir() / "adapters")
    )
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name and name != PLUGIN]
    variables = {"VLLM_PLUGINS": ",".join([*plugins, PLUGIN])} | settings.to_environment()
    return [*command, *arguments], variables


def _edits_in(edits_dir: Path | None) -> dict[str, Edit]:
    """Return the edits in the folder of ``--edits-dir``, by folder and name."""
    if edits_dir is None:
        return {}
    if not edits_dir.is_dir():
        raise ServingError(f"there is no folder '{edits_dir}' for --edits-dir; create it, or check the path")
    folders = [path for path in sorted(edits_dir.iterdir()) if (path / RECORD_NAME).is_file()]
    return {f"{edits_dir.name}/{path.name}": Edit.from_pretrained(path) for path in folders}
