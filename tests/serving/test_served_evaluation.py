"""An evaluation whose model runs on vLLM, against the same by the hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import sealign
from sealign.evaluation.choices import ChoiceRequest, ChoiceScore
from sealign.evaluation.damage import measure_damage
from sealign.evaluation.engines import served_engine
from sealign.evaluation.journal import Journal
from sealign.evaluation.scoring import score_choices
from sealign.evaluation.served_model import ServedModel
from sealign.models.passages import text_passages
from tests.edit_server import TOKEN, EditServer
from tests.serving.served_model import ON_SERVER, QUESTIONS

pytestmark = ON_SERVER

ANSWERS = (" It stays in the stomach for seven years.", " Nothing happens.", " Paris")


def test_scores_and_losses_are_those_of_the_hooks(
    server: EditServer, folder: Path, edits: dict[str, sealign.Edit], smollm2: Any
) -> None:
    check(ServedModel(server.url, folder / "edits", token=TOKEN, at_once=8), edits["rescaled"], smollm2)


def check(served: ServedModel, edit: sealign.Edit, smollm2: Any) -> None:
    """Compare the base model, an edit that the server has, and its random control, which is loaded for a while."""
    model, tokenizer = smollm2
    encoded = [tuple(tokenizer.encode(answer)) for answer in ANSWERS]
    requests = [ChoiceRequest(tuple(tokenizer.encode(question)), tuple(encoded)) for question in QUESTIONS[:3]]
    arms = {"base": None, "edit": edit, "random": edit.randomized(0)}
    for arm in arms.values():
        found: dict[int, list[ChoiceScore]] = {}
        with served.loaded(arm) as name:
            served.score_choices(requests, name, on_scored=found.update)
        if arm is None:
            expected = score_choices(model, requests)
        else:
            with sealign.apply_edit(model, arm):
                expected = score_choices(model, requests)
        for number, scores in enumerate(expected):
            ours = [score.log_probability for score in found[number]]
            np.testing.assert_allclose(ours, [score.log_probability for score in scores], atol=1e-3)
            assert [score.greedy for score in found[number]] == [score.greedy for score in scores]
    passages = text_passages(tokenizer, QUESTIONS[1:4])
    engine = served_engine(served, "smollm2")
    (damage,) = engine.damages([edit], passages, Journal(None), lambda items, *_: iter(items))
    by_hooks = measure_damage(model, tokenizer, edit, texts=QUESTIONS[1:4])
    np.testing.assert_allclose(damage.base, by_hooks.base, atol=1e-3)
    np.testing.assert_allclose(damage.edited, by_hooks.edited, atol=1e-3)
    assert abs(by_hooks.edited - by_hooks.base).max() > 0.01
