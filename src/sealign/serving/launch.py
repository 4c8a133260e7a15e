"""The command that starts vLLM's server for a model and its edits."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from sealign.cache import cache_dir
from sealign.edits.edit import Edit
from sealign.edits.record import RECORD_NAME
from sealign.errors import ModelError, SealignWarning, ServingError
from sealign.files import locate_folder
from sealign.models.embedded_model import EMBEDDED
from sealign.models.loading import checkpoint_folder, load_model
from sealign.serving.canary import PROMPT, fits_in_memory, hooks_canary
from sealign.serving.settings import PLUGIN, ServerSettings, is_lora, lora_rank, plan_slots
from sealign.serving.vllm_version import TESTED, check_vllm_version, vllm_version

_RESERVED = ("--additional-config", "--worker-extension-cls", "--enable-lora", "--max-lora-rank", "--max-loras")
"""Options of ``vllm serve`` that ``sealign serve`` sets itself."""


def require_vllm(*, untested: bool = False) -> None:
    """Raise if vLLM is not installed, or in a version that the tests have not run with.

    Args:
        untested: Whether any version is accepted.

    Raises:
        ServingError: vLLM is not installed, or in another version.
    """
    if find_spec("vllm") is None:
        raise ServingError(
            f"vLLM is not installed in this environment; install it with: pip install 'vllm=={TESTED}.*'"
        )
    check_vllm_version(vllm_version(), untested=untested)


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


def canary_variables(command: Sequence[str], variables: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables with the canary's answers by the hooks; none if the model does not fit in memory.

    The memory is free again when ``start_server`` has replaced this process.

    Args:
        command: Arguments of the Python interpreter, from ``server_command``.
        variables: Environment variables, from ``server_command``.

    Raises:
        FingerprintError: An edit was fitted on another model.
    """
    folder, started = Path(_value(command, "--model")), ServerSettings.from_variables(variables).edits
    asked = _value(command, "--dtype", "auto")
    dtype = {"half": "float16", "float": "float32"}.get(asked, asked)
    if not started or not fits_in_memory(folder, dtype):
        return {}
    try:
        model, tokenizer = load_model(str(folder), dtype=dtype, trust_remote_code="--trust-remote-code" in command)
    except ModelError as error:
        warnings.warn(
            f"the edits cannot be compared with the hooks when the server starts, only with the base model: {error}",
            SealignWarning,
            stacklevel=2,
        )
        return {}
    edits = [Edit.from_pretrained(edit) for edit in started.values()]
    return hooks_canary(model, list(tokenizer.encode(PROMPT)), edits).to_environment()


def _value(command: Sequence[str], option: str, default: str = "") -> str:
    """Return the value of the last occurrence of an option."""
    value = default
    for number, argument in enumerate(command):
        if argument == option and number + 1 < len(command):
            value = command[number + 1]
        elif argument.startswith(f"{option}="):
            value = argument.partition("=")[2]
    return value


def _edits_in(edits_dir: Path | None) -> dict[str, Edit]:
    """Return the edits in the folder of ``--edits-dir``, by folder and name."""
    if edits_dir is None:
        return {}
    if not edits_dir.is_dir():
        raise ServingError(f"there is no folder '{edits_dir}' for --edits-dir; create it, or check the path")
    folders = [path for path in sorted(edits_dir.iterdir()) if (path / RECORD_NAME).is_file()]
    return {f"{edits_dir.name}/{path.name}": Edit.from_pretrained(path) for path in folders}
