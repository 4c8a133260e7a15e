"""Patches of methods of vLLM's classes; each is made once, however often vLLM loads its plug-ins in a process."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any


def after(owner: type, name: str, action: Callable[..., Any]) -> None:
    """Patch a method to call ``action(self, result, *args)`` after it.

    Args:
        owner: Class that defines the method.
        name: Name of the method.
        action: Function to call.
    """

    def around(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = method(self, *args, **kwargs)
            action(self, result, *args)
            return result

        return call

    wrap(owner, name, around)


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


def wrap(owner: type, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method by ``around(method)``; a second call does nothing.

    Args:
        owner: Class that defines the method; a ``KeyError`` is raised if it does not.
        name: Name of the method.
        around: Function that returns the new method.
    """
    method = vars(owner)[name]
    if not hasattr(method, "_sealign"):
        wrapped = wraps(method)(around(method))
        wrapped._sealign = True  # type: ignore[attr-defined]
        setattr(owner, name, wrapped)
