"""Loading of models: the embedded model, GGUF files, local folders and the Hub."""

from __future__ import annotations

import logging
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sealign.cache import cache_dir
from sealign.errors import ModelError, first_sentence, suggestion
from sealign.models.checkpoint_tensors import (
    INDEX_NAME,
    CheckpointTensors,
    Fetch,
    checkpoint_tensors,
    weight_files,
)
from sealign.models.devices import SPLIT, choose_device, choose_dtype
from sealign.models.embedded_model import EMBEDDED, convert_gguf, embedded_model
from sealign.models.pretrained import (
    ModelSource,
    empty_model,
    gguf_source,
    loading_error,
    quiet_transformers,
    read_pretrained,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

HUB_TIMEOUT = 10.0
"""Largest number of seconds to wait for the Hub's answer whether a model exists."""


def locate_model(name: str) -> ModelSource:
    """Return the place that a name stands for: the embedded model, a GGUF file, a local folder or a Hub repository.

    Args:
        name: As for ``load_model``. A name without a folder of that name is taken for a Hub id, also without an owner,
            as in ``gpt2``; whether the repository exists is not checked.

    Raises:
        ModelError: The name is none of these, the folder has no model, the file does not exist, or a required package
            is not installed.

    Example:
        >>> locate_model("gpt2")
        ModelSource(place='gpt2', gguf_file=None)
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    path = Path(name)
    if name == EMBEDDED:
        return ModelSource(embedded_model())
    if path.suffix == ".gguf":
        return gguf_source(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            files = sorted(path.glob("*.gguf"))
            remedy = f"give the file {files[0]}" if files else "give the folder of a model, a Hub id or a .gguf file"
            raise ModelError(f"there is no model in the folder '{name}', which has no config.json; {remedy}")
        return ModelSource(path)
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise _no_model(name) from None
    return ModelSource(name)


_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
"""Patterns of the files of a checkpoint beside its weights."""


def load_model(
    name: str = EMBEDDED,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    quantization_config: Any = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a language model and its tokenizer, in evaluation mode.

    A vision-language model is loaded whole, and edited in its text decoder.

    Args:
        name: ``smollm2`` (embedded; converted once into the user's cache), a Hub id, a local folder, or a ``.gguf``
            file.
        dtype: Type of the weights: ``auto`` (the stored type, but float32 instead of float16 on a CPU), ``float32``,
            ``bfloat16``, ``float16`` or ``float64``, or the torch type itself.
        device: ``auto`` (CUDA, else MPS, else CPU), a device or its name, or ``split`` for a model larger than one
            device: its weights are distributed over all devices, then the memory of the CPU, then temporary files in
            the user's cache.
        revision: Branch, tag or commit on the Hub. Ignored for other sources.
        trust_remote_code: Whether to run Python code that comes with the checkpoint.
        attn_implementation: Attention of transformers to use, such as ``sdpa`` or ``flash_attention_2``. The default of
            transformers if None.
        quantization_config: Configuration of transformers to quantise the weights with as they are loaded, such as
            ``BitsAndBytesConfig(load_in_4bit=True)``.

    Raises:
        ModelError: The model is not found, is incomplete or is no causal language model, or a package is missing.

    Example:
        >>> model, tokenizer = load_model("smollm2")
        >>> model.config.num_hidden_layers
        30
    """
    target = None if device == SPLIT else choose_device(device)
    chosen = choose_dtype(dtype)
    source = _find_model(name, revision)
    given = {"attn_implementation": attn_implementation, "quantization_config": quantization_config}
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if target is None:
        # Each model needs its own folder, because offloaded weights are stored in it by parameter name.
        cache_dir().mkdir(parents=True, exist_ok=True)
        offload = tempfile.TemporaryDirectory(prefix="offload-", dir=cache_dir())
        options |= {"device_map": "auto", "offload_folder": offload.name}
    elif quantization_config is not None:
        options["device_map"] = {"": target}  # quantised weights cannot be moved afterwards
    try:
        model, tokenizer = read_pretrained(
            name, source, chosen, revision=revision, trust_remote_code=trust_remote_code, **options
        )
    except ModelError as error:
        if isinstance(error.__cause__, OSError):
            raise _loading_error(name, source, error.__cause__) from error.__cause__
        raise
    model.name_or_path = name
    if target is None:
        weakref.finalize(model, offload.cleanup)
    elif quantization_config is None:
        if target.type == "cpu" and model.dtype == torch.float16 and chosen == "auto":
            model = model.float()
        model = model.to(target)
    _log.info("loaded %s from %s as %s on %s", name, source.place, model.dtype, model.device)
    return model.eval(), tokenizer


def load_skeleton(
    name: str = EMBEDDED,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Return a model without weights, on the meta device, and its tokenizer, or None if it has no tokenizer.

    Only the configuration and the tokenizer are read or downloaded.

    Args:
        name: As for ``load_model``; a folder with a ``config.json`` alone is enough.
        dtype: Type that ``load_model`` would be given.
        device: Device that ``load_model`` would be given.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Whether to run Python code that comes with the checkpoint.

    Raises:
        ModelError: The model is not found, or is no causal language model.

    Example:
        >>> model, tokenizer = load_skeleton("smollm2")
        >>> model.device.type
        'meta'
    """
    from transformers import AutoConfig, AutoTokenizer

    on_cpu = device != SPLIT and choose_device(device).type == "cpu"
    chosen = choose_dtype(dtype)
    source = _find_model(name, revision)
    arguments = source.arguments(revision, trust_remote_code)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(source.place, **arguments)
            loaded = (getattr(config, "dtype", None) or torch.float32) if isinstance(chosen, str) else chosen
            if loaded == torch.float16 and chosen == "auto" and on_cpu:
                loaded = torch.float32
            trusted = {"trust_remote_code": True} if trust_remote_code else {}
            model = empty_model(config, dtype=loaded, **trusted)
    except Exception as error:  # transformers and the Hub client raise many unrelated types
        if source.on_hub:
            raise _loading_error(name, source, error) from error
        raise ModelError(
            f"cannot read the configuration of '{name}': {first_sentence(error)}; check its config.json"
        ) from error
    try:
        with quiet_transformers():
            return model, AutoTokenizer.from_pretrained(source.place, **arguments)
    except Exception:  # as above
        return model, None


def open_checkpoint(
    name: str = EMBEDDED, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, CheckpointTensors] | None:
    """Return a model without weights, and the tensors of its checkpoint, which are read one at a time.

    Of a sharded checkpoint on the Hub, a file is downloaded when a tensor is read from it.

    Args:
        name: As for ``load_model``.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Whether to run Python code that comes with the checkpoint.

    Returns:
        The model on the meta device and its tensors; None if the checkpoint is a GGUF file, is quantised or is not in
        safetensors, so that the model must be loaded.

    Raises:
        ModelError: The model is not found, or is no causal language model.
    """
    source = locate_model(name)
    if source.gguf_file is not None:
        return None
    model, _ = load_skeleton(name, revision=revision, trust_remote_code=trust_remote_code)
    if getattr(model.config, "quantization_config", None) is not None:
        return None
    if isinstance(source.place, str):
        folder = _download(name, source, revision, _SMALL_FILES)
        if (folder / INDEX_NAME).is_file():
            return model, checkpoint_tensors(folder, model, fetch=_fetch_from(name, source))
    folder = checkpoint_folder(name, revision=revision)
    return (model, checkpoint_tensors(folder, model)) if weight_files(folder) else None


def _fetch_from(name: str, source: ModelSource) -> Fetch:
    """Return a function that downloads a file of a snapshot of a repository."""

    def fetch(file: Path) -> Path:
        from huggingface_hub import hf_hub_download

        try:
            # The folder of a snapshot has the name of its commit.
            return Path(hf_hub_download(str(source.place), file.name, revision=file.parent.name))
        except Exception as error:  # the Hub client raises many unrelated types
            raise _loading_error(name, source, error) from error

    return fetch


def checkpoint_folder(name: str = EMBEDDED, *, revision: str | None = None) -> Path:
    """Return a local folder with the safetensors and tokenizer of a model, downloading or converting it if needed.

    Args:
        name: As for ``load_model``.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ModelError: The model is not found.
    """
    source = locate_model(name)
    if source.gguf_file is not None:
        return convert_gguf(Path(name), cache_dir() / "models")
    if isinstance(source.place, Path):
        return source.place
    return _download(name, source, revision, ("*.safetensors", *_SMALL_FILES))


def _download(name: str, source: ModelSource, revision: str | None, patterns: Sequence[str]) -> Path:
    """Return the folder with those files of a repository whose names match."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source.place), revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the Hub client raises many unrelated types
        raise _loading_error(name, source, error) from error


def _find_model(name: str, revision: str | None) -> ModelSource:
    """Return the place of a model, after a check in one attempt that it is in the cache or on the Hub.

    The Hub client tries several times for half a minute, with a message each time.

    Raises:
        ModelError: As for ``locate_model``, or the repository cannot be reached.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    source = locate_model(name)
    if isinstance(source.place, str):
        cached = try_to_load_from_cache(source.place, "config.json", revision=revision)
        try:
            if not isinstance(cached, str):
                HfApi().model_info(source.place, revision=revision, timeout=HUB_TIMEOUT)
        except Exception as error:  # the Hub client raises many unrelated types
            raise (loading_error(name, source, error) if "/" in name else _no_model(name)) from error
    return source


def _loading_error(name: str, source: ModelSource, error: Exception) -> ModelError:
    """Return the error for a failed read; a Hub id without an owner is more often a misspelt name or path."""
    if source.on_hub and "/" not in name and isinstance(error, OSError):
        return _no_model(name)
    return loading_error(name, source, error)


def _no_model(name: str) -> ModelError:
    return ModelError(
        f"there is no model '{name}'{suggestion(name, [EMBEDDED])}, or it cannot be downloaded; give {EMBEDDED}, a Hub "
        "id as owner/name, a local folder or a .gguf file, and check the network"
    )
