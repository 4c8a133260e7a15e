"""GGUF files: opening, names of tensors, and copies in which some tensors differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from torch import nn

from sealign.errors import ExportError
from sealign.models.embedded_model import EMBEDDED, embedded_file
from sealign.models.structure import text_config


def base_file(model: str, given: Path | None) -> Path | None:
    """Return the GGUF file of a base model, or None if it was not given and cannot be found.

    Args:
        model: Name of the base model, as for ``load_model``.
        given: File that the user named; used if not None.
    """
    if given is None and model == EMBEDDED:
        return embedded_file()
    if given is None and Path(model).suffix == ".gguf":
        return Path(model)
    return given


def open_gguf(source: str | Path | None) -> gguf.GGUFReader:
    """Open a GGUF file.

    Args:
        source: The file.

    Raises:
        ExportError: No file is given, it does not exist, or it is not GGUF.
    """
    if source is None:
        raise ExportError("the base model is not loaded from a GGUF file; name its GGUF file with --base")
    if not Path(source).is_file():
        raise ExportError(f"there is no file '{source}'; check the path")
    try:
        return gguf.GGUFReader(str(source))
    except (ValueError, OSError) as error:
        raise ExportError(f"'{source}' cannot be read as GGUF ({error}); check the file") from error


def value_of(reader: gguf.GGUFReader, key: str) -> Any:
    """Return the value of a key of a GGUF file, or None if the file does not have it.

    Args:
        reader: The open file.
        key: Name of the key, such as ``general.architecture``.
    """
    field = reader.get_field(key)
    return None if field is None else field.contents()


def architecture_of(reader: gguf.GGUFReader) -> str:
    """Return the architecture of a GGUF file, such as ``llama``, or an empty string if it names none.

    Args:
        reader: The open file.
    """
    return str(value_of(reader, gguf.Keys.General.ARCHITECTURE) or "")


def file_names(reader: gguf.GGUFReader, model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return the names that tensors of a model have in its GGUF file; those that the file lacks are left out.

    Args:
        reader: The open GGUF file of the model.
        model: The model, for its number of layers.
        names: Names in the model, ending in ``.weight`` or ``.bias``.

    Raises:
        ExportError: The ``gguf`` library does not know the architecture.
    """
    architecture = architecture_of(reader)
    known = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise ExportError(
            f"the gguf library does not know the architecture '{architecture}' of the GGUF file; upgrade the library"
        )
    table = gguf.get_tensor_name_map(known[architecture], text_config(model).num_hidden_layers)
    present = {tensor.name for tensor in reader.tensors}
    # llama.cpp's converter leaves out this part of the names in vision-language models.
    plain = {name: name.replace("language_model.", "", 1) for name in names}
    found = {name: table.get_name(text, try_suffixes=(".weight", ".bias")) for name, text in plain.items()}
    return {name: stored for name, stored in found.items() if stored in present}


def write_copy(reader: gguf.GGUFReader, target: Path, changed: Mapping[str, tuple[Any, GGMLQuantizationType]]) -> None:
    """Write a copy of a GGUF file in which some tensors differ.

    Args:
        reader: The open file to copy.
        target: File to write.
        changed: New data and type by name of the tensor.
    """
    writer = gguf.GGUFWriter(target, architecture_of(reader), endianess=reader.endianess)
    for field in reader.fields.values():
        if field.name == gguf.Keys.General.ARCHITECTURE or field.name.startswith("GGUF."):
            continue  # the writer adds these itself
        kind = field.types[0]
        element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        if field.contents() is not None:
            writer.add_key_value(field.name, field.contents(), kind, sub_type=element)
    for tensor in reader.tensors:
        data, kind = changed.get(tensor.name, (tensor.data, tensor.tensor_type))
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        data, _ = changed.get(tensor.name, (tensor.data, None))
        writer.write_tensor_data(np.ascontiguousarray(data), tensor_endianess=reader.endianess)
    writer.close()


def write_small(writer: gguf.GGUFWriter, target: Path) -> None:
    """Write the keys and tensors that were added to a writer, and close it.

    Args:
        writer: A writer without a file.
        target: File to write.
    """
    writer.write_header_to_file(target)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
