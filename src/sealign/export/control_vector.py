"""Control vectors of llama.cpp: a constant shift of the residual stream, in a GGUF file beside the model's."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from sealign.edits.edit import Edit
from sealign.errors import ExportError
from sealign.export.gguf_file import write_small
from sealign.export.requirements import check_exportable, check_ungated, is_shift, serve_or_attach
from sealign.files import check_file, new_file

ARCHITECTURE = "controlvector"
"""Value of ``general.architecture`` in the file of a control vector."""


def export_control_vector(
    edit: Edit, target: str | Path, *, architecture: str | None = None, overwrite: bool = False
) -> list[str]:
    """Write a pure shift of the residual stream as a control vector of llama.cpp.

    llama.cpp adds the tensor ``direction.N`` to the output of layer N, counted from 0 as here, and has none for layer
    0. The strength is multiplied into the file: llama.cpp's own scale is 1, as with ``--control-vector FILE``.

    Args:
        edit: An edit of the residual stream that adds a constant vector at each layer, such as a mean difference.
        target: File to write. It appears complete or not at all.
        architecture: llama.cpp's name of the base model's architecture, stored as a hint that llama.cpp does not check.
            The model type of transformers if None.
        overwrite: Whether to replace an existing file.

    Returns:
        Names of the tensors of the file.

    Raises:
        ExportError: A control vector cannot carry the edit; says why, and what can.
        EditFileError: The file exists and ``overwrite`` is False.
    """
    check_file(Path(target), overwrite=overwrite)
    check_exportable(edit)
    _check_control_vector(edit)
    hint = architecture or str(edit.base_model.fingerprint.get("model_type"))
    directions = {f"direction.{layer}": _direction(edit, layer) for layer in edit.layers}
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", hint)
    writer.add_int32(f"{ARCHITECTURE}.layer_count", len(directions))
    for name, direction in directions.items():
        writer.add_tensor(name, direction)
    with new_file(Path(target)) as temporary:
        write_small(writer, temporary)
    return list(directions)


def read_control_vector(reader: gguf.GGUFReader, *, layers: int, width: int) -> NDArray[np.float32]:
    """Return the vectors of a control vector, (layers - 1, d): row i is added to the output of layer i + 1.

    Args:
        reader: The open file of the control vector.
        layers: Number of layers of the model.
        width: Number of features d of the model.

    Raises:
        ExportError: A tensor is not a direction of one of these layers, or has another number of features.
    """
    rows = np.zeros((layers - 1, width), dtype=np.float32)
    for tensor in reader.tensors:
        name, _, number = tensor.name.partition(".")
        if name != "direction" or not number.isdecimal() or not 1 <= int(number) < layers:
            raise ExportError(
                f"the control vector has a tensor '{tensor.name}', but the model has directions 1 to {layers - 1}; "
                "give the GGUF file of its base model"
            )
        if tensor.data.shape != (width,):
            raise ExportError(
                f"the control vector has {len(tensor.data)} features, but the model has {width}; give the GGUF file of "
                "its base model"
            )
        rows[int(number) - 1] = tensor.data
    return rows


def _check_control_vector(edit: Edit) -> None:
    check_ungated(edit)
    if edit.site != "residual":
        raise ExportError(
            f"the edit acts on the site '{edit.site}', but a control vector is added to the residual stream; export a "
            f"merged checkpoint, {serve_or_attach(edit)}, or fit one with site=residual"
        )
    for layer, layer_edit in edit.affine_edits.items():
        if not is_shift(layer_edit):
            raise ExportError(
                f"at layer {layer} the change depends on the activation (rank {layer_edit.rank}, scale "
                f"{layer_edit.scale:g}), but a control vector adds a constant vector; "
                f"{serve_or_attach(edit)}"
            )
    if 0 in edit.layers:
        raise ExportError(
            f"the edit acts on layer 0, but llama.cpp adds control vectors from layer 1 on; {serve_or_attach(edit)}, "
            "or fit one without layer 0"
        )


def _direction(edit: Edit, layer: int) -> NDArray[np.float32]:
    constant = edit.affine_edits[layer].constant_part()
    if constant is None:
        return np.zeros(edit.width, dtype=np.float32)
    direction: NDArray[np.float32] = (edit.strength * constant).float().numpy()
    if not np.isfinite(direction).all():
        raise ExportError(f"the direction of layer {layer} is not finite in float32; use a lower strength")
    return direction
