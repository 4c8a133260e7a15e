"""Shared fixtures: shape checks, a small tokenizer, tiny models of every architecture, the embedded model."""

from __future__ import annotations

import functools
import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# No test may reach a model hub; the Hub's client reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Read when tqdm is imported; the command line sets it itself, early enough in a process of its own.
os.environ["TQDM_DISABLE"] = "1"
# One thread for each worker of pytest-xdist, and for the processes that its tests start; read when torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from hypothesis import settings

import tests.shapes

tests.shapes.install()

import torch  # noqa: E402
import typer.testing  # noqa: E402

import sealign  # noqa: E402
from sealign.figures import style  # noqa: E402
from sealign.models.embedded_model import embedded_model  # noqa: E402
from tests.tiny_models import build_model, build_tokenizer, save_stand_in  # noqa: E402

# The runner builds all commands of the application again for each line that it runs.
vars(typer.testing)["_get_command"] = functools.cache(typer.main.get_command)

os.fsync = lambda fd: None

# A deadline would measure what else the machine does.
settings.register_profile("sealign", deadline=None)
settings.load_profile("sealign")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_finish(session: pytest.Session) -> None:
    """Prepare what all tests share: the embedded model is converted in one worker while the others wait."""
    if "PYTEST_XDIST_WORKER" in os.environ and session.items:
        embedded_model()
    # What is imported and collected stays, so the garbage collector need not look at it again.
    gc.collect()
    gc.freeze()


def our_hooks(model: Any) -> int:
    """How many hooks of ours are on a model; transformers leaves some of its own."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return sum("sealign" in (getattr(hook, "__module__", None) or type(hook).__module__) for hook in hooks)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    folder = Path(os.environ.get("SEALIGN_DATA_DIR", SHARED / "data"))
    if not folder.is_dir():
        pytest.skip(f"benchmark data not found at {folder}; set SEALIGN_DATA_DIR")
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer trained on the bundled text, with a chat template."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tokenizer: Any) -> Callable[[str], Any]:
    """A builder of tiny random models; each is built once."""
    built: dict[str, Any] = {}

    def build(name: str) -> Any:
        if name not in built:
            built[name] = build_model(name, vocab_size=len(tokenizer))
        return built[name]

    return build


@pytest.fixture
def llama(tiny_model: Callable[[str], Any]) -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """The embedded model and its tokenizer."""
    return sealign.load_model("smollm2", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model that answers in a fraction of the embedded model's time."""
    folder = tmp_path_factory.mktemp("stand-in")
    save_stand_in(embedded_model(), folder)
    return folder


@pytest.fixture
def embedded_stand_in(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``smollm2`` be the stand-in in this process."""
    monkeypatch.setattr("sealign.models.loading.embedded_model", lambda: stand_in)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright; not for longer than a module, since an event loop runs meanwhile."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium")
    if program is None:
        pytest.skip("Chromium is not installed; run make browser")
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        launched = playwright.chromium.launch(executable_path=program, args=arguments)
        yield launched
        launched.close()


@pytest.fixture
def demonstrations() -> list[sealign.Demonstration]:
    """Seven short demonstrations of unequal lengths."""
    rows = [
        ("What is ice?", "Frozen water.", "Frozen air, which falls from the clouds in winter."),
        ("Who bakes bread in the town by the river?", "The baker does.", "The clock."),
        ("Is fire cold?", "No, fire is hot.", "Yes."),
        ("What do trains run on?", "On rails made of steel.", "On water."),
        ("Where do fish live?", "In water.", "In trees, mostly in the tall ones."),
        ("What does a clock show?", "The time of day.", "The weather."),
        ("How many legs has a horse?", "A horse has four legs.", "It has six."),
    ]
    return [sealign.Demonstration(*row) for row in rows]


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    """A function that sets the umask of this process until the test ends."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _plain_fonts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave TrueType fonts, which take half of the time of a figure, to the tests of the style."""
    if request.path.name != "test_style.py":
        monkeypatch.setitem(style._SETTINGS, "pdf.fonttype", 3)


@pytest.fixture
def small_edit(llama: Any, tokenizer: Any, demonstrations: list[sealign.Demonstration]) -> sealign.Edit:
    """An edit of two layers of the tiny Llama, with unequal ranks."""
    config = sealign.SEAConfig(rank=(3, 2), layers=(1, 3), strength=0.7, batch_size=4)
    return sealign.fit_edit(llama, tokenizer, demonstrations, config=config)
