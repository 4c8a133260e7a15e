"""Edits as files to download: the edit itself, and its exports, in a folder that the caller removes."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sealign.edits.edit import Edit
from sealign.edits.intervention import Intervention
from sealign.errors import ExportError, SealignError, check_choice
from sealign.export.requirements import check_exportable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sealign.playground.offered_edits import OfferedEdits

EDIT = "edit"
"""Form of a download that is the folder of the edit itself."""


@dataclass(frozen=True)
class Form:
    """A form in which an edit is exported.

    Attributes:
        write: Function of the model, the edit, the path to write, and whether to accept another model.
        suffix: End of the name of what it writes.
        package: Package that it needs, which is an extra of its name, too.
    """

    write: Callable[[PreTrainedModel, Edit, Path, bool], object]
    suffix: str
    package: str


def _write_lora(model: PreTrainedModel, edit: Edit, path: Path, ignore_mismatch: bool) -> None:
    from sealign.export.lora import export_lora

    export_lora(model, edit, path, ignore_mismatch=ignore_mismatch)


def _write_control_vector(_: PreTrainedModel, edit: Edit, path: Path, __: bool) -> None:
    from sealign.export.control_vector import export_control_vector
    from sealign.export.gguf_file import architecture_of, base_file, open_gguf

    source = base_file(edit.base_model.id, None)
    architecture = None if source is None else architecture_of(open_gguf(source))
    export_control_vector(edit, path, architecture=architecture)


def _write_gguf_lora(model: PreTrainedModel, edit: Edit, path: Path, ignore_mismatch: bool) -> None:
    from sealign.export.gguf import export_gguf_lora
    from sealign.export.gguf_file import base_file
    from sealign.export.lora import lora_factors

    source = base_file(edit.base_model.id, None)
    if source is None:
        lora_factors(model, edit, ignore_mismatch=ignore_mismatch)  # what no file would change comes first
        raise ExportError(
            "the base model is not loaded from a GGUF file; save the edit, and name the file with --base of sealign "
            "export gguf --lora"
        )
    export_gguf_lora(model, source, edit, path, ignore_mismatch=ignore_mismatch)


FORMS: Mapping[str, Form] = {
    "lora": Form(_write_lora, "-lora", "peft"),
    "control_vector": Form(_write_control_vector, "-control-vector.gguf", "gguf"),
    "gguf_lora": Form(_write_gguf_lora, "-lora.gguf", "gguf"),
}
"""The forms of exports; a LoRA adapter is a folder."""


def export_obstacles(model: PreTrainedModel, edit: Intervention, *, ignore_mismatch: bool) -> dict[str, str | None]:
    """Return why an edit cannot be exported in each form, or None where it can, by exporting it.

    Args:
        model: The base model.
        edit: The edit.
        ignore_mismatch: Whether to accept a model with another fingerprint.
    """
    found: dict[str, str | None] = {}
    for form in FORMS:
        with tempfile.TemporaryDirectory(prefix="sealign-download-") as folder:
            try:
                _export(model, edit, form, "edit", Path(folder), ignore_mismatch)
            except SealignError as error:
                found[form] = str(error)
            else:
                found[form] = None
    return found


def write_download(
    model: PreTrainedModel,
    edits: OfferedEdits,
    name: str,
    strength: float | None,
    *,
    form: str,
    folder: Path,
) -> Path:
    """Write an edit into a folder, in a form, and return the file; folders are zipped.

    Args:
        model: The base model.
        edits: The edits.
        name: Name of the edit.
        strength: Strength to write it with.
        form: ``edit`` or a key of ``FORMS``.
        folder: An existing folder that nothing else uses.

    Raises:
        ExportError: The edit cannot be exported in this form; says why.
        SettingError: The form or the edit is unknown, or the strength is out of range.
    """
    check_choice("form", form, (EDIT, *FORMS))
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or EDIT
    if form == EDIT:
        edits.write(name, strength, folder / plain)
        written = folder / plain
    else:
        edit, _ = edits.combine([(name, strength)])
        assert edit is not None
        written = _export(model, edit, form, plain, folder, edits.ignore_mismatch)
    return written if written.is_file() else _zip(written)


def _export(
    model: PreTrainedModel, edit: Intervention, form: str, name: str, folder: Path, ignore_mismatch: bool
) -> Path:
    """Export an edit, and return the file or the folder that was written."""
    if not isinstance(edit, Edit):
        raise ExportError(f"the method {edit.method} does not edit activations, so it cannot be exported")
    if find_spec(FORMS[form].package) is None:
        package = FORMS[form].package
        raise ExportError(f"the package {package} is not installed; install it with: pip install 'sealign[{package}]'")
    check_exportable(edit)
    path = folder / f"{name}{FORMS[form].suffix}"
    FORMS[form].write(model, edit, path, ignore_mismatch)
    return path


def _zip(folder: Path) -> Path:
    """Return a zip file of a folder, beside it, in which the folder has its name."""
    return Path(shutil.make_archive(str(folder), "zip", folder.parent, folder.name))
