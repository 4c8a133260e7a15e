"""The model and the edits of the playgrounds that the tests try without a browser."""

from __future__ import annotations

from typing import Any

import pytest

import sealign
from tests.tiny_models import build_model


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return build_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)


@pytest.fixture(scope="module")
def edits(model: Any, tokenizer: Any) -> dict[str, sealign.Edit]:
    items = sealign.load_demonstrations("bundled:fairness", limit=6)
    sea = sealign.SEAConfig(rank=(3, 2), layers=(1, 3), strength=0.7, batch_size=4)
    mean = sealign.MeanDifferenceConfig(site="residual", layers=(1, 2), strength=0.5)
    return {
        "mild": sealign.fit_edit(model, tokenizer, items, config=sea),
        "shift": sealign.fit_edit(model, tokenizer, items, config=mean),
    }
