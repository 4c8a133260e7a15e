"""Run the examples of the docstrings of the installed package, without pytest: ``python -m tests.package.examples``.

Modules that need a package of an extra are skipped where it is not installed, and named.
"""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import sys

import sealign

OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def main() -> str | None:
    """Run all examples, print how many there were, and return what is wrong."""
    skipped, failed, tried = [], [], 0
    for module in pkgutil.walk_packages(sealign.__path__, "sealign."):
        if module.name.endswith("__main__"):
            continue
        try:
            loaded = importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("sealign"):
                raise
            skipped.append(f"{module.name} (needs {error.name})")
            continue
        result = doctest.testmod(loaded, optionflags=OPTIONS)
        tried += result.attempted
        if result.failed:
            failed.append(f"{result.failed} examples of {module.name} failed")
    print(f"{sealign.__file__}: {tried} lines of examples; skipped: {', '.join(skipped) or 'none'}")
    if not tried:
        return "no example was found"
    return "\n".join(failed) or None


if __name__ == "__main__":
    sys.exit(main())
