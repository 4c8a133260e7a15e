"""An evaluation whose model runs on a server gives the numbers of one in this process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")

import sealign
from sealign.demonstrations.prompts import Prompt
from sealign.errors import ServingError, SettingError
from sealign.evaluation.choices import ChoiceRequest
from sealign.evaluation.comparison import report_edits
from sealign.evaluation.engines import ServedEngine
from sealign.evaluation.evaluate_edits import evaluate
from sealign.evaluation.evaluation_config import EvaluationConfig
from sealign.evaluation.scoring import score_choices
from sealign.evaluation.served_model import ServedModel
from sealign.figures.report import write_report
from sealign.models.pretrained import empty_model
from tests.evaluation.planted import planted_demonstrations
from tests.evaluation.stand_in_server import TOKEN, StandInServer
from tests.evaluation.stand_in_server import URL as ADDRESS
from tests.evaluation_data import HARNESS_WARNINGS, write_truthfulqa

pytestmark = [pytest.mark.slow, *HARNESS_WARNINGS]

URL = f"{ADDRESS}/v1"


@pytest.fixture
def server(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandInServer:
    (tmp_path / "edits").mkdir()
    # A text is cut at the same token as here: the server counts the token that it must generate.
    found = StandInServer(llama, tmp_path / "edits", context=llama.config.max_position_embeddings + 2)
    found.install(monkeypatch)
    return found


@pytest.fixture
def engine(server: StandInServer, llama: Any, tokenizer: Any, tmp_path: Path) -> ServedEngine:  # noqa: ARG001
    skeleton = empty_model(llama.config)
    skeleton.generation_config = llama.generation_config
    return ServedEngine(ServedModel(URL, tmp_path / "edits", at_once=3), skeleton, tokenizer)


def test_scores_are_those_of_one_text_at_a_time(
    server: StandInServer, engine: ServedEngine, llama: Any, small_edit: sealign.Edit, tmp_path: Path
) -> None:
    requests = [
        ChoiceRequest((5, 9, 3), ((7,), (8, 4, 6), (2, 2))),
        ChoiceRequest((4,), ((11, 3), (5,))),
        ChoiceRequest(tuple(range(3, 20)), ((1, 9, 12, 4),)),
    ]
    for edit in (None, small_edit):
        found: dict[int, Any] = {}
        with engine._served.loaded(edit) as name:
            engine._served.score_choices(requests, name, on_scored=found.update)
        if edit is None:
            expected = score_choices(llama, requests)
        else:
            with sealign.apply_edit(llama, edit):
                expected = score_choices(llama, requests)
        for number, scores in enumerate(expected):
            np.testing.assert_allclose(
                [each.log_probability for each in found[number]], [each.log_probability for each in scores], atol=1e-4
            )
            assert [each.greedy for each in found[number]] == [each.greedy for each in scores]
    assert server.edits == {}
    assert list((tmp_path / "edits").iterdir()) == []
    assert server.asked == {"tiny": 6, f"evaluated-{small_edit.hash[:16]}": 6}


def test_a_whole_evaluation_is_the_same(
    engine: ServedEngine,
    server: StandInServer,
    llama: Any,
    tokenizer: Any,
    small_edit: sealign.Edit,
    tmp_path: Path,
) -> None:
    """Tasks, preference, answers and losses, of the base model, the edit and its controls; and so the verdict."""
    write_truthfulqa(tmp_path / "data")
    config = EvaluationConfig(
        tasks=["truthfulqa_mc1", "truthfulqa_mc2"],
        data_dir=tmp_path / "data",
        limit=4,
        demonstrations=planted_demonstrations(5),
        prompts=[Prompt("What is near the town?"), Prompt("Why is the bridge there?")],
        max_new_tokens={"answers": 6},
        neutral_texts=["The library opens at nine.", "Hold the tube under water and look.", "A short text."],
        control_seeds=(0,),
        batch_size=3,
    )
    skeleton, edits = engine.skeleton, {"mild": small_edit}
    local = evaluate(llama, tokenizer, edits, config=config, output=tmp_path / "local")
    served = evaluate(skeleton, tokenizer, edits, config=config, output=tmp_path / "served", engine=engine)
    assert list(served.arms) == list(local.arms)
    assert server.edits == {}
    for name, task in local.tasks.items():
        other = served.tasks[name]
        assert other.questions == task.questions
        assert other.answers == task.answers, name
        assert other.metrics.keys() == task.metrics.keys()
        for metric, values in task.metrics.items():
            for arm in values.arms:
                mine, theirs = values.item_scores(arm), other.metrics[metric].item_scores(arm)
                np.testing.assert_allclose(theirs.numerators, mine.numerators, atol=1e-3, err_msg=f"{name} {metric}")
    for records, found in ((local.damage, served.damage), (local.domain_damage, served.domain_damage)):
        assert records.keys() == found.keys() != set()
        for arm, record in records.items():
            assert found[arm].tokens == record.tokens
            np.testing.assert_allclose(found[arm].damage.base, record.damage.base, atol=1e-4)
            np.testing.assert_allclose(found[arm].damage.edited, record.damage.edited, atol=1e-4)
            assert np.isnan(found[arm].damage.divergence).all()  # which a server does not give
    verdicts = [report_edits(each)[0].verdict for each in (local, served)]
    assert verdicts[0].word == verdicts[1].word
    write_report(served, report_edits(served), tmp_path / "served")
    assert "Gain against the KL divergence" not in (tmp_path / "served" / "report.html").read_text()
    asked = dict(server.asked)
    again = evaluate(skeleton, tokenizer, edits, config=config, output=tmp_path / "served", engine=engine)
    # Everything was in the journal, except the base model's own answers to the demonstrations, as without a server.
    assert server.asked == asked | {"tiny": asked["tiny"] + 5}
    arms = {name: dataclasses.replace(arm, seconds={}) for name, arm in again.arms.items()}
    assert arms == {name: dataclasses.replace(arm, seconds={}) for name, arm in served.arms.items()}


def test_what_a_server_refuses_is_said(
    server: StandInServer, engine: ServedEngine, small_edit: sealign.Edit, tmp_path: Path
) -> None:
    server.edits["other"] = small_edit.reversed()  # takes the only slot
    with (
        pytest.raises(ServingError, match="refused /sealign/edits: all slots are taken; unload an edit"),
        engine._served.loaded(small_edit),
    ):
        pass
    assert list((tmp_path / "edits").iterdir()) == []
    with engine._served.loaded(small_edit.reversed()) as name:
        assert name == "other"  # one that is served already is used, and stays
    assert list(server.edits) == ["other"]
    with pytest.raises(ServingError, match=r"refused /v1/completions: \d+ tokens are too many"):
        list(engine._served.read([[5] * engine._served.context_length], "tiny"))
    with pytest.raises(ServingError, match="the administrator's token"):
        ServedModel(URL, tmp_path / "edits", token="wrong")
    with pytest.raises(ServingError, match="there is no folder"):
        ServedModel(URL, tmp_path / "gone", token=TOKEN)


def test_a_server_takes_edits_of_activations_only(engine: ServedEngine, small_edit: sealign.Edit) -> None:
    engine.check([small_edit, small_edit.reversed()])
    for other in (small_edit.with_normalization("feature"), sealign.Composition([small_edit, small_edit.reversed()])):
        with pytest.raises(SettingError, match="Evaluate without --server"):
            engine.check([other])


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="the server at http://127.0.0.1:9 did not answer"):
        ServedModel(URL, tmp_path)
