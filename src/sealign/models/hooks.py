"""Forward hooks that graphs compiled by torch notice."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_counts: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def add_hook(
    module: nn.Module, hook: Callable[..., Any], *, before: bool = False, with_kwargs: bool = False
) -> Callable[[], None]:
    """Register a forward hook on a module, and return the function that removes it.

    By default, torch.compile does not guard on the hooks of a module that has none
    (``torch._dynamo.config.skip_nnmodule_hook_guards``), so that a graph that was compiled without the hook, of this
    model or of another one of its class, would be run without it. Torch does guard on whether a module has a
    ``forward`` of its own. A module therefore has one as long as it has hooks that were added by this function; it
    computes the same as before.

    Args:
        module: Module whose calls are to be hooked.
        hook: Function as for ``torch.nn.Module.register_forward_hook``, or ``register_forward_pre_hook``.
        before: Whether the hook runs before the module.
        with_kwargs: Whether the hook takes the keyword arguments of the call.
    """
    register = module.register_forward_pre_hook if before else module.register_forward_hook
    registered = register(hook, with_kwargs=with_kwargs) if with_kwargs else register(hook)
    if not _counts.get(module):
        own = vars(module).get("forward")
        # The method of the class itself, so that graphs can be shared by modules and by one edit after another.
        module.forward = MethodType(type(module).forward, module) if own is None else _Forward(own)
    _counts[module] = _counts.get(module, 0) + 1

    def remove() -> None:
        registered.remove()
        _counts[module] -= 1
        if _counts[module]:
            return
        current = vars(module).get("forward")
        if isinstance(current, _Forward):
            module.forward = current.__wrapped__
        elif isinstance(current, MethodType) and current.__func__ is type(module).forward:
            del module.forward

    return remove


class _Forward:
    """Calls the ``forward`` that another library gave to a module; a new object, on which compiled graphs guard."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.__wrapped__ = forward  # under the name that inspect.signature follows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)
