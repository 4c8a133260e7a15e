"""The command line of vLLM's server for a model and its edits."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from sealign.edits.edit import Edit
from sealign.errors import ServingError
from sealign.files import CONFIG_NAME, cache_dir, locate_folder
from sealign.models.embedded_model import EMBEDDED
from sealign.models.loading import checkpoint_folder
from sealign.serving.settings import PLUGIN, ServerSettings, is_lora, lora_rank, plan_bank

_OURS = ("--additional-config", "--worker-extension-cls", "--enable-lora", "--max-lora-rank", "--max-loras")


def require_vllm() -> None:
    """Raise where vLLM is not installed.

    Raises:
        ServingError: says how to install it.
    """
    if find_spec("vllm") is None:
        raise ServingError("vLLM is not installed in this environment; install it with: pip install vllm")


def server_command(
    model: str | None,
    edits: Mapping[str, str],
    library: Path | None,
    *,
    max_edits: int,
    loras: bool = True,
    arguments: Sequence[str] = (),
) -> tuple[list[str], dict[str, str]]:
    """Return the arguments of the Python interpreter, and the variables, with which the server starts.

    Args:
        model: name of the base model; None for that of the first edit, or the embedded one.
        edits: folders or repositories of the edits to begin with, by name.
        library: folder of edits that an administrator may load later; room is made for those in it now.
        max_edits: how many of each route may be loaded at once.
        loras: whether edits that are exactly LoRAs are served as such, or like all others.
        arguments: more, for vLLM.

    Raises:
        ServingError: no edit is given, or an argument is ours to set.
        EditFileError: an edit cannot be read.
        ModelError: there is no such model.
    """
    taken = [name for name in _OURS if any(a == name or a.startswith(f"{name}=") for a in arguments)]
    if taken:
        raise ServingError(f"{taken[0]} is set by sealign serve itself; leave it out")
    folders = {name: str(locate_folder(place)) for name, place in edits.items()}
    loaded = {name: Edit.from_pretrained(folder) for name, folder in folders.items()}
    within_reach = loaded | _library(library)
    if not within_reach:
        raise ServingError("there is no edit to serve; give --edit NAME=EDIT, or --edits-dir DIR with edits in it")
    name = model or next((edit.record.model.id for edit in loaded.values()), EMBEDDED)
    adapters = {n: edit for n, edit in within_reach.items() if loras and is_lora(edit)}
    plan = plan_bank({n: edit for n, edit in within_reach.items() if n not in adapters}, max_edits=max_edits)
    command = [
        "-m",
        "vllm.entrypoints.launchers.api_server.entry",
        "--model",
        str(checkpoint_folder(name)),
        "--served-model-name",
        name,
    ]
    command += ["--additional-config", json.dumps(plan.as_config())]
    command += ["--worker-extension-cls", "sealign.serving.worker.EditWorker"]
    if adapters:
        places = max(max_edits, len(adapters.keys() & loaded.keys()))
        rank = lora_rank(list(adapters.values()))
        command += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(places)]
    settings = ServerSettings(
        name, folders, None if library is None else str(library.resolve()), str(cache_dir() / "adapters")
    )
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name and name != PLUGIN]
    variables = {"VLLM_PLUGINS": ",".join([*plugins, PLUGIN])} | settings.to_environment()
    return [*command, *arguments], variables


def _library(library: Path | None) -> dict[str, Edit]:
    """The edits in the folder of ``--edits-dir``."""
    if library is None:
        return {}
    if not library.is_dir():
        raise ServingError(f"there is no folder '{library}' for --edits-dir; make it, or check the path")
    folders = [path for path in sorted(library.iterdir()) if (path / CONFIG_NAME).is_file()]
    return {f"{library.name}/{path.name}": Edit.from_pretrained(path) for path in folders}
