"""What ``sealign serve`` passes to the processes of the server, and which edits are served as LoRAs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sealign.edits.edit import Edit
from sealign.errors import ServingError, UnknownEditError
from sealign.serving.edit_slots import sizes_for
from sealign.serving.slot_buffers import SlotSizes

REQUEST_KEY = "sealign_edit"
"""Key in a request's ``vllm_xargs`` whose value is the name of an edit."""

PLUGIN = "sealign"
"""Name of Sealign's plug-ins of vLLM, and of its entry in vLLM's ``additional_config``."""

SETTINGS_VARIABLE = "SEALIGN_SERVING"
"""Environment variable that carries ``ServerSettings``."""

TOKEN_VARIABLE = "SEALIGN_ADMIN_TOKEN"
"""Environment variable that holds the administrator's token."""

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's ``--max-lora-rank``."""

PLUGIN_PATH = "sealign:"
"""Beginning of the path of a ``LoRARequest`` without weights, by which ``model`` selects an edit of the plug-in."""

_MODALITIES = ("text", "thinking", "refusal", "input", "output", "image", "audio", "video", "prompt", "tool")
"""Kinds of parts of a message, among which vLLM looks for the names of adapters, and applies the one that it finds."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class SlotPlan:
    """The modules of a model that get slots, and the sizes of the slots; fixed before the model is compiled.

    It is part of vLLM's configuration, and so of the key of its compiled graphs.

    Attributes:
        outputs: Paths of modules whose output can be edited, with ``*`` for the layer.
        streams: Paths of decoder layers after which the residual stream can be edited, with ``*`` for the layer.
        edits, rank, feature_maps: As for ``SlotSizes``.
    """

    outputs: tuple[str, ...]
    streams: tuple[str, ...]
    edits: int
    rank: int
    feature_maps: tuple[str, ...]

    @property
    def sizes(self) -> SlotSizes:
        """Sizes of the slots of each module."""
        return SlotSizes(self.edits, self.rank, self.feature_maps)

    def to_config(self) -> dict[str, Any]:
        """Return the plan as an entry of vLLM's ``additional_config``."""
        return {PLUGIN: asdict(self)}

    @classmethod
    def from_config(cls, additional_config: object) -> SlotPlan | None:
        """Return the plan in vLLM's ``additional_config``, or None if it holds none.

        Args:
            additional_config: vLLM's setting.
        """
        found = additional_config.get(PLUGIN) if isinstance(additional_config, dict) else None
        if found is None:
            return None
        lists: dict[str, Any] = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
        return cls(**found | lists)


def plan_slots(edits: Mapping[str, Edit], *, max_edits: int) -> SlotPlan:
    """Return the slots that edits need; a module edited at any layer gets slots at every layer.

    Args:
        edits: Mapping from name to edit, for the edits that are not served as LoRAs.
        max_edits: Number of edits that can be loaded at once; raised to the number of edits if that is larger.

    Example:
        >>> plan_slots({}, max_edits=2).outputs
        ()
    """
    outputs: set[str] = set()
    streams: set[str] = set()
    for edit in edits.values():
        for layer, module in zip(edit.layers, edit.modules, strict=True):
            pattern = re.sub(rf"(?<=\.){layer}(?=\.|$)", "*", module, count=1)
            (streams if edit.site == "residual" else outputs).add(pattern)
    sizes = sizes_for(edits, at_least=max_edits)
    return SlotPlan(tuple(sorted(outputs)), tuple(sorted(streams)), sizes.edits, sizes.rank, sizes.feature_maps)


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the front end of the server.

    Attributes:
        model: Name or folder of the base model.
        edits: Mapping from name to the folder of each edit that is loaded when the server starts.
        edits_dir: Folder whose subfolders an administrator may load by name, or None.
        adapters_dir: Folder for the LoRA adapters that are exported from edits.
    """

    model: str
    edits: dict[str, str]
    edits_dir: str | None
    adapters_dir: str

    def to_environment(self) -> dict[str, str]:
        """Return the environment variable that carries the settings, with its value."""
        return {SETTINGS_VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> ServerSettings:
        """Read the settings from the environment.

        Raises:
            ServingError: They are not there, since the server was not started by ``sealign serve``.
        """
        return cls.from_variables(os.environ)

    @classmethod
    def from_variables(cls, variables: Mapping[str, str]) -> ServerSettings:
        """Read the settings from environment variables.

        Args:
            variables: Mapping from name to value.

        Raises:
            ServingError: They are not there, since the server was not started by ``sealign serve``.
        """
        text = variables.get(SETTINGS_VARIABLE)
        if text is None:
            raise ServingError(f"{SETTINGS_VARIABLE} is not set; start the server with sealign serve")
        return cls(**json.loads(text))


def is_lora(edit: Edit) -> bool:
    """Return whether an edit is exactly a LoRA: x' = x + s left (right x) of the output of a module.

    The export refuses such an edit if no single matrix is behind the module, as in a mixture of experts.

    Args:
        edit: The edit.
    """
    return (
        edit.is_affine
        and edit.site != "residual"
        and all(
            layer_edit.normalization == "none" and layer_edit.scale == 0 and layer_edit.constant_part() is None
            for layer_edit in edit.affine_edits.values()
        )
    )


def lora_rank(edits: Sequence[Edit]) -> int:
    """Return the smallest of vLLM's LoRA ranks that holds every edit.

    Args:
        edits: Edits to load; must not be empty.

    Raises:
        ServingError: An edit's rank exceeds vLLM's largest.
    """
    needed = max(edit.rank for edit in edits)
    for rank in LORA_RANKS:
        if rank >= needed:
            return rank
    raise ServingError(
        f"an edit has rank {needed}, but vLLM's LoRAs have rank {LORA_RANKS[-1]} at most; fit an edit of lower rank, "
        "or start the server with --no-lora"
    )


def check_name(name: str) -> str:
    """Return the name of an edit, or raise if it is not valid; a valid name is never a path.

    Args:
        name: Letters, digits, ``.``, ``_`` and ``-``, at most 100, beginning with a letter or digit; no kind of part of
            a message, such as ``text`` or ``image``.

    Raises:
        ServingError: The name is not valid.
    """
    if not _NAME.fullmatch(name):
        raise ServingError(
            f"'{name[:100]}' cannot name an edit; use at most 100 letters, digits, '.', '_' and '-', beginning with a "
            "letter or digit"
        )
    if name in _MODALITIES:
        raise ServingError(
            f"'{name}' cannot name an edit, since vLLM would apply it to every message with a part of this kind; "
            "choose another name"
        )
    return name


def find_in_edits_dir(edits_dir: str | Path | None, name: str) -> Path:
    """Return the folder of an edit inside the folder of ``--edits-dir``.

    Args:
        edits_dir: The folder of ``--edits-dir``, or None if the server was started without it.
        name: Name of a subfolder.

    Raises:
        UnknownEditError: There is no such subfolder.
        ServingError: The server was started without ``--edits-dir``, or the name is not valid.
    """
    check_name(name)
    if edits_dir is None:
        raise ServingError(
            "this server loads no edits after its start; restart it with --edits-dir DIR to name their folder"
        )
    folders = {path.name: path for path in Path(edits_dir).iterdir() if path.is_dir()}
    if name not in folders:
        listed = ", ".join(sorted(folders)) or "none"
        raise UnknownEditError(f"there is no edit '{name}' in the folder of --edits-dir, which holds: {listed}")
    return folders[name]
