"""The entry point that vLLM calls in each of its processes."""

from __future__ import annotations

import os

from sealign.errors import ServingError
from sealign.serving.settings import PLUGIN
from sealign.serving.vllm_version import TESTED, vllm_version


def register() -> None:
    """Prepare a process of vLLM for edits; the entry point of the group ``vllm.general_plugins``.

    It does nothing unless the variable ``VLLM_PLUGINS`` names it, as ``sealign serve`` sets it, so that other servers
    in the same environment are not changed. A second call does nothing.

    Raises:
        ServingError: This version of vLLM lacks what the plug-in wraps, or it has other parameters. The process ends.
    """
    if PLUGIN not in os.environ.get("VLLM_PLUGINS", "").split(","):
        return
    from sealign.serving.cpu_loras import patch_cpu_loras
    from sealign.serving.front_end import patch_engine
    from sealign.serving.worker import patch_runners, register_operators

    try:
        for prepare in (register_operators, patch_runners, patch_cpu_loras, patch_engine):
            prepare()
    except ImportError as error:
        raise ServingError(
            f"vLLM {vllm_version()} lacks what the plug-in wraps ({error}); install vllm=={TESTED}.*"
        ) from error
