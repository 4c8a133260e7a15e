"""A search that is interrupted at each of its stages and goes on, and one with a time limit; on a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sealign.errors import EditFileError, SettingError
from sealign.evaluation.scan import measure_sensitivities
from sealign.evaluation.search import Search
from sealign.evaluation.tuning import TuneResult, tune
from sealign.evaluation.tuning_config import TuneConfig
from sealign.models.structure import decoder_layers
from tests.conftest import our_hooks
from tests.evaluation.planted import planted_demonstrations, planted_model
from tests.evaluation_data import HARNESS_WARNINGS
from tests.tiny_models import build_model

pytestmark = HARNESS_WARNINGS

CONFIG = TuneConfig(
    methods=["mean_difference", "difference_operator"], sites=["residual", "mlp"], layers="1,2", finalists=2
)

STAGES = ["Collecting activations", "Computing sensitivities", "Measuring damage", "Measuring finalists", "Scoring"]


class Passes:
    """Counts the forward passes of a model in each stage, and interrupts one of them at its second step."""

    def __init__(self, model: Any, stage: str = "") -> None:
        self.count = 0
        self._stage = stage
        self._hook = decoder_layers(model)[1][0].register_forward_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1

    def track(self, items: Any, what: str, _how_many: int) -> Iterator[Any]:
        for number, item in enumerate(items):
            if self._stage and what.startswith(self._stage) and number == 1:
                raise KeyboardInterrupt
            yield item

    def remove(self) -> None:
        self._hook.remove()


def _tune(model: Any, tokenizer: Any, folder: Path, passes: Passes, **changes: Any) -> TuneResult:
    config = CONFIG.replace(**changes)
    return tune(model, tokenizer, planted_demonstrations(40), config=config, output=folder, track=passes.track)


@pytest.fixture(scope="module")
def planted(tokenizer: Any) -> Any:
    return planted_model(len(tokenizer))


@pytest.fixture(scope="module")
def whole(planted: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[TuneResult, Path, int]:
    folder = tmp_path_factory.mktemp("whole")
    _tune(planted, tokenizer, folder / "before", Passes(planted))  # what is compared once for each model
    passes = Passes(planted)
    result = _tune(planted, tokenizer, folder / "out", passes)
    passes.remove()
    assert not (folder / "out" / "checkpoints").exists()
    return result, folder / "out", passes.count


def test_an_interrupted_search_goes_on_where_it_stopped(
    whole: tuple[TuneResult, Path, int], planted: Any, tokenizer: Any, tmp_path: Path
) -> None:
    expected, folder, needed = whole
    assert expected.edit is not None
    spent = []
    for stage in STAGES:
        passes = Passes(planted, stage)
        with pytest.raises(KeyboardInterrupt):
            _tune(planted, tokenizer, tmp_path, passes)
        passes.remove()
        spent.append(passes.count)
    passes = Passes(planted)
    result = _tune(planted, tokenizer, tmp_path, passes)
    passes.remove()
    assert our_hooks(planted) == 0
    assert result.edit is not None
    assert result.edit.hash == expected.edit.hash
    assert (tmp_path / "scan.csv").read_bytes() == (folder / "scan.csv").read_bytes()
    assert [each.gains for each in result.finalists] == [each.gains for each in expected.finalists]
    assert result.report is not None
    assert expected.report is not None
    assert result.report.verdict == expected.report.verdict
    assert result.report.rows == expected.report.rows
    assert not (tmp_path / "checkpoints").exists()
    # Answers and the fit of the winner are repeated; what takes long is not.
    assert passes.count < 0.7 * needed
    assert all(count < needed for count in spent)


def test_what_was_kept_for_other_settings_is_not_used(
    whole: tuple[TuneResult, Path, int], tokenizer: Any, tmp_path: Path
) -> None:
    expected, _, _ = whole
    other = build_model("llama", vocab_size=len(tokenizer), tie_word_embeddings=True, num_key_value_heads=4)
    planted = planted_model(len(tokenizer))
    for model, changes in ((other, {}), (planted, {"seed": 3}), (planted, {"development": 0.5})):
        passes = Passes(model, "Measuring finalists")
        with pytest.raises(KeyboardInterrupt):
            _tune(model, tokenizer, tmp_path, passes, **changes)
        passes.remove()
    result = _tune(planted, tokenizer, tmp_path, Passes(planted))
    assert result.edit is not None
    assert expected.edit is not None
    assert result.edit.hash == expected.edit.hash
    with pytest.raises(EditFileError):
        _tune(planted, tokenizer, tmp_path, Passes(planted))  # it is finished


def test_a_time_limit_leaves_out_layers_and_says_which(
    planted: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("sealign.evaluation.time_limit.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(Search, "_estimates", lambda _: (10.0, 30.0))
    scanned: list[list[int]] = []

    def slow(model: Any, tokenizer: Any, candidates: Any, *args: Any, **given: Any) -> Any:
        scanned.append(sorted({layer for each in candidates for layer in each.edit.layers}))
        now[0] += 20
        return measure_sensitivities(model, tokenizer, candidates, *args, **given)

    monkeypatch.setattr("sealign.evaluation.scan_rounds.measure_sensitivities", slow)
    result = _tune(planted, tokenizer, tmp_path, Passes(planted), layers="all", max_minutes=80 / 60)
    assert scanned == [[2], [0]]  # 20 s each, and 30 s for the rest; the last round would take 40 s
    assert result.left_out == [1, 3]
    assert {layer for each in result.scanned for layer in each.candidate.edit.layers} == {0, 2}
    assert result.winner is not None


def test_with_time_enough_every_layer_is_scanned(
    whole: tuple[TuneResult, Path, int], planted: Any, tokenizer: Any, tmp_path: Path
) -> None:
    result = _tune(planted, tokenizer, tmp_path, Passes(planted), max_minutes=60)
    expected, _, _ = whole
    assert result.left_out == []

    def figures(found: TuneResult) -> dict[str, float]:
        return {each.candidate.describe(): each.efficiency for each in found.scanned}

    assert figures(result) == pytest.approx(figures(expected), rel=1e-3)


def test_a_limit_that_is_too_short_is_refused_before_the_search(planted: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"max_minutes is 0.0001, but the smallest search takes about .* minutes"):
        _tune(planted, tokenizer, tmp_path, Passes(planted), max_minutes=0.0001)
    assert not (tmp_path / "scan.csv").exists()
    with pytest.raises(SettingError, match="max_minutes"):
        TuneConfig(max_minutes=0)
