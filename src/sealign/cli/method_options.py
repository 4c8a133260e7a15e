"""Options of ``sealign fit`` for the settings of one method, generated from the fields of its configuration.

Every field is an option: ``explained_variance`` becomes ``--explained-variance``, and ``training.rank``, a field of a
nested configuration, becomes ``--training-rank``. Help texts come from the ``Attributes`` section of the docstring of
the configuration.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, get_args, get_origin

import typer
from rich.markup import escape

from sealign.cli import option_values, options
from sealign.configuration import Config
from sealign.errors import SettingError, check_choice
from sealign.methods.parse_settings import named_settings, parse_settings, parse_value
from sealign.methods.registry import METHODS, get_method
from sealign.models.prompt_format import PromptFormat, read_preamble

PREFIX = "set_"
"""Prefix of the names of the parameters that set a setting of a method."""

PRESETS: Mapping[str, Mapping[str, Callable[[], Config]]] = {
    "sea": {"paper": METHODS["sea"].config.reference}  # type: ignore[attr-defined]
}
"""Mapping from method and name to the configuration whose values replace the defaults."""


@dataclass(frozen=True)
class MethodOption:
    """An option that sets one setting of a method.

    Attributes:
        setting: Dotted name of the setting, such as ``rank`` or ``training.rank``.
        flag: Name of the option, such as ``--rank``.
        kind: Type that the command line parses: bool, int, float, str, Path or list[str].
        metavar: Placeholder of the value in the help text.
        help: Help text without the default.
        default: Default as text; empty if the help text names it.
        annotation: Type of the field.
    """

    setting: str
    flag: str
    kind: Any
    metavar: str | None
    help: str
    default: str
    annotation: Any

    @property
    def names(self) -> list[str]:
        """All names of the option."""
        return [self.flag, f"--no-{self.flag[2:]}"] if self.kind is bool else [self.flag]

    def parameter(self, panel: str) -> inspect.Parameter:
        """Return the parameter of a command that Typer turns into this option.

        Args:
            panel: Title of the panel of the help text in which the option is listed.
        """
        default = rf" \[default: {escape(self.default)}]" if self.default else ""
        text = escape(self.help) + default
        info = typer.Option("/".join(self.names), metavar=self.metavar, help=text, rich_help_panel=panel)
        name = PREFIX + self.setting.replace(".", "__")
        annotation: Any = Annotated[Optional[self.kind], info]  # noqa: UP045
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=None)


@functools.cache
def method_options(name: str) -> tuple[MethodOption, ...]:
    """Return the options for the settings of a method.

    Args:
        name: Name of the method.

    Raises:
        SettingError: No method has this name.

    Example:
        >>> [option.flag for option in method_options("best_of_n")]
        ['--n', '--temperature', '--top-p']
    """
    return tuple(_field_options(get_method(name).config, ""))


def _field_options(config: type[Config], outer: str) -> list[MethodOption]:
    found = []
    texts = field_texts(config)
    for name, field in config.model_fields.items():
        if name == "seed" or _is_fixed(field.annotation):  # --seed is common to all methods
            continue
        if inspect.isclass(field.annotation) and issubclass(field.annotation, Config):
            found += _field_options(field.annotation, f"{outer}{name}.")
        elif field.annotation is PromptFormat:
            found += _prompt_format_options(texts[name], field.default)
        else:
            found.append(_option(f"{outer}{name}", field.annotation, texts[name], field.default))
    return found


def _option(setting: str, annotation: Any, text: str, default: Any) -> MethodOption:
    kind, metavar = _kind(annotation)
    if setting == "layers":
        metavar = "LAYERS"
    shown = ("no-" if default is False else "") + _flag(setting)[2:] if kind is bool else str(default)
    named = default is None or default == "" or "Default:" in text or len(shown) > 40
    return MethodOption(setting, _flag(setting), kind, metavar, text, "" if named else shown, annotation)


def _prompt_format_options(text: str, default: PromptFormat) -> list[MethodOption]:
    return [
        MethodOption("prompt_format.style", "--prompt-format", str, "NAME", text, default.style, str),
        MethodOption("prompt_format.preamble", "--preamble", Path, "FILE", options.PREAMBLE_HELP, "", Path),
        MethodOption(
            "prompt_format.chat_template_kwargs",
            "--chat-template-arg",
            list[str],
            "NAME=X",
            options.CHAT_TEMPLATE_ARG_HELP,
            "",
            list[str],
        ),
    ]


def _flag(setting: str) -> str:
    return "--" + setting.replace(".", "-").replace("_", "-")


def _is_fixed(annotation: Any) -> bool:
    """Whether a field has only one value."""
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def _kind(annotation: Any) -> tuple[type, str | None]:
    """Return the type that the command line parses for a type of a field, and its metavar."""
    kinds, pair = _scalar_types(annotation)
    if str in kinds:
        return str, "NAME" if Literal in kinds else "TEXT"
    if bool in kinds:
        return bool, None
    number, metavar = (float, "X") if float in kinds else (int, "N")
    return (str, f"{metavar} or {metavar},{metavar}") if pair else (number, metavar)


def _scalar_types(annotation: Any) -> tuple[set[Any], bool]:
    """Return the scalar types in an annotation, and whether it allows a pair."""
    if get_origin(annotation) is Literal:
        return {str, Literal}, False
    found = {kind for kind in (bool, int, float, str) if annotation is kind}
    pair = get_origin(annotation) is tuple
    for part in get_args(annotation):
        inner, inner_pair = _scalar_types(part)
        found |= inner
        pair |= inner_pair
    return found, pair


def field_texts(config: type[Config]) -> dict[str, str]:
    """Return the description of each field from the docstrings of a configuration, as plain text.

    The description in a class replaces the description in its base classes. Names of settings become options.

    Args:
        config: Type of a configuration.
    """
    texts: dict[str, str] = {}
    for kind in config.__mro__:
        section = re.search(r"^Attributes:\n(.+?)(?:\n\n|\Z)", inspect.getdoc(kind) or "", re.DOTALL | re.MULTILINE)
        if kind is Config or section is None:
            continue
        for entry in re.split(r"\n    (?! )", "\n" + section[1])[1:]:
            name, _, text = entry.partition(":")
            field = config.model_fields.get(name)
            settings = set(config.model_fields) - (_choices(field.annotation) if field else set())
            texts.setdefault(name, " ".join(_plain_text(text, settings).split()))
    return texts


def _choices(annotation: Any) -> set[str]:
    """Return the names that a type accepts."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return {choice for part in get_args(annotation) for choice in _choices(part)}


