"""Deployments of an edit that ``sealign verify`` compares with the hooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sealign.errors import SettingError, unknown_name
from sealign.export.verify import Outputs, model_outputs
from sealign.models.loading import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("lora", "merged", "gguf", "vllm")


@dataclass(frozen=True)
class Deployment:
    """A deployment as a user names it, such as ``lora=DIR``.

    Attributes:
        kind: ``lora``, ``merged``, ``gguf`` or ``vllm``.
        place: Folder, file or URL.
        edit_name: Name of the edit on the server; empty unless the kind is ``vllm``.
    """

    kind: str
    place: str
    edit_name: str = ""


def parse_deployment(text: str) -> Deployment:
    """Return the deployment that a text names, and check that its folder or file exists.

    Args:
        text: ``lora=DIR``, ``merged=DIR``, ``gguf=FILE`` or ``vllm=URL#NAME``.

    Raises:
        SettingError: The kind is unknown, the place is missing, or it does not exist.

    Example:
        >>> parse_deployment("vllm=http://127.0.0.1:8000#truthful").edit_name
        'truthful'
    """
    kind, _, place = text.partition("=")
    if kind not in KINDS or not place:
        raise SettingError(unknown_name("deployment", kind, KINDS) + ", as lora=DIR")
    if kind == "vllm":
        url, _, edit_name = place.partition("#")
        if not edit_name:
            raise SettingError(f"--against {text} names no edit; write {text}#NAME")
        return Deployment(kind, url, edit_name)
    path, expected = Path(place), "file" if kind == "gguf" else "folder"
    if not (path.is_file() if kind == "gguf" else path.is_dir()):
        raise SettingError(f"there is no {expected} '{place}' for --against {text}; check the path")
    return Deployment(kind, place)


def export_outputs(
    deployment: Deployment,
    tokenizer: PreTrainedTokenizerBase,
    model_name: str,
    *,
    base: Path | None = None,
    loading: Mapping[str, Any],
    max_new_tokens: int = 16,
) -> Outputs:
    """Return the outputs of an exported edit.

    Args:
        deployment: A ``lora``, ``merged`` or ``gguf`` deployment.
        tokenizer: Tokenizer of the base model.
        model_name: Name of the base model, as for ``load_model``.
        base: GGUF file of the base model, for a GGUF LoRA or a control vector. Default: the file of the embedded model.
        loading: Keyword arguments of ``load_model``.
        max_new_tokens: Number of tokens to generate after each prompt.

    Raises:
        ExportError: A GGUF file cannot be run.
        ModelError: A model cannot be loaded.
    """
    place = deployment.place
    if deployment.kind == "gguf":
        from sealign.export.gguf_file import base_file
        from sealign.export.llama_cpp import llama_outputs

        return llama_outputs(Path(place), base_file(model_name, base), tokenizer, max_new_tokens=max_new_tokens)
    if deployment.kind == "merged":
        return model_outputs(*load_model(place, **loading), max_new_tokens=max_new_tokens)
    from peft import PeftModel

    model, tokenizer = load_model(model_name, **loading)
    adapted: Any = PeftModel.from_pretrained(model, place).eval()
    return model_outputs(adapted, tokenizer, max_new_tokens=max_new_tokens)
