"""Patches of methods of vLLM's classes; each is made once, however often vLLM loads its plug-ins in a process."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from sealign.errors import ServingError
from sealign.serving.vllm_version import TESTED, vllm_version


def after(owner: type, name: str, action: Callable[..., Any], *, parameters: Sequence[str] = ()) -> None:
    """Patch a method to call ``action(self, result, *args)`` after it.

    Args:
        owner: Class that defines the method.
        name: Name of the method.
        action: Function to call.
        parameters: As for ``wrap``.
    """

    def around(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = method(self, *args, **kwargs)
            action(self, result, *args)
            return result

        return call

    wrap(owner, name, around, parameters=parameters)


def before(owner: type, name: str, action: Callable[..., Any]) -> None:
    """Patch a method to call ``action(self, *args)`` before it.

    Args:
        owner: Class that defines the method.
        name: Name of the method.
        action: Function to call.
    """

    def around(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            action(self, *args)
            return method(self, *args, **kwargs)

        return call

    wrap(owner, name, around)


def wrap(
    owner: type,
    name: str,
    around: Callable[[Callable[..., Any]], Callable[..., Any]],
    *,
    parameters: Sequence[str] = (),
    keywords: Sequence[str] = (),
) -> None:
    """Replace a method by ``around(method)``; a second call does nothing.

    Args:
        owner: Class that defines the method.
        name: Name of the method.
        around: Function that returns the new method.
        parameters: Names of the positional parameters after ``self`` that the new method reads, in order.
        keywords: Names of further parameters that the new method reads by name.

    Raises:
        ServingError: The class does not define the method, or the method has other parameters.
    """
    method = vars(owner).get(name)
    if method is None:
        raise ServingError(
            f"vLLM {vllm_version()} has no {owner.__name__}.{name}, which the plug-in wraps; install vllm=={TESTED}.*"
        )
    if hasattr(method, "_sealign"):
        return
    _check_signature(owner, name, method, parameters, keywords)
    wrapped = wraps(method)(around(method))
    wrapped._sealign = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _check_signature(
    owner: type, name: str, method: Callable[..., Any], parameters: Sequence[str], keywords: Sequence[str]
) -> None:
    """Raise unless a method begins with the positional parameters, and has the others by name."""
    found = list(inspect.signature(method).parameters.values())[1:]
    positional = [each.name for each in found if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    named = {each.name for each in found if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    if positional[: len(parameters)] != list(parameters) or not named.issuperset(keywords):
        raise ServingError(
            f"{owner.__name__}.{name} of vLLM {vllm_version()} has the parameters "
            f"({', '.join(each.name for each in found)}), but the plug-in reads "
            f"({', '.join([*parameters, *keywords])}); install vllm=={TESTED}.*"
        )
