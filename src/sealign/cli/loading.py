"""Options that load a model, and parsing of the names of edits on the command line."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from sealign.cli import options
from sealign.cli.consoles import messages

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sealign.edits.intervention import Intervention
    from sealign.models.checkpoint_tensors import CheckpointTensors


@dataclass(frozen=True)
class ModelOptions:
    """Values of the options that load a model.

    Attributes:
        name: ``--model``, or None if it was not given.
        revision, trust_remote_code, attn_implementation, quantization, dtype, device: The options of these names.
    """

    name: str | None
    revision: str | None
    trust_remote_code: bool
    attn_implementation: str | None
    quantization: str | None
    dtype: str
    device: str

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of ``load_model``.

        Raises:
            SettingError: The quantisation is unknown.
        """
        return {
            "dtype": self.dtype,
            "device": self.device,
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
            "attn_implementation": self.attn_implementation,
            "quantization_config": quantization_config(self.quantization),
        }

    def or_base_of(self, edit: Intervention | None) -> ModelOptions:
        """Return the options with the model that an edit was fitted on, at its revision, if ``--model`` was not given.

        Args:
            edit: An edit, or another intervention; None leaves the options as they are.
        """
        if self.name is not None or edit is None:
            return self
        base = edit.base_model
        return dataclasses.replace(self, name=base.id, revision=self.revision or base.revision)

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the model, by default the embedded one, and its tokenizer while a status line says so."""
        from sealign.models import loading
        from sealign.models.embedded_model import EMBEDDED

        with messages.status("Loading the model"):
            return loading.load_model(self.name or EMBEDDED, **self.arguments())

    def open_checkpoint(self) -> tuple[PreTrainedModel, CheckpointTensors] | None:
        """Return the model without weights and the tensors of its checkpoint, or None if it must be loaded."""
        from sealign.models import loading
        from sealign.models.embedded_model import EMBEDDED

        with messages.status("Reading the checkpoint"):
            return loading.open_checkpoint(
                self.name or EMBEDDED, revision=self.revision, trust_remote_code=self.trust_remote_code
            )

    def load_skeleton(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        """Return the model without weights and its tokenizer."""
        from sealign.models import loading
        from sealign.models.embedded_model import EMBEDDED

        chosen = {name: self.arguments()[name] for name in ("dtype", "device", "revision", "trust_remote_code")}
        return loading.load_skeleton(self.name or EMBEDDED, **chosen)


MODEL_OPTIONS: dict[str, tuple[Any, Any]] = {
    "revision": (options.Revision, None),
    "trust_remote_code": (options.TrustRemoteCode, False),
    "attn_implementation": (options.AttnImplementation, None),
    "quantization": (options.Quantization, None),
    "dtype": (options.Dtype, "auto"),
    "device": (options.Device, "auto"),
}
"""Annotation and default of each loading option, which a command lists after its own options."""


def with_model_options(
    model: Any = options.Model, **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that replaces a command's parameter ``model`` by the options of ``ModelOptions``.

    Args:
        model: Annotation of ``--model``: ``options.Model`` or ``options.EditedModel``.
        defaults: Defaults of the other options, by name, where they differ from the defaults of ``load_model``.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            chosen = {name: given.pop(name) for name in MODEL_OPTIONS}
            command(**(given | {"model": ModelOptions(given["model"], **chosen)}))

        signature = inspect.signature(command, eval_str=True)
        parameters = [
            parameter.replace(annotation=model, default=None) if name == "model" else parameter
            for name, parameter in signature.parameters.items()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD  # filled by a command that has more options
        ]
        parameters += [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=defaults.get(name, default)
            )
            for name, (annotation, default) in MODEL_OPTIONS.items()
        ]
        keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        run.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in keyword_only}
        return run

    return decorate


def with_default(option: Any, default: str) -> Any:
    """Return the description of a shared option whose help text names the default of one command.

    Args:
        option: Annotation of ``sealign.cli.options``.
        default: Description of the default.
    """
    info = copy.copy(option.__metadata__[0])
    info.help += rf" \[default: {default}]"
    return info


def quantization_config(name: str | None) -> Any:
    """Return the configuration of transformers for a value of ``--quantization``.

    Args:
        name: ``4bit``, ``8bit`` or None.

    Raises:
        SettingError: The name is unknown.
    """
    from sealign.errors import check_choice

    if name is None:
        return None
    check_choice("quantization", name, ("4bit", "8bit"))
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**{f"load_in_{name}": True})  # type: ignore[no-untyped-call]


def parse_name(text: str) -> tuple[str, str]:
    """Return the name and the source of ``NAME=SOURCE``; without a name, the last part of the path is the name."""
    name, separator, source = text.partition("=")
    if separator and name and "/" not in name:
        return name, source
    return Path(text).resolve().name, text


def parse_names(given: list[str], option: str) -> dict[str, str]:
    """Return sources by name.

    Args:
        given: Values of the option, as ``NAME=SOURCE`` or ``SOURCE``.
        option: Name of the option, for the message.

    Raises:
        SettingError: Two sources have the same name.
    """
    from sealign.errors import SettingError

    found: dict[str, str] = {}
    for text in given:
        name, source = parse_name(text)
        if name in found:
            raise SettingError(
                f"two values of {option} have the name '{name}'; name them, as in {option} other={source}"
            )
        found[name] = source
    return found


def load_named(sources: dict[str, str], strength: float | None) -> dict[str, Intervention]:
    """Load edits by name, all at one strength if it is given."""
    return {name: load_edit(source, strength) for name, source in sources.items()}


def load_edit(source: str, strength: float | None) -> Intervention:
    """Load an edit, or several that are joined by a plus, and say so if the strength is an unusual one.

    Args:
        source: Value of ``--edit``.
        strength: Value of ``--strength``.

    Raises:
        EditFileError, SettingError: As for ``load_edit_source``.
    """
    from sealign.methods import edit_sources

    loaded = edit_sources.load_edit_source(source, strength=strength)
    if strength is not None:
        say_strength(edit_sources.load_edit_source(source), strength)
    return loaded


def say_strength(edit: Intervention, strength: float) -> None:
    """Say so if a strength is allowed but unusual.

    Args:
        edit: An edit, or another intervention, at its own strength.
        strength: Strength at which it will be applied.
    """
    from sealign.methods.edit_sources import strength_remark

    if remark := strength_remark(edit, strength):
        messages.print(f"[yellow]note:[/] {escape(remark)}.", soft_wrap=True)
