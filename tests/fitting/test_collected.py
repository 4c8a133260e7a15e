"""What a fit stores of activations: an interrupted run continues from it and gives the same result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sealign
from sealign.demonstrations.demonstration import Demonstration
from sealign.errors import SettingError
from sealign.fitting.activation_store import Keep, Kept, Place
from sealign.fitting.activations import Activations
from sealign.fitting.collected import Collected, collect
from sealign.fitting.collecting import collect_activations, resolve_read_sites
from sealign.fitting.collector import Collector
from sealign.methods.iti import ITIConfig
from sealign.methods.sea import SEAConfig

LAYERS = [0, 2]


@pytest.fixture
def many(llama: Any) -> list[Demonstration]:
    """So many that their rows are larger than the sums, twice over, in parts of unequal sizes."""
    count = 2 * (4 * llama.config.hidden_size // 3) + 20
    return [
        Demonstration(f"How much is {i} + {i % 7}?", f"It is {i + i % 7}.", f"It is {3 * i + 50}.")
        for i in range(count)
    ]


class Killed(BaseException):
    pass


class Batches:
    """Counts the batches that the model is run on, and kills the one of a number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.finished = 0
        self.killed: int | None = None
        real = Collector._run_batch

        def run(*args: Any) -> Any:
            if self.finished == self.killed:
                raise Killed
            rows = real(*args)
            self.finished += 1
            return rows

        monkeypatch.setattr(Collector, "_run_batch", run)

    def start(self, killed: int | None = None) -> None:
        self.finished, self.killed = 0, killed


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    monkeypatch.setattr("sealign.fitting.collected.CHUNK", 13)
    return Batches(monkeypatch)


def signatures_and_sums(
    llama: Any, tokenizer: Any, many: Any, keep: Keep, folder: Path | None, **settings: Any
) -> dict[int, tuple[float, list[Any]]]:
    config = SEAConfig(token="random", batch_size=8, **settings)
    sites = resolve_read_sites(llama, config.site, LAYERS)
    collector = Collector(llama, tokenizer, {config.site: sites}, [config.token], config.collect_config())
    with collect(collector, many, config, keep, checkpoint_dir=folder) as found:
        assert list(found.layers) == LAYERS
        statistics = {layer: found.statistics(layer) for layer in found.layers}
        return {
            layer: (
                made.signature,
                [made.positive.compute().dense, made.negative.compute().dense, made.mean, made.neutral_sample.clone()],
            )
            for layer, made in statistics.items()
        }


@pytest.mark.parametrize("kept", ["rows", "sums"])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_killed_run_goes_on_and_comes_to_the_same(
    kept: Kept, place: Place, llama: Any, tokenizer: Any, many: Any, batches: Batches, tmp_path: Path
) -> None:
    keep = Keep(kept, place)
    expected = signatures_and_sums(llama, tokenizer, many, keep, None, centered=True)
    whole, done = batches.finished, 0
    for more in (
        1,
        whole // 4,
        whole // 2,
        whole,
    ):  # before the first saved sums, between the two, behind, and the rest
        batches.start(killed=more)
        if more < whole:
            with pytest.raises(Killed):
                signatures_and_sums(llama, tokenizer, many, keep, tmp_path, centered=True)
        else:
            found = signatures_and_sums(llama, tokenizer, many, keep, tmp_path, centered=True)
        done += batches.finished
    assert done == whole
    assert list(tmp_path.iterdir()) == []
    for layer, (signature, tensors) in expected.items():
        assert found[layer][0] == signature
        for own, other in zip(found[layer][1], tensors, strict=True):
            assert own.dtype == other.dtype
            assert torch.equal(own, other)


def test_sums_are_saved_once_the_rows_since_are_as_large(
    llama: Any, tokenizer: Any, many: Any, batches: Batches, tmp_path: Path
) -> None:
    signatures_and_sums(llama, tokenizer, many, Keep("sums"), None)
    whole = batches.finished
    for killed, saved in ((1, False), (whole - 1, True)):
        batches.start(killed)
        with pytest.raises(Killed):
            signatures_and_sums(llama, tokenizer, many, Keep("sums"), tmp_path / str(killed))
        folders = tmp_path / str(killed)
        assert bool(list(folders.rglob("sums.safetensors"))) is saved
        held = list(folders.rglob("activations-*.safetensors"))
        assert 0 < len(held) < whole / 2 + 2


def test_sums_of_other_settings_are_not_read(
    llama: Any, tokenizer: Any, many: Any, batches: Batches, tmp_path: Path
) -> None:
    expected = signatures_and_sums(llama, tokenizer, many, Keep("sums"), None, feature_map="tanh")
    whole = batches.finished
    batches.start(killed=whole - 1)
    with pytest.raises(Killed):
        signatures_and_sums(llama, tokenizer, many, Keep("sums"), tmp_path)
    batches.start()
    found = signatures_and_sums(llama, tokenizer, many, Keep("sums"), tmp_path, feature_map="tanh")
    assert torch.equal(found[2][1][0], expected[2][1][0])


def test_an_edit_of_a_run_that_was_killed(
    llama: Any, tokenizer: Any, many: Any, batches: Batches, tmp_path: Path
) -> None:
    config = SEAConfig(layers="signature:2", rank=(3, 2), batch_size=8)
    settings: dict[str, Any] = {"config": config, "keep": Keep("sums"), "checkpoint_dir": tmp_path}
    expected = sealign.fit_edit(llama, tokenizer, many, config=config, keep=Keep("sums"))
    batches.start(killed=2 * batches.finished // 3)
    with pytest.raises(Killed):
        sealign.fit_edit(llama, tokenizer, many, **settings)
    batches.start()
    found = sealign.fit_edit(llama, tokenizer, many, **settings)
    assert found.layers == expected.layers
    assert found.hash == expected.hash
    assert found.record.layers == expected.record.layers


def test_rows_of_a_layer(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    found = collect_activations(llama, tokenizer, demonstrations, layers=LAYERS)
    rows = Collected(found, ITIConfig())
    assert list(rows.layers) == LAYERS
    for own, role in zip(rows.rows(2), ("neutral", "positive", "negative"), strict=True):
        assert own is getattr(found, role)[2]
    sums = Collected({layer: rows.statistics(layer) for layer in LAYERS}, ITIConfig())
    assert list(sums.layers) == LAYERS
    assert sums.statistics(2).signature == rows.statistics(2).signature
    with pytest.raises(SettingError, match=r"layer 2 is stored as sums, but ITIConfig needs rows; pass keep=Keep"):
        sums.rows(2)


def test_statistics_of_rows_hold_one_layer_at_a_time() -> None:
    """What was computed for one layer is not held by what all layers are read from."""
    matrices = {layer: torch.randn(5, 6) for layer in LAYERS}
    rows = Collected(Activations("mlp", matrices, matrices, matrices), SEAConfig())
    assert rows.statistics(0) is not rows.statistics(0)
