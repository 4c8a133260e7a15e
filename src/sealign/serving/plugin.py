"""The entry points that vLLM loads: one in every process, one in the front end."""

from __future__ import annotations

import os

from sealign.serving.settings import PLUGIN


def register() -> None:
    """Prepare a process of vLLM for edits; the entry point of ``vllm.general_plugins``.

    It does nothing unless ``VLLM_PLUGINS`` names it, as ``sealign serve`` does, so that other servers of the same
    environment stay as they are. vLLM may call it more than once.
    """
    if PLUGIN not in os.environ.get("VLLM_PLUGINS", "").split(","):
        return
    from sealign.serving.front_end import patch_engine
    from sealign.serving.worker import patch_runners, register_operators

    register_operators()
    patch_runners()
    patch_engine()