def _plain_text(text: str, settings: set[str]) -> str:
    """Return a text without markup, in which ``rank`` is ``--rank`` and ``token="mean"`` is ``--token mean``."""
    text = re.sub(r'``(\w+)="(\w+)"``', lambda found: f"{_flag(found[1])} {found[2]}", text)
    return re.sub("``(.+?)``", lambda found: _flag(found[1]) if found[1] in settings else found[1], text)


def method_config(
    name: str, given: Mapping[str, Any], *, settings: Mapping[str, str], preset: str | None, seed: int
) -> Config:
    """Return the configuration of a method from values of the command line.

    Args:
        name: Name of the method.
        given: Values of the method's options by dotted name of the setting.
        settings: Values of ``--set`` by dotted name of the setting.
        preset: Name of the configuration to start from; None for the defaults.
        seed: Seed for a method that has random choices.

    Raises:
        SettingError: A value is wrong, or a setting is given twice.
    """
    settings = named_settings(name, settings)
    twice = sorted(given.keys() & settings.keys())
    if twice:
        raise SettingError(f"{twice[0]} is given by {_flag(twice[0])} and by --set; leave one out")
    kinds = {option.setting: option for option in method_options(name)}
    changes = _nested({key: _parsed(kinds[key], value) for key, value in given.items()})
    for key, value in parse_settings(name, _with_seed(name, settings, seed)).items():
        changes[key] = changes.get(key, {}) | value if isinstance(value, dict) else value
    if preset is None:
        return get_method(name).config(**changes)
    check_choice("preset", preset, PRESETS[name])
    start = PRESETS[name][preset]()
    for key, value in changes.items():
        if isinstance(value, dict):
            changes[key] = start.dump()[key] | value
    if changes.get("rank") is not None:  # replaces the explained variance of the preset
        changes.setdefault("explained_variance", None)
    return start.replace(**changes)


def _parsed(option: MethodOption, value: Any) -> Any:
    if option.kind is Path:
        return read_preamble(value)
    if option.kind == list[str]:
        return option_values.template_arguments(value)
    return parse_value(value, option.annotation, option.flag) if isinstance(value, str) else value


def _with_seed(name: str, settings: Mapping[str, str], seed: int) -> dict[str, str]:
    fields = get_method(name).config.model_fields
    seeds = [key for key in ("seed", "training.seed") if key.partition(".")[0] in fields]
    return {key: str(seed) for key in seeds[:1]} | dict(settings)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by name of the field; the values of a nested configuration are a dictionary."""
    found: dict[str, Any] = {}
    for key, value in flat.items():
        outer, _, inner = key.partition(".")
        if inner:
            found.setdefault(outer, {})[inner] = value
        else:
            found[outer] = value
    return found


def refuse_foreign_options(name: str, arguments: Sequence[str], known: Sequence[str]) -> None:
    """Raise an error if the command line has an option of another method.

    Args:
        name: Name of the method.
        arguments: The command line.
        known: Names of the options that the method's command has.

    Raises:
        SettingError: An option belongs to other methods, which are named.
    """
    for argument in arguments:
        flag = argument.partition("=")[0]
        owners = [method for method in METHODS if flag in method_flags(method)]
        if flag not in known and owners:
            raise SettingError(
                f"{flag} is not an option of {name}, but of {', '.join(owners)}; leave it out, or see "
                f"sealign fit --method {name} --help"
            )


def method_flags(name: str) -> set[str]:
    """Return the names of all options for the settings of a method.

    Args:
        name: Name of the method.
    """
    preset = {"--preset"} if name in PRESETS else set()
    return preset | {flag for option in method_options(name) for flag in option.names}


def given_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the method's settings among the values of a command's parameters, by dotted name of the setting."""
    return {
        name.removeprefix(PREFIX).replace("__", "."): value
        for name, value in values.items()
        if name.startswith(PREFIX) and value is not None
    }
