"""Config: the base class of all configurations, keyword-only, frozen and validated.

Field types are strict: an integer is accepted where a number is expected, but a boolean is not an integer, ``2.0`` is
not an integer and ``"3"`` is not a number. Before validation, NumPy scalars and arrays become Python values,
``torch.dtype`` and ``torch.device`` become their names, and lists and ranges become tuples. Declare a field that takes
any sequence as ``Sequence``; its value is always a tuple.
"""

from __future__ import annotations

import dataclasses
import inspect
import reprlib
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from sealign.errors import SealignError, SettingError, unknown_name
from sealign.spellings import by_known_spelling

_TYPES = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "True or False",
    "string_type": "a string",
    "tuple_type": "a sequence",
    "list_type": "a sequence",
    "dict_type": "a mapping",
    "none_required": "None",
    "finite_number": "finite",
}
"""What a value must be, by the type of pydantic's error."""

_BOUNDS = {"greater_than": "above {gt:g}", "greater_than_equal": "at least {ge:g}", "less_than": "below {lt:g}"}
_BOUNDS |= {"less_than_equal": "at most {le:g}"}


class Config(BaseModel):
    """Base class of configurations.

    A setting with a British and an American spelling is found by both.

    A field with a fixed set of names is declared as ``Literal``, a bound as ``Annotated[int, Field(ge=1)]``. Two
    arguments of ``Field`` improve error messages: ``title`` is what the setting is called (its name by default), and
    ``examples`` are the values to suggest. A validator of a subclass may raise any ``SealignError``, which reaches
    the caller unchanged.

    Raises:
        SettingError: a positional argument, an unknown setting, or a value of the wrong type or out of range. The
            message gives the setting, its value, the bound and what to do.

    Example:
        >>> from typing import Literal
        >>> class ExampleConfig(Config):
        ...     token: Literal["first", "last"] = "last"
        ...     batch_size: int = 16
        >>> ExampleConfig(batch_size=4).replace(token="first").dump()
        {'token': 'first', 'batch_size': 4}
        >>> ExampleConfig(token="fist")
        Traceback (most recent call last):
            ...
        sealign.errors.SettingError: unknown token 'fist' (did you mean 'first'?); choose one of: first, last
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )

    if not TYPE_CHECKING:  # type checkers derive the keyword-only signature from the fields

        def __init__(self, *args: Any, **values: Any) -> None:
            if args:
                raise SettingError(_positional_message(type(self), args[0]))
            fields = type(self).model_fields
            values = by_known_spelling(values, fields)
            try:
                super().__init__(
                    **{
                        name: _prepare(fields[name].annotation, value) if name in fields else value
                        for name, value in values.items()
                    }
                )
            except ValidationError as error:
                raise _setting_error(type(self), error) from error

        def __setattr__(self, name: str, value: Any) -> None:
            raise SettingError(
                f"{type(self).__name__} is frozen; make a changed copy with replace({name}={reprlib.repr(value)})"
            )

    def replace(self, **changes: Any) -> Self:
        """Return a validated copy with some settings changed.

        Args:
            **changes: New values by name of the setting.

        Raises:
            SettingError: As for a new configuration.
        """
        return type(self)(**({name: getattr(self, name) for name in self.model_fields_set} | changes))

    def dump(self) -> dict[str, Any]:
        """Return all settings by name as values that JSON can hold; tuples become lists."""
        return self.model_dump(mode="json")


def _prepare(annotation: Any, value: Any) -> Any:
    """Convert a value to the plain Python value that the strict type of its field accepts."""
    value = _to_python(value)
    members = _union_members(annotation)
    if isinstance(value, str) and Path in members and str not in members:
        return Path(value)
    if isinstance(value, Mapping):  # a dumped configuration within a configuration
        for member in members:
            if inspect.isclass(member) and (issubclass(member, BaseModel) or dataclasses.is_dataclass(member)):
                return member(**value)
    return value


def _to_python(value: Any) -> Any:
    kind = type(value)
    # Recognised by name, so that neither NumPy nor torch is imported here.
    if kind.__module__ == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()
    if kind.__module__ == "torch" and kind.__name__ in ("dtype", "device"):
        return str(value).removeprefix("torch.")
    if isinstance(value, list | tuple | range):
        return tuple(_to_python(item) for item in value)
    return value


def _union_members(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type; a type that is no union is its own only alternative."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _union_members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return tuple(member for part in get_args(annotation) for member in _union_members(part))
    return (annotation,)


def _positional_message(kind: type[Config], value: Any) -> str:
    own = [name for name in inspect.get_annotations(kind) if name in kind.model_fields]
    first = next(iter(own or kind.model_fields), "name")
    return f"{kind.__name__} takes keyword arguments only; write {kind.__name__}({first}={reprlib.repr(value)})"


def _setting_error(kind: type[Config], error: ValidationError) -> SealignError:
    """Return the error of Sealign for the first setting that pydantic refuses."""
    problems = error.errors(include_url=False)
    first = problems[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, SealignError):
        return cause
    if not first["loc"]:
        return SettingError(f"{kind.__name__}: {cause or first['msg']}")
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return SettingError(unknown_name(f"{kind.__name__} setting", name, kind.model_fields))
    if first["type"] == "missing":
        return SettingError(f"{kind.__name__} needs the setting '{name}'; write {kind.__name__}({name}=...)")
    if cause is not None:
        return SettingError(f"{name}: {cause}")
    field = kind.model_fields[name]
    return SettingError(_refusal(name, field, [problem for problem in problems if problem["loc"][0] == name]))


def _refusal(name: str, field: FieldInfo, problems: list[Any]) -> str:
    """Return the sentence that refuses the value of one field, which may have failed every member of a union."""
    # A value of the right type that is out of range says more than the types it might have been.
    ranges = [problem for problem in problems if problem["type"] in _BOUNDS or problem["type"] == "finite_number"]
    literals = [problem for problem in problems if problem["type"] == "literal_error"]
    value = (ranges or problems)[0]["input"]
    if literals and not ranges and isinstance(value, str):
        return unknown_name(field.title or name.replace("_", " "), value, _literal_names(field.annotation))
    wanted = " or ".join(dict.fromkeys(_expectation(field, problem) for problem in ranges[:1] or problems))
    examples = " or ".join(map(str, field.examples or ()))
    return f"{name} is {reprlib.repr(value)}, but it must be {wanted}" + (f"; try {examples}" if examples else "")


def _expectation(field: FieldInfo, problem: Any) -> str:
    """Return what a value must be, as in "an integer" or "in (0, 1]"."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind in _BOUNDS:
        return _interval(field) or _BOUNDS[kind].format(**context)
    if kind == "literal_error":
        return f"one of {context['expected']}"
    if kind in ("too_short", "too_long", "missing"):
        return _length(field) or problem["msg"][0].lower() + problem["msg"][1:]
    named = context.get("class") or context.get("class_name")
    if named == "Sequence":
        return "a sequence"
    return f"a {named}" if named else _TYPES.get(kind) or str(problem["msg"]).removeprefix("Input should be ").lower()


