"""The methods by name, and what is common to them and to spectral edits: load, put on, take off."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from sealign.demonstrations.demonstration import Demonstration
from sealign.edits.attach import EditHandle, attach
from sealign.edits.edit import Edit
from sealign.errors import DemonstrationError, SettingError, unknown_name
from sealign.methods.best_of_n import BestOfN, BestOfNConfig
from sealign.methods.composition import Stack
from sealign.methods.contrastive_decoding import CD, ICD, CDConfig, ICDConfig
from sealign.methods.dola import DoLa, DoLaConfig
from sealign.methods.icl import ICL, ICLConfig
from sealign.methods.iti import ITI, ITIConfig
from sealign.methods.leace import LEACE, LEACEConfig
from sealign.methods.lora_ft import LoRAFT
from sealign.methods.lora_training import LoRATrainingConfig
from sealign.methods.mean_difference import CAA, CAAConfig
from sealign.methods.method import METHOD_NAME, Attached, Method, read_method
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHODS: Mapping[str, tuple[type[Method], type[Any]]] = {
    "icl": (ICL, ICLConfig),
    "lora_ft": (LoRAFT, LoRATrainingConfig),
    "iti": (ITI, ITIConfig),
    "dola": (DoLa, DoLaConfig),
    "cd": (CD, CDConfig),
    "icd": (ICD, ICDConfig),
    "best_of_n": (BestOfN, BestOfNConfig),
    "caa": (CAA, CAAConfig),
    "leace": (LEACE, LEACEConfig),
}
"""By name, each method and its settings."""

Change = Edit | Method | Stack
"""What can be put on a model: a spectral edit, a method that it is compared with, or several of both."""


def method_config(name: str, settings: Mapping[str, str] | None = None) -> Any:
    """Return a method's settings, with some given as text, as on a command line.

    Args:
        name: of the method.
        settings: by name, what differs from the defaults.

    Raises:
        SettingError: the method or a setting is unknown, or a value is not of its type.

    Example:
        >>> method_config("iti", {"heads": "12"}).heads
        12
    """
    if name not in METHODS:
        raise SettingError(unknown_name("method", name, METHODS))
    config = METHODS[name][1]
    hints = get_type_hints(config)
    known = [field.name for field in dataclasses.fields(config)]
    nested = {field: hint for field, hint in hints.items() if dataclasses.is_dataclass(hint)}
    given: dict[str, Any] = {}
    for key, text in (settings or {}).items():
        outer, _, inner = key.partition(".")
        if outer not in known:
            raise SettingError(unknown_name(f"setting of {name}", key, known))
        if inner and outer in nested:
            inside: Any = nested[outer]
            value = _value(f"{name}'s {key}", text, get_type_hints(inside).get(inner))
            given[outer] = dataclasses.replace(given.get(outer) or inside(), **{inner: value})
        else:
            given[key] = _value(f"{name}'s {key}", text, hints[key])
    return config(**given)


def _value(what: str, text: str, hint: Any) -> Any:
    kinds = [kind for kind in (get_args(hint) or (hint,)) if kind in (int, float, bool)]
    if not kinds:
        if hint is None or dataclasses.is_dataclass(hint):
            raise SettingError(f"{what} cannot be set; name one of its parts, as in training.rank=4")
        return text
    try:
        return kinds[0](text)
    except ValueError:
        raise SettingError(f"{what} is '{text}', but it must be a number") from None


def fit_method(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration] = (),
    *,
    config: Any = None,
    checkpoint_dir: str | Path | None = None,
    track: Track = no_progress,
) -> Method:
    """Fit a method that spectral editing is compared with.

    Args:
        name: one of ``METHODS``.
        model: any decoder of transformers; it is not changed.
        tokenizer: its own.
        demonstrations: at least 2, where the method needs any.
        config: its settings; the defaults if None.
        checkpoint_dir: where a training keeps its epochs, so that a killed one goes on.
        track: shows progress.

    Raises:
        SettingError: the method is unknown, or a setting is out of range.
        DemonstrationError: fewer than 2, or longer than the model's context.
        SiteError, ModelError: the model lacks what the method acts on.

    Example:
        >>> import sealign
        >>> model, tokenizer = sealign.load_model("smollm2")
        >>> fit_method("dola", model, tokenizer).settings["candidates"]
        [15, 17, 19, 21, 23, 25, 27, 29]
    """
    config = method_config(name) if config is None else config
    kind = METHODS[name][0]
    if kind.needs_demonstrations(config) and len(demonstrations) < 2:
        raise DemonstrationError(
            f"there are {len(demonstrations)} demonstrations, but {name} needs at least 2; name some"
        )
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    return kind.fit(model, tokenizer, demonstrations, config, checkpoint_dir=folder, track=track)


def load_change(source: str | Path) -> Edit | Method:
    """Load an edit or a method from where it was saved.

    Args:
        source: the folder of either, or an edit's repository on the Hub.

    Raises:
        EditFileError: there is neither, or a file is changed or missing.
    """
    folder = Path(source)
    if (folder / METHOD_NAME).is_file():
        return read_method(folder, {name: kind for name, (kind, _) in METHODS.items()})
    return Edit.from_pretrained(source)


def parts_of(change: Change) -> tuple[Edit | Method, ...]:
    """Return the edits and methods that a change is made of, itself if it is one."""
    return change.parts if isinstance(change, Stack) else (change,)


def prefix_of(change: Change | None) -> str:
    """Return the text that a change puts before every prompt."""
    return "" if change is None or isinstance(change, Edit) else change.prefix


def randomized(change: Change, seed: int) -> Change | None:
    """Return a change in random directions, its control, or None where it has no directions."""
    return None if isinstance(change, Stack) else change.randomized(seed)


def reversed_roles(change: Change) -> Change | None:
    """Return a change that acts the other way, or None where it has no way."""
    return None if isinstance(change, Stack) else change.reversed()


def describe_change(change: Change) -> str:
    """Return what a change is, for the record: the names of its parts."""
    return "+".join("sea" if isinstance(part, Edit) else part.name for part in parts_of(change))


def model_id(change: Change) -> str:
    """Return the name of the model that a change was fitted on."""
    return parts_of(change)[0].record.model.id


def fit_seconds(change: Change) -> float | None:
    """Return how long a change took to fit, or None where that was not measured."""
    parts = parts_of(change)
    methods = [part for part in parts if isinstance(part, Method)]
    return sum(part.record.fit_seconds for part in methods) if len(methods) == len(parts) else None


def attach_change(model: PreTrainedModel, change: Change, *, ignore_mismatch: bool = False) -> EditHandle | Attached:
    """Put an edit or a method on a model until the result is detached.

    Raises:
        FingerprintError, ModelError, SiteError: as ``attach``.
    """
    if isinstance(change, Edit):
        return attach(model, change, ignore_mismatch=ignore_mismatch)
    return change.attach(model, ignore_mismatch=ignore_mismatch)


@contextmanager
def apply_change(
    model: PreTrainedModel, change: Change, *, ignore_mismatch: bool = False
) -> Iterator[EditHandle | Attached]:
    """Put an edit or a method on a model inside a ``with`` block.

    Raises:
        FingerprintError, ModelError, SiteError: as ``attach``.
    """
    handle = attach_change(model, change, ignore_mismatch=ignore_mismatch)
    try:
        yield handle
    finally:
        handle.detach()
