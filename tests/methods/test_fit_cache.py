from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sealign
from sealign.errors import DemonstrationError
from sealign.methods import fit_cache
from sealign.methods.fit_cache import fit_or_load


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods that are fitted, one for each fit."""
    seen: list[str] = []
    fit = fit_cache.fit_edit  # type: ignore[attr-defined]

    def counting(*args: Any, **kwargs: Any) -> Any:
        seen.append(type(kwargs["config"]).__name__)
        return fit(*args, **kwargs)

    monkeypatch.setattr(fit_cache, "fit_edit", counting)
    return seen


def test_the_same_fit_runs_once(
    llama: Any, tokenizer: Any, demonstrations: list[sealign.Demonstration], tmp_path: Path, fits: list[str]
) -> None:
    config = sealign.MeanDifferenceConfig()

    def fit(used: list[sealign.Demonstration], config: Any) -> str:
        return fit_or_load(llama, tokenizer, used, config=config, folder=tmp_path).hash

    first = fit(demonstrations, config)
    assert first == sealign.fit_edit(llama, tokenizer, demonstrations, config=config).hash
    assert fit(demonstrations, config) == first
    assert fits == ["MeanDifferenceConfig"]
    assert fit(demonstrations, config.replace(strength=2.0)) != first
    assert fit(demonstrations[:4], config) != first
    assert len(fits) == 3
    with pytest.raises(DemonstrationError, match="there are 1 demonstrations"):
        fit(demonstrations[:1], config)


def test_a_method_that_learns_nothing_does_not_depend_on_demonstrations(
    llama: Any, tokenizer: Any, demonstrations: list[sealign.Demonstration], tmp_path: Path, fits: list[str]
) -> None:
    for used in (demonstrations, demonstrations[:2], []):
        fit_or_load(llama, tokenizer, used, config=sealign.DoLaConfig(), folder=tmp_path)
    assert fits == ["DoLaConfig"]


def test_another_model_is_another_fit(
    tiny_model: Any, tokenizer: Any, demonstrations: list[sealign.Demonstration], tmp_path: Path, fits: list[str]
) -> None:
    for name in ("llama", "mistral"):
        fit_or_load(tiny_model(name), tokenizer, demonstrations, config=sealign.MeanDifferenceConfig(), folder=tmp_path)
    assert len(fits) == 2
