"""Registry of methods, with functions to fit and load edits."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, overload

from sealign.configuration import Config
from sealign.demonstrations.demonstration import Demonstration, check_demonstrations
from sealign.demonstrations.splits import Holdout, split_demonstrations
from sealign.edits.edit import Edit
from sealign.edits.edit_files import read_edit_files
from sealign.edits.intervention import Intervention
from sealign.errors import ActivationError, DemonstrationError, EditFileError, SettingError, unknown_name
from sealign.fitting.activation_store import Keep
from sealign.fitting.activations import Activations
from sealign.fitting.edit_config import EditConfig
from sealign.methods.best_of_n import BEST_OF_N
from sealign.methods.contrastive_decoding import CD, ICD
from sealign.methods.difference_operator import DIFFERENCE_OPERATOR
from sealign.methods.dola import DOLA
from sealign.methods.icl import ICL
from sealign.methods.iti import ITI
from sealign.methods.leace import LEACE
from sealign.methods.lora_ft import LORA_FT
from sealign.methods.mean_difference import MEAN_DIFFERENCE
from sealign.methods.method import FitContext, Method
from sealign.methods.sea import SEA, SEAConfig
from sealign.methods.targeted_shift import TARGETED_SHIFT
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_ALL = (SEA, DIFFERENCE_OPERATOR, TARGETED_SHIFT, MEAN_DIFFERENCE, ITI, LEACE, ICL, DOLA, CD, ICD, BEST_OF_N, LORA_FT)

METHODS: Mapping[str, Method] = {method.name: method for method in _ALL}
"""All methods by name; those that edit activations come first."""


def get_method(name: str) -> Method:
    """Return a method by its name.

    Args:
        name: Name of the method, such as ``sea`` or ``mean_difference``.

    Raises:
        SettingError: No method has this name; the nearest name is suggested.

    Example:
        >>> get_method("iti").config.__name__
        'ITIConfig'
    """
    if name not in METHODS:
        raise SettingError(unknown_name("method", name, METHODS))
    return METHODS[name]


def method_of(config: Config) -> Method:
    """Return the method that a configuration chooses by its type.

    Args:
        config: Configuration of a method.

    Raises:
        SettingError: No method has configurations of this type.

    Example:
        >>> method_of(SEAConfig(rank=4)).name
        'sea'
    """
    for method in METHODS.values():
        if type(config) is method.config:
            return method
    known = ", ".join(method.config.__name__ for method in METHODS.values())
    raise SettingError(
        f"config is of type {type(config).__name__}, but it must be the configuration of a method: {known}"
    )


@overload
def fit_edit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Iterable[Demonstration] = (),
    *,
    config: EditConfig = ...,
    holdout: Holdout | None = None,
    checkpoint_dir: str | Path | None = None,
    keep: Keep | None = None,
    track: Track = ...,
) -> Edit: ...


@overload
def fit_edit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Iterable[Demonstration] = (),
    *,
    config: Config,
    holdout: Holdout | None = None,
    checkpoint_dir: str | Path | None = None,
    keep: Keep | None = None,
    track: Track = ...,
) -> Intervention: ...


def fit_edit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Iterable[Demonstration] = (),
    *,
    config: Config = SEAConfig(),
    holdout: Holdout | None = None,
    checkpoint_dir: str | Path | None = None,
    keep: Keep | None = None,
    track: Track = no_progress,
) -> Intervention:
    """Fit an edit of a model from demonstrations; the type of the configuration chooses the method.

    Demonstrations of several behaviours in one list give a joint edit, in which each demonstration has the same weight.
    Inside ``worker_group``, the processes of ``torchrun`` or ``accelerate launch`` divide the demonstrations and the
    layers among themselves, and all return the same edit.

    Args:
        model: Any decoder that ``AutoModelForCausalLM`` loads; it is not changed.
        tokenizer: Tokenizer of the model.
        demonstrations: Demonstrations to fit on; at least 2 for methods that use them.
        config: Configuration of the method, such as ``SEAConfig`` or ``MeanDifferenceConfig``.
        holdout: Part of the demonstrations not to fit on, by ``split_demonstrations``; recorded in the edit.
        checkpoint_dir: Folder for finished batches and epochs, from which a killed run continues. All fits may use the
            same folder.
        keep: Representation and place of the stored activations. Default: the smaller representation, in a file if
            it would take more than half of the free memory.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

    Returns:
        An ``Edit``, or the intervention of a method that does not edit activations.

    Raises:
        DemonstrationError: Fewer than 2 demonstrations are given, or one is longer than the model's context.
        ActivationError: An activation is NaN or infinite, or a layer cannot be fitted.
        SiteError: The model does not have a site or layer.
        SettingError: The type of the configuration belongs to no method, or a package is missing.
        WorkerError: Another worker has exited.

    Example:
        >>> import sealign
        >>> model, tokenizer = sealign.load_model("smollm2")
        >>> demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=8)
        >>> edit = sealign.fit_edit(model, tokenizer, demonstrations, config=SEAConfig(layers="last:2"))
        >>> edit.modules
        ['model.layers.28.mlp', 'model.layers.29.mlp']
    """
    if holdout is not None:
        given = check_demonstrations(demonstrations)
        demonstrations, _ = split_demonstrations(given, holdout=holdout.fraction, seed=holdout.seed)
    method, used = check_fit(config, demonstrations)
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    context = FitContext(model, tokenizer, used, holdout=holdout, checkpoint_dir=folder, keep=keep, track=track)
    _log.info("fitting %s on %d demonstrations", method.name, len(used))
    return method.fit(context, config)


def fit_edit_from_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    activations: Activations,
    demonstrations: Iterable[Demonstration],
    *,
    config: Config = SEAConfig(),
    track: Track = no_progress,
) -> Edit:
    """Fit an edit from activations that were collected before: collect once, fit many.

    Args:
        model: Model from which the activations were collected. It is run only if the configuration edits another site
            than it reads, to measure the change there.
        tokenizer: Tokenizer of the model.
        activations: Activations at the configuration's ``read_site``, of at least the layers that it chooses.
        demonstrations: Demonstrations from which the activations were collected.
        config: Configuration of a method that edits activations.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

    Raises:
        ActivationError: The activations were collected at another site or from another number of demonstrations, or
            lack a layer.
        DemonstrationError: Fewer than 2 demonstrations are given.
        SettingError: The method cannot be fitted from activations, or a package is missing.
        WorkerError: The function is called in a worker group.

    Example:
        >>> import sealign
        >>> model, tokenizer = sealign.load_model("smollm2")
        >>> demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=8)
        >>> found = sealign.collect_activations(model, tokenizer, demonstrations, site="residual", layers=[12])
        >>> config = sealign.MeanDifferenceConfig(layers=[12])
        >>> sealign.fit_edit_from_activations(model, tokenizer, found, demonstrations, config=config).layers
        [12]
    """
    method, used = check_fit(config, demonstrations)
    if method.fit_activations is None:
        raise SettingError(f"{method.name} cannot be fitted from activations; use fit_edit")
    counts = {len(rows) for rows in activations.neutral.values()}
    if counts != {len(used)}:
        raise ActivationError(
            f"there are {len(used)} demonstrations, but the activations were collected from {max(counts, default=0)}; "
            "give the same demonstrations"
        )
    return method.fit_activations(FitContext(model, tokenizer, used, track=track), activations, config)


def check_fit(config: Config, demonstrations: Iterable[Demonstration]) -> tuple[Method, Sequence[Demonstration]]:
    """Return the method of a configuration, and the demonstrations as a tuple, checked before anything slow starts.

    Args:
        config: Configuration of a method.
        demonstrations: Demonstrations to fit on; at least 2 for methods that use them.

    Raises:
        DemonstrationError: The method uses demonstrations, but fewer than 2 are given.
        SettingError: The type of the configuration belongs to no method, or a package is missing.
    """
    method = method_of(config)
    missing = [package for package in method.packages if find_spec(package) is None]
    if missing:
        raise SettingError(
            f"{method.name} needs the package {missing[0]}, which is not installed; run: pip install 'sealign[methods]'"
        )
    used = check_demonstrations(demonstrations)
    if method.needs_demonstrations(config) and len(used) < 2:
        raise DemonstrationError(f"there are {len(used)} demonstrations, but {method.name} needs at least 2")
    return method, used


def load_edit(folder_or_repo_id: str | Path, *, revision: str | None = None) -> Intervention:
    """Load an edit, or the intervention of any other method, from a folder or a repository of the Hub.

    Args:
        folder_or_repo_id: A folder, or ``owner/name``.
        revision: Branch, tag or commit of the repository.

    Raises:
        EditFileError: A file is missing, was changed, has a newer format, or belongs to an unknown method.
    """
    record, tensors = read_edit_files(folder_or_repo_id, revision=revision)
    place = str(folder_or_repo_id)
    if record.method in METHODS:
        return METHODS[record.method].intervention.from_record(record, tensors, place=place)
    if record.site is not None:  # an edit of activations can be loaded even if its method is unknown
        return Edit.from_record(record, tensors, place=place)
    raise EditFileError(f"'{place}': {unknown_name('method', record.method, METHODS)}")
