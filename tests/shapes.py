"""Run-time checks of shape annotations, for every module of the package that writes some.

Only annotations of arrays are checked, so that wrong settings meet the errors of the library itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from beartype import beartype
from jaxtyping import AbstractArray, config, install_import_hook

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "sealign"
_unchecked = False


def annotated_modules() -> list[str]:
    """Return the names of the modules that annotate shapes."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if "from jaxtyping import" in path.read_text(encoding="utf-8"):
            found.append(".".join(("sealign", *path.relative_to(PACKAGE).with_suffix("").parts)))
    return found


def install() -> None:
    """Check shapes in the modules that are imported from now on."""
    # The wrappers of jaxtyping bind arguments by their names, which torch.compile cannot trace.
    disabled = property(lambda _: _unchecked or torch.compiler.is_compiling())
    setattr(type(config), "jaxtyping_disable", disabled)  # noqa: B010  mypy knows a plain attribute
    install_import_hook(annotated_modules(), "tests.shapes.check")


@contextmanager
def unchecked() -> Iterator[None]:
    """Let wrong shapes reach the library, for tests of the errors that it raises itself."""
    global _unchecked
    _unchecked = True
    try:
        yield
    finally:
        _unchecked = False


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the shapes of a function's arguments and results, and no other annotation."""
    annotations = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in annotations.items() if _has_shape(hint)}
    return beartype(function)


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(_has_shape(part) for part in get_args(hint))
