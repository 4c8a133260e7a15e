"""The options that choose a judge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sealign.cli.app import require_extra

if TYPE_CHECKING:
    from sealign.evaluation.judge import Judge


def load_judge(name: str | None, url: str | None, dtype: str, device: str) -> Judge | None:
    """Return the judge that ``--judge`` and ``--judge-url`` name, or None if they were not given.

    Args:
        name: Value of ``--judge``.
        url: Value of ``--judge-url``.
        dtype: Type of the weights of a judge that is loaded.
        device: Device of a judge that is loaded.

    Raises:
        SettingError: An endpoint is given without the name of its model.
    """
    import os

    from sealign.errors import SettingError

    if url is not None:
        require_extra("judge", "openai")
        from sealign.evaluation.judge import EndpointJudge

        if name is None:
            raise SettingError("--judge-url needs the judge's name at that endpoint; give it with --judge")
        return EndpointJudge(url, name, os.environ.get("OPENAI_API_KEY"))
    if name is None:
        return None
    from sealign.evaluation.judge import LocalJudge
    from sealign.models.loading import load_model

    return LocalJudge(*load_model(name, dtype=dtype, device=device), name=name)
