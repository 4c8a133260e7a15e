"""The shape of the package: import order, light imports, small public surface."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import sealign

PACKAGE = Path(sealign.__file__).parent

ORDER = (
    "errors",
    "progress",
    "demonstrations",
    "prompts",
    "collect_config",
    "workers",
    "devices",
    "sites",
    "fingerprint",
    "prefix",
    "generation",
    "feature_maps",
    "storage",
    "checkpoints",
    "recording",
    "sequences",
    "activations",
    "covariance_matrix",
    "covariance",
    "spectra",
    "layer_statistics",
    "record",
    "card",
    "projection",
    "linear_change",
    "layer_edit",
    "edit",
    "fit_config",
    "keep",
    "provenance",
    "collected",
    "fit",
    "apply",
    "models",
    "plan",
    "figures.marks",
    "figures.drawing",
    "export.card",
    "export.linear",
    "baselines.method",
    "baselines.steering",
    "baselines.caa",
    "baselines.leace",
    "baselines.icl",
    "baselines.iti",
    "baselines.contrast",
    "baselines.dola",
    "baselines.lora",
    "baselines.lora_ft",
    "baselines.contrastive",
    "baselines.best_of_n",
    "baselines.stack",
    "baselines.registry",
    "baselines.cost",
    "answers",
    "chat",
    "export.lora",
    "export.gguf",
    "export.merge",
    "export.verify",
    "export.llama_cpp",
    "evaluation.resampling",
    "evaluation.statistics",
    "evaluation.verdict",
    "evaluation.scoring",
    "evaluation.multiple_choice",
    "evaluation.journal",
    "evaluation.damage",
    "evaluation.item_scores",
    "evaluation.samples",
    "evaluation.harness",
    "evaluation.local_tasks",
    "evaluation.judge",
    "evaluation.results",
    "evaluation.rouge",
    "evaluation.run",
    "evaluation.comparison",
    "evaluation.trials",
    "evaluation.plots",
    "evaluation.report",
    "evaluation.search_space",
    "evaluation.tune_config",
    "evaluation.tune",
    "serving.rows",
    "serving.site_bank",
    "serving.bank",
    "serving.settings",
    "serving.client",
    "serving.registry",
    "serving.overlooked",
    "serving.worker",
    "serving.engine",
    "serving.plugin",
    "serving.endpoint",
    "serving.command",
    "reproduce.table",
    "reproduce.cells",
    "reproduce.page",
    "reproduce.workbench",
    "reproduce.tables",
    "reproduce.drawings",
    "reproduce.targets",
    "demo",
    "cli.app",
    "cli.options",
    "cli.display",
    "cli.evaluation_display",
    "cli.planning",
    "cli.fit",
    "cli.inspect",
    "cli.methods",
    "cli.plot",
    "cli.generate",
    "cli.chat",
    "cli.demo",
    "cli.judging",
    "cli.evaluate",
    "cli.reproduce",
    "cli.tune",
    "cli.export",
    "cli.serve",
    "__main__",
)
"""Data order is import order: a module imports only from those before it."""

TENSORS_ONLY = ("covariance", "spectra", "feature_maps", "projection", "edit")
HEAVY = ("transformers", "vllm", "matplotlib", "sklearn", "scipy", "datasets", "peft", "lm_eval")


def _modules() -> dict[str, Path]:
    paths = {path: path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")}
    return {".".join(name.parts): path for path, name in paths.items() if name.name != "__init__"}


def _imports(path: Path, *, at_run_time: bool = False) -> set[str]:
    """Modules that a file imports; optionally only those outside ``if TYPE_CHECKING`` and functions."""
    tree = ast.parse(path.read_text())
    nodes: list[ast.AST] = list(ast.walk(tree))
    if at_run_time:
        nodes = list(tree.body)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_every_module_has_a_place_in_the_order() -> None:
    assert set(_modules()) == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_only_what_comes_before(name: str) -> None:
    own = {imported.removeprefix("sealign.") for imported in _imports(_modules()[name]) if "sealign." in imported}
    later = own & set(ORDER[ORDER.index(name) :])
    assert not later, f"{name} imports {later}"


@pytest.mark.parametrize("name", TENSORS_ONLY)
def test_the_method_knows_tensors_only(name: str) -> None:
    assert not {imported for imported in _imports(_modules()[name]) if imported.split(".")[0] in HEAVY}


def test_no_module_is_called_utils_and_none_unpickles() -> None:
    assert not [name for name in _modules() if "utils" in name]
    for path in _modules().values():
        text = path.read_text()
        assert "pickle" not in text
        assert "torch.load" not in text


@pytest.mark.parametrize("name", ORDER)
def test_files_stay_small(name: str) -> None:
    assert len(_modules()[name].read_text().splitlines()) <= 320


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
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom sealign.cli import app\n"
        "assert CliRunner().invoke(app, ['fit', '--help']).exit_code == 0\nprint('torch' in sys.modules)"
    )
    assert _run(code) == "False"


def test_public_names_exist_and_are_documented() -> None:
    for name in sealign.__all__:
        value = getattr(sealign, name)
        if name != "__version__":
            assert value.__doc__, name
    assert set(sealign.__all__) <= set(dir(sealign))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sealign.nothing  # noqa: B018


def test_public_functions_are_documented() -> None:
    for name in ORDER:
        module = importlib.import_module(f"sealign.{name}")
        for key, value in vars(module).items():
            if callable(value) and not key.startswith("_") and getattr(value, "__module__", "") == module.__name__:
                assert value.__doc__, f"{name}.{key}"