def _interval(field: FieldInfo) -> str:
    """Return the interval of a field that has a lower and an upper bound, else an empty string."""
    metadata = [*field.metadata, *_nested_metadata(field.annotation)]
    bounds = {
        name: getattr(item, name)
        for item in metadata
        for name in ("gt", "ge", "lt", "le")
        if getattr(item, name, None) is not None
    }
    low, high = bounds.keys() & {"gt", "ge"}, bounds.keys() & {"lt", "le"}
    if not low or not high:
        return ""
    (below,), (above,) = low, high
    left, right = "(" if below == "gt" else "[", ")" if above == "lt" else "]"
    return f"in {left}{bounds[below]:g}, {bounds[above]:g}{right}"


def _nested_metadata(annotation: Any) -> list[Any]:
    """Return the bounds inside a union or a tuple."""
    own: list[Any] = []
    for item in getattr(annotation, "__metadata__", ()):
        own.extend(item.metadata if isinstance(item, FieldInfo) else [item])
    return own + [item for part in get_args(annotation) for item in _nested_metadata(part)]


def _length(field: FieldInfo) -> str:
    """Return the length of a field that takes a tuple of one length, else an empty string."""
    members = [get_args(member) for member in _union_members(field.annotation) if get_origin(member) is tuple]
    lengths = {len(arguments) for arguments in members if Ellipsis not in arguments}
    return f"a sequence of {lengths.pop()} values" if len(lengths) == 1 else ""


def _literal_names(annotation: Any) -> list[str]:
    return [
        str(name) for member in _union_members(annotation) if get_origin(member) is Literal for name in get_args(member)
    ]
