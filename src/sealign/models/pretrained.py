"""Model and tokenizer through transformers: no output, no randomly filled weights, errors of one sentence."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sealign.errors import ModelError, first_sentence


@dataclass(frozen=True)
class ModelSource:
    """Place that a model is read from.

    Attributes:
        place: Local folder, or the id of a repository on the Hub as a string.
        gguf_file: Name of the GGUF file in the folder; None for a checkpoint in safetensors.
    """

    place: Path | str
    gguf_file: str | None = None

    @property
    def on_hub(self) -> bool:
        """Whether the model is read from the Hub."""
        return isinstance(self.place, str)

    def arguments(self, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
        """Return the keyword arguments that every ``from_pretrained`` needs for this source."""
        arguments: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
        if self.gguf_file is not None:
            arguments["gguf_file"] = self.gguf_file
        if self.on_hub and revision is not None:
            arguments["revision"] = revision
        return arguments


def gguf_source(path: Path) -> ModelSource:
    """Return the source of a GGUF file.

    Raises:
        ModelError: The file does not exist, or the package ``gguf`` is not installed.
    """
    if not path.is_file():
        raise ModelError(f"there is no file '{path}'; check the path")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("reading a GGUF file needs the gguf extra: pip install 'sealign[gguf]'")
    return ModelSource(path.parent, path.name)


def auto_model(config: Any) -> Any:
    """Return the class of transformers that builds or loads a language model of a configuration.

    It is ``AutoModelForCausalLM``, or ``AutoModelForImageTextToText`` for vision-language models that transformers does
    not list under the former, such as Qwen2.5-VL.

    Args:
        config: Configuration of transformers; None for a causal language model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForCausalLM if known else AutoModelForImageTextToText


def empty_model(config: Any, **options: Any) -> Any:
    """Return the model of a configuration on the meta device, without weights.

    Args:
        config: Configuration of transformers.
        **options: Further arguments of ``from_config`` of the model's class.
    """
    with torch.device("meta"):
        model = auto_model(config).from_config(config, **options)
    # Parameters that are drawn by torch.normal, as in DiffLlama, are made on the CPU.
    return model.to("meta")


def read_pretrained(
    name: str,
    source: ModelSource,
    dtype: torch.dtype | str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """Return a causal language model and its tokenizer.

    Args:
        name: Name that the user gave, for error messages.
        source: Place of the checkpoint.
        dtype: Type of the weights, or ``auto`` for the type that they are stored in.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Whether to run code from the checkpoint.
        **options: Further arguments of ``from_pretrained`` of the model's class.

    Raises:
        ModelError: The checkpoint cannot be read, or lacks weights of the model.
    """
    from transformers import AutoConfig, AutoTokenizer

    arguments = source.arguments(revision, trust_remote_code)
    try:
        with quiet_transformers(), _gguf_read_once() if source.gguf_file else contextlib.nullcontext():
            tokenizer = AutoTokenizer.from_pretrained(source.place, **arguments)
            config = None if source.gguf_file else AutoConfig.from_pretrained(source.place, **arguments)
            loaded: Any = auto_model(config).from_pretrained(
                source.place,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **arguments,
                **options,
            )
    except MemoryError:
        raise
    except Exception as error:  # transformers and the readers of files raise many unrelated types
        raise loading_error(name, source, error) from error
    model, report = loaded
    # transformers fills missing weights with random numbers.
    broken = sorted(report["missing_keys"]) + [key for key, *_ in sorted(report["mismatched_keys"])]
    if broken:
        raise ModelError(
            f"cannot load model '{name}': {len(broken)} weights are missing or do not have the shape in config.json, "
            f"such as '{broken[0]}'; the checkpoint is incomplete, or is not a causal language model"
        )
    return model, tokenizer


def loading_error(name: str, source: ModelSource, error: Exception) -> ModelError:
    """Return the error to raise when reading a source has failed.

    Args:
        name: Name that the user gave.
        source: Place of the checkpoint.
        error: Exception of another library.
    """
    remedy = "check the name and the network" if source.on_hub else "check the files, or download them again"
    return ModelError(f"cannot load model '{name}': {first_sentence(error)}; {remedy}")


@contextlib.contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Let transformers read the fields of a GGUF file and make its map of names once inside a ``with`` block.

    It reads them for the tokenizer, the configuration and the weights, and makes the map for every module: half of the
    time of a conversion.
    """
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    originals = {name: getattr(gguf, name) for name in names}
    for name, original in originals.items():
        setattr(gguf, name, functools.cache(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress the progress bars and load reports of transformers inside a ``with`` block."""
    from transformers.utils import logging as transformers_logging

    enabled = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if enabled:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
