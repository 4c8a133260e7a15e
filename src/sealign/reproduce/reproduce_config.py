"""Settings of a reproduction of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from sealign.configuration import Config
from sealign.demonstrations.bundled import BUNDLED_PREFIX, bundled_behaviours
from sealign.demonstrations.sources import NAMED_SOURCES
from sealign.evaluation.evaluation_config import NamedJudge
from sealign.models.embedded_model import EMBEDDED

TRUTHFULNESS = "halueval_qa"
"""Source of the demonstrations of truthfulness edits."""

FAIRNESS = "bbq"
"""Source of the demonstrations of fairness edits."""

PAPER_COUNTS = {TRUTHFULNESS: 2000, FAIRNESS: 1000}
"""Number of demonstrations of each source in the paper."""

ALL_BEHAVIOURS = (*(BUNDLED_PREFIX + name for name in bundled_behaviours()), *NAMED_SOURCES)
"""Sources of the demonstrations of all behaviours."""

PAIRS = 200
"""Default number of demonstrations of a behaviour; more make the search longer and the intervals narrower."""


class ReproduceConfig(Config):
    """Settings of a reproduction.

    Attributes:
        output: Folder for all targets.
        model: Name or path of the model, as for ``load_model``.
        models: Further models, for the targets that compare models.
        data_dir: Folder with demonstrations and tasks in the schemas of the Hub; None loads them from the Hub.
        limit: Number of items of each task. Must be at least 2, since an interval needs as many; None uses all.
        demonstrations: Mapping from source to the maximum number of demonstrations. Default: the numbers of the paper.
        behaviours: Sources of demonstrations, for the target that compares behaviours. Default: all bundled and named
            ones.
        pairs: Maximum number of demonstrations of each of these behaviours. Must be at least 8.
        amateur: Smaller model with the same tokenizer, for contrastive decoding; None leaves its row empty.
        judge: Judge of Truth and Info; None leaves them empty.
        seed: Seed of draws, fits and resampling.
        dtype, device, revision, trust_remote_code, attn_implementation: As for ``load_model``.

    Raises:
        SettingError: A value is unknown or out of range.
    """

    output: Path
    model: str = EMBEDDED
    models: Sequence[str] = ()
    data_dir: Path | None = None
    limit: Annotated[Annotated[int, Field(ge=2)] | None, Field(examples=[60])] = None
    demonstrations: Mapping[str, int] = PAPER_COUNTS
    behaviours: Sequence[str] = ALL_BEHAVIOURS
    pairs: Annotated[int, Field(ge=8)] = PAIRS
    amateur: str | None = None
    judge: NamedJudge = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None

    @property
    def loading(self) -> dict[str, Any]:
        """Keyword arguments of ``load_model``."""
        names = ("dtype", "device", "revision", "trust_remote_code", "attn_implementation")
        return {name: getattr(self, name) for name in names}
