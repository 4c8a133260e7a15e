"""Settings of methods parsed from text, as on a command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel

from sealign.configuration import Config
from sealign.errors import SettingError, unknown_name
from sealign.methods.registry import get_method
from sealign.spellings import by_known_spelling


def parse_settings(name: str, settings: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of a method from texts, as on a command line.

    Args:
        name: Name of the method.
        settings: Mapping from name of the setting to its value as text; ``training.rank`` is a setting of a nested
            configuration.

    Raises:
        SettingError: The method or a setting is unknown, or a text is not a value of its type.

    Example:
        >>> parse_settings("iti", {"heads": "12", "direction": "probe"})
        {'heads': 12, 'direction': 'probe'}
    """
    config = get_method(name).config
    given: dict[str, Any] = {}
    for key, text in named_settings(name, settings).items():
        outer, _, inner = key.partition(".")
        if outer not in config.model_fields:
            raise SettingError(unknown_name(f"setting of {name}", key, config.model_fields))
        if inner:
            given.setdefault(outer, {})[inner] = _nested_value(config, name, outer, inner, text)
        else:
            given[key] = parse_value(text, config.model_fields[key].annotation, f"{name}'s {key}")
    return given


def named_settings(name: str, settings: Mapping[str, str]) -> dict[str, str]:
    """Return settings by the names that a method has, which may be given in British or American spelling.

    Args:
        name, settings: As for ``parse_settings``.

    Raises:
        SettingError: The method is unknown, or a setting is given in both spellings.
    """
    known = []
    for outer, field in get_method(name).config.model_fields.items():
        nested = getattr(field.annotation, "model_fields", None) or getattr(
            field.annotation, "__dataclass_fields__", {}
        )
        known += [outer, *(f"{outer}.{inner}" for inner in nested)]
    return by_known_spelling(settings, known)


def _nested_value(config: type[Config], name: str, outer: str, inner: str, text: str) -> Any:
    nested = config.model_fields[outer].annotation
    if isinstance(nested, type) and issubclass(nested, BaseModel):
        if inner not in nested.model_fields:
            raise SettingError(unknown_name(f"setting of {name}", f"{outer}.{inner}", nested.model_fields))
        return parse_value(text, nested.model_fields[inner].annotation, f"{name}'s {outer}.{inner}")
    annotations = getattr(nested, "__dataclass_fields__", {})
    if inner not in annotations:
        raise SettingError(unknown_name(f"setting of {name}", f"{outer}.{inner}", annotations))
    return text


def parse_value(text: str, annotation: Any, name: str) -> Any:
    """Return the value that a text stands for in a field of some type.

    Two values with a comma between them are a pair; ``true`` and ``false`` are booleans.

    Args:
        text: Text that the user typed.
        annotation: Type of the field.
        name: Name of the setting, for messages.

    Raises:
        SettingError: The text is not a value of the type.

    Example:
        >>> parse_value("0.9,0.99", float | tuple[float, float], "explained_variance")
        (0.9, 0.99)
    """
    if annotation is str or str in get_args(annotation):
        return text
    kinds = _scalar_kinds(annotation)
    parts = [part.strip() for part in text.split(",")]
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if kind in kinds and len(parts) <= 2:
            try:
                values = tuple(kind(part) for part in parts)
            except ValueError:
                continue
            return values[0] if len(values) == 1 else values
    if str in kinds:
        return text
    wanted = "true or false" if bool in kinds else "a number" if float in kinds else "an integer"
    raise SettingError(f"{name} is '{text}', but it must be {wanted}")


def _scalar_kinds(annotation: Any) -> set[Any]:
    """Return the scalar types in an annotation; a ``Literal`` of strings counts as ``str``."""
    found = {kind for kind in (int, float, bool, str) if annotation is kind}
    for part in get_args(annotation):
        found |= {str} if isinstance(part, str) else _scalar_kinds(part)
    return found
