"""The shape of the package: light imports, small files, names that are found, a documented public surface.

The order of imports is a contract in ``pyproject.toml``, checked by ``lint-imports``.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import sealign

PACKAGE = Path(sealign.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
HEAVY = ("transformers", "vllm", "matplotlib", "sklearn", "scipy", "datasets", "peft", "lm_eval")
MAX_LINES = 320


def _imports(path: Path) -> set[str]:
    """Return the modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("spectral.")])
def test_the_numerical_core_imports_tensors_and_errors_only(name: str) -> None:
    outside = {module for module in _imports(MODULES[name]) if module.split(".")[0] not in sys.stdlib_module_names}
    allowed = ("torch", "jaxtyping", "sealign.errors", "sealign.spectral")
    assert not {module for module in outside if not module.startswith(allowed)}


def test_no_module_is_called_utils_and_none_unpickles() -> None:
    assert not [name for name in MODULES if "utils" in name]
    for path in MODULES.values():
        assert not _imports(path) & {"pickle", "dill", "joblib", "cloudpickle"}, path
        assert "torch.load" not in path.read_text(encoding="utf-8"), path


def test_no_two_files_have_one_name() -> None:
    """A command's file is named by the command, which may be the name of what it calls."""
    count = Counter(path.name for name, path in MODULES.items() if not name.startswith("cli."))
    assert not [name for name, files in count.items() if files > 1]


@pytest.mark.parametrize("name", MODULES)
def test_files_stay_small(name: str) -> None:
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def _run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_import_is_light() -> None:
    heavy = ("torch", *HEAVY)
    code = f"import sys, sealign; print([name for name in {heavy} if name in sys.modules])"
    assert _run(code) == "[]"


def test_the_method_does_not_import_transformers() -> None:
    code = f"import sys, sealign; sealign.fit_projection; print([n for n in {HEAVY} if n in sys.modules])"
    assert _run(code) == "[]"


def test_help_does_not_import_torch() -> None:
    """Except that of ``fit``, whose options are made from the configurations of the methods."""
    code = (
        "import sys\nfrom typer.testing import CliRunner\n"
        "from sealign.cli import app\nfrom sealign.cli.app import ORDER\n"
        "for words in [[]] + [[name] for name in ORDER if name != 'fit']:\n"
        "    assert CliRunner().invoke(app, [*words, '--help']).exit_code == 0\nprint('torch' in sys.modules)"
    )
    assert _run(code) == "False"


FOLDERS = ["", *sorted(f".{path.parent.name}" for path in PACKAGE.glob("*/__init__.py"))]


@pytest.mark.parametrize("folder", FOLDERS)
def test_public_names_are_declared_and_documented(folder: str) -> None:
    """The stub that type checkers read declares what the package gives at run time, and all of it has a docstring."""
    package = importlib.import_module(f"sealign{folder}")
    for name in package.__all__:
        value = getattr(package, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, name
    assert set(package.__all__) <= set(dir(package))
    stub = PACKAGE / folder.removeprefix(".") / "__init__.pyi"
    if stub.is_file():
        assert sorted({*_declared_names(stub)} - {"__version__"}) == sorted(package.__all__)
        with pytest.raises(AttributeError, match="nothing"):
            package.nothing  # noqa: B018


def _declared_names(stub: Path) -> list[str]:
    """Return ``__all__`` of a stub."""
    for node in ast.parse(stub.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return list(ast.literal_eval(node.value))
    raise AssertionError(f"{stub} declares no __all__")


def test_public_functions_are_documented() -> None:
    for name in MODULES:
        if name == "__main__":
            continue
        module = importlib.import_module(f"sealign.{name}")
        for key, value in vars(module).items():
            if callable(value) and not key.startswith("_") and getattr(value, "__module__", "") == module.__name__:
                assert value.__doc__, f"{name}.{key}"
