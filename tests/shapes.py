"""The run-time checker of shape annotations: tensors only, so that wrong settings meet the library's own errors."""

from __future__ import annotations

from typing import Any, Literal

from beartype import BeartypeConf, FrozenDict, beartype

_COMBINE = Literal["both", "positive", "negative", "average", "reversed"]
_NORMALIZATION = Literal["token", "feature", "none"]

check = beartype(
    conf=BeartypeConf(
        is_pep484_tower=True,
        hint_overrides=FrozenDict(
            {_COMBINE: Any, _NORMALIZATION: Any, _COMBINE | None: Any, _NORMALIZATION | None: Any}
        ),
    )
)
