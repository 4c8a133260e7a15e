"""What ``sealign serve`` tells the plug-in in the server's processes, and which edits go which way."""

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
from sealign.serving.edit_bank import size_for
from sealign.serving.edit_slots import BankSize

REQUEST_KEY = "sealign_edit"
"""The key in a request's ``vllm_xargs`` that names its edit."""

PLUGIN = "sealign"
"""Name of the plug-ins of both groups, and of our part of vLLM's ``additional_config``."""

SETTINGS_VARIABLE = "SEALIGN_SERVING"
TOKEN_VARIABLE = "SEALIGN_ADMIN_TOKEN"
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM makes room for."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class BankPlan:
    """The places for edits in a model, fixed when it is loaded, before it is compiled.

    It is part of vLLM's configuration, and so of the key of its compiled graphs.

    Attributes:
        outputs: paths of modules whose output can be edited, with ``*`` for the layer.
        streams: paths of decoder layers after which the residual stream can be edited, likewise.
        edits, rank, feature_maps: as of ``BankSize``.
    """

    outputs: tuple[str, ...]
    streams: tuple[str, ...]
    edits: int
    rank: int
    feature_maps: tuple[str, ...]

    @property
    def size(self) -> BankSize:
        """The room of each place."""
        return BankSize(self.edits, self.rank, self.feature_maps)

    def as_config(self) -> dict[str, Any]:
        """The plan as vLLM's ``additional_config`` holds it."""
        return {PLUGIN: asdict(self)}

    @classmethod
    def from_config(cls, additional_config: object) -> BankPlan | None:
        """Return the plan in vLLM's ``additional_config``, None where there is none."""
        found = additional_config.get(PLUGIN) if isinstance(additional_config, dict) else None
        if found is None:
            return None
        lists: dict[str, Any] = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
        return cls(**found | lists)


def plan_bank(edits: Mapping[str, Edit], *, max_edits: int) -> BankPlan:
    """Return the places that edits need, on every layer of the model.

    Args:
        edits: those that are not LoRAs, by name; with none, the MLP outputs of no layer.
        max_edits: how many may be loaded at once.

    Example:
        >>> plan_bank({}, max_edits=2).outputs
        ()
    """
    outputs: set[str] = set()
    streams: set[str] = set()
    for edit in edits.values():
        for layer, module in zip(edit.layers, edit.modules, strict=True):
            pattern = re.sub(rf"(?<=\.){layer}(?=\.|$)", "*", module, count=1)
            (streams if edit.settings.site == "residual" else outputs).add(pattern)
    size = size_for(edits, at_least=max_edits)
    return BankPlan(tuple(sorted(outputs)), tuple(sorted(streams)), size.edits, size.rank, size.feature_maps)


@dataclass(frozen=True)
class ServerSettings:
    """What the front end of the server needs to know.

    Attributes:
        model: name or folder of the base model, as ``--model`` gave it.
        edits: folders of the edits that are loaded at the start, by name.
        library: the folder whose subfolders an administrator may load by name, or None.
        adapters: folder for the LoRA adapters that are made from edits.
    """

    model: str
    edits: dict[str, str]
    library: str | None
    adapters: str

    def to_environment(self) -> dict[str, str]:
        """The variables that carry the settings."""
        return {SETTINGS_VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> ServerSettings:
        """Read the settings back.

        Raises:
            ServingError: they are not there; the server was not started by ``sealign serve``.
        """
        text = os.environ.get(SETTINGS_VARIABLE)
        if text is None:
            raise ServingError(f"{SETTINGS_VARIABLE} is not set; start the server with sealign serve")
        return cls(**json.loads(text))


def is_lora(edit: Edit) -> bool:
    """Whether an edit is exactly a LoRA: linear, not rescaled, not centred, no change of scale, of one module's output.

    It may still have no matrix to go on, as in a mixture of experts; the export then says so.
    """
    settings = edit.settings
    return (
        settings.feature_map == "identity"
        and settings.normalization == "none"
        and not settings.centered
        and settings.combine in ("both", "negative", "reversed")
        and settings.site != "residual"
    )


def lora_rank(edits: Sequence[Edit]) -> int:
    """Return the least rank for which vLLM makes room that holds every edit.

    Raises:
        ServingError: an edit's rank is over vLLM's largest.
    """
    needed = max(p.rank_positive + p.rank_negative for edit in edits for p in edit.projections.values())
    for rank in LORA_RANKS:
        if rank >= needed:
            return rank
    raise ServingError(
        f"an edit is of rank {needed}, but the server's LoRAs are of rank {LORA_RANKS[-1]} at most; fit one with a "
        "smaller --explained-variance"
    )


def check_name(name: str) -> str:
    """Return a name that an edit may have, which is never a path.

    Raises:
        ServingError: it has other characters than letters, digits, ``.``, ``_`` and ``-``, or begins with one of those.
    """
    if not _NAME.fullmatch(name):
        raise ServingError(
            f"'{name[:100]}' cannot name an edit; use at most 100 letters, digits, '.', '_' and '-', beginning with a "
            "letter or digit"
        )
    return name


def find_in_library(library: str | Path | None, name: str) -> Path:
    """Return the folder of an edit that the operator put within reach, by its name alone.

    Raises:
        UnknownEditError: none has this name.
        ServingError: no folder is within reach, or it is no name.
    """
    check_name(name)
    if library is None:
        raise ServingError("this server loads no further edits; start it with --edits-dir DIR to name their folder")
    folders = {path.name: path for path in Path(library).iterdir() if path.is_dir()}
    if name not in folders:
        listed = ", ".join(sorted(folders)) or "none"
        raise UnknownEditError(f"there is no edit '{name}' in the folder of --edits-dir, which has: {listed}")
    return folders[name]
