"""Pages of the reference of the interface, from the stubs that declare the public names."""

from __future__ import annotations

import ast
from pathlib import Path


def reference_pages(package: Path) -> dict[str, str]:
    """Return the page of each module that has public names, by dotted name.

    A name that two modules have is described on the page of the package, and linked from the page of its folder.

    Args:
        package: Folder of the package.
    """
    pages: dict[str, str] = {}
    described: dict[str, str] = {}
    for stub in (package / "__init__.pyi", *sorted(package.glob("*/__init__.pyi"))):
        module = ".".join(stub.parent.relative_to(package.parent).parts)
        origins = _origins(stub, module)
        linked = [f"[`{described[one]}`][]" for one in origins if one in described]
        own = {one: f"{module}.{name}" for one, name in origins.items() if one not in described}
        described |= own
        blocks = [f"# {module}", f"::: {module}\n    options: {{members: false, show_root_heading: false}}"]
        if linked:
            blocks.append(f"It has these names of the package, too: {', '.join(linked)}.")
        pages[module] = "\n\n".join([*blocks, *(f"::: {name}" for name in own.values())]) + "\n"
    return pages


def _origins(stub: Path, module: str) -> dict[str, str]:
    """Return the names that a stub imports, by the place where each is defined."""
    imports = [node for node in ast.parse(stub.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
    return {f"{module}.{node.module}.{alias.name}": alias.name for node in imports for alias in node.names}
