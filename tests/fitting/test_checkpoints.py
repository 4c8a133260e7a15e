"""Finished batches on disk: what they are kept under, and what a killed write leaves."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from sealign.errors import EditFileError
from sealign.fitting.checkpoints import BatchStore
from sealign.models.weights import weights_digest

BATCH = {"3": torch.linspace(-2, 5, 15).reshape(5, 3), "ids": torch.tensor([[7, 2], [9, -1], [-1, -1]])}
INPUTS = ["CollectConfig()", ["model.layers.0.mlp"], [["What is ice?", "Water.", "Air."]]]


def _model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 40), nn.Sequential(nn.LayerNorm(40), nn.Linear(40, 3)))


def _open(folder: object, model: nn.Module, inputs: object) -> BatchStore:
    """Return the store of a run that has ended or was interrupted."""
    with BatchStore.open(folder, model, inputs) as store:  # type: ignore[arg-type]
        return store


class _Killed(BaseException):
    pass


def _kill_a_save(store: BatchStore, stage: str, number: int) -> None:
    """Leave behind what a process leaves that is killed after it has written, and before it has renamed."""

    def kill(*_: object) -> None:
        raise _Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", kill)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # nothing cleans up after a kill
        with pytest.raises(_Killed):
            store.save(stage, number, BATCH)


def test_a_store_of_nothing_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = _open(None, _model(), INPUTS)
    store.save("activations", 0, BATCH)
    assert store.load("activations", 0) is None
    store.clear()
    assert os.listdir(tmp_path) == []


def test_batches_come_back_by_stage_and_number(tmp_path: Path) -> None:
    store = _open(tmp_path / "deep" / "er", _model(), INPUTS)
    saved = {("activations", 0): BATCH, ("generated", 0): {"a": torch.ones(2)}, ("activations", 12): {"b": BATCH["3"]}}
    for (stage, number), tensors in saved.items():
        store.save(stage, number, tensors)
    again = _open(str(tmp_path / "deep" / "er"), _model(), copy.deepcopy(INPUTS))  # as a later run would
    for (stage, number), tensors in saved.items():
        back = again.load(stage, number)
        assert back is not None
        assert set(back) == set(tensors)
        assert all(torch.equal(back[name], tensors[name]) for name in tensors)
        assert all(back[name].dtype == tensors[name].dtype for name in tensors)


def test_a_missing_batch_is_none(tmp_path: Path) -> None:
    store = _open(tmp_path, _model(), INPUTS)
    assert store.load("activations", 0) is None
    assert os.listdir(tmp_path) == []  # nothing is made before there is something to keep
    store.save("activations", 1, BATCH)
    assert [store.load("activations", 0), store.load("activations", 11), store.load("generated", 1)] == [None] * 3


def test_a_batch_can_be_saved_again(tmp_path: Path) -> None:
    store = _open(tmp_path, _model(), INPUTS)
    store.save("activations", 2, BATCH)
    store.save("activations", 2, {"other": torch.zeros(4)})
    assert list(store.load("activations", 2) or {}) == ["other"]


@pytest.mark.parametrize(
    "other",
    [
        ["CollectConfig(seed=1)", *INPUTS[1:]],
        [INPUTS[0], ["model.layers.1.mlp"], INPUTS[2]],
        [*INPUTS[:2], [["What is ice?", "Water", ".Air."]]],
        [*INPUTS[:2], [["What is ice?", "Air.", "Water."]]],
        INPUTS[:2],
    ],
)
def test_other_inputs_have_another_folder(other: list[object], tmp_path: Path) -> None:
    one, two = (_open(tmp_path, _model(), inputs) for inputs in (INPUTS, other))
    assert one.folder != two.folder
    one.save("activations", 0, BATCH)
    assert two.load("activations", 0) is None


@pytest.mark.parametrize("name", [name for name, _ in _model().named_parameters()])
def test_other_weights_have_another_folder(name: str, tmp_path: Path) -> None:
    """The smallest change that a float32 can have, in one number of one parameter."""
    model = _model()
    before = _open(tmp_path, model, INPUTS).folder
    with torch.no_grad():
        flat = model.get_parameter(name).view(-1)
        flat[0] = torch.nextafter(flat[0], torch.tensor(9.0))
    assert _open(tmp_path, model, INPUTS).folder != before


@pytest.mark.parametrize("eighth", range(8))
def test_every_part_of_a_weight_counts(eighth: int) -> None:
    model = _model()
    before = weights_digest(model)
    with torch.no_grad():
        model.get_parameter("0.weight").view(-1).chunk(8)[eighth].add_(1e-3)
    assert weights_digest(model) != before


def test_names_types_and_shapes_are_part_of_the_digest() -> None:
    def holding(name: str, weight: torch.Tensor) -> nn.Module:
        return nn.ParameterDict({name: nn.Parameter(weight)})

    models = [
        holding("a", torch.zeros(2, 6)),
        holding("b", torch.zeros(2, 6)),
        holding("a", torch.zeros(3, 4)),
        holding("a", torch.zeros(2, 6).bfloat16()),
        holding("a", torch.zeros(2, 6, device="meta").double()),  # offloaded: what is known of it counts
        holding("a", torch.zeros(0)),
    ]
    assert len({weights_digest(model) for model in models}) == len(models)


class _Compiled(nn.Module):
    """What ``torch.compile`` wraps around a model, without its import."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


class _Peft(nn.Module):
    """What PEFT wraps around a model, in whose modules its weights are."""

    peft_config: object = None

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def get_base_model(self) -> nn.Module:
        return self.base_model


@pytest.mark.parametrize("wrap", [_Compiled, _Peft, lambda model: _Compiled(_Peft(model))])
def test_the_digest_looks_through_wrappers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = _model()
    wrapped, plain = wrap(model), weights_digest(model)
    assert weights_digest(wrapped) == plain
    with torch.no_grad():
        model.get_parameter("1.1.bias")[0] += 1
    assert weights_digest(wrapped) == weights_digest(model) != plain


def test_a_torn_write_is_never_read(tmp_path: Path) -> None:
    store = _open(tmp_path, _model(), INPUTS)
    assert store.folder is not None
    _kill_a_save(store, "activations", 0)
    (leftover,) = store.folder.iterdir()
    leftover.write_bytes(leftover.read_bytes()[:20])
    assert store.load("activations", 0) is None
    store.save("activations", 0, BATCH)
    assert torch.equal((store.load("activations", 0) or {})["3"], BATCH["3"])


def test_a_damaged_batch_is_refused(tmp_path: Path) -> None:
    store = _open(tmp_path, _model(), INPUTS)
    assert store.folder is not None
    store.save("activations", 0, BATCH)
    (path,) = store.folder.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(EditFileError, match="truncated or corrupted"):
        store.load("activations", 0)


def test_clear_removes_all_of_this_store_and_nothing_else(tmp_path: Path) -> None:
    store, other = (_open(tmp_path, _model(), inputs) for inputs in (INPUTS, "others"))
    store.clear()  # nothing there yet
    for number in range(3):
        store.save("activations", number, BATCH)
    _kill_a_save(store, "generated", 4)
    other.save("activations", 0, BATCH)
    (tmp_path / "notes.txt").write_text("mine")
    assert store.folder is not None
    assert other.folder is not None
    assert len(os.listdir(store.folder)) == 4
    store.clear()
    store.clear()
    assert sorted(os.listdir(tmp_path)) == sorted([other.folder.name, "notes.txt"])
    assert store.load("activations", 1) is None
    assert other.load("activations", 0) is not None


def test_sums_replace_those_before_whole_or_not_at_all(tmp_path: Path) -> None:
    store = _open(tmp_path, _model(), INPUTS)
    assert store.load_sums() is None
    first = {"3.count": torch.tensor(5), "3.products": torch.linspace(-2, 5, 15).reshape(5, 3)}
    store.save_sums(first)
    second = {name: tensor * 1.1 for name, tensor in first.items()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", full)
        store.save_sums(second)
    for expected in (first, second):
        found = store.load_sums()
        assert found is not None
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == torch.float64
            assert torch.equal(found[name], tensor.double())
        store.save_sums(second)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    store.clear()
    assert os.listdir(tmp_path) == []


def test_sums_of_a_store_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = _open(None, _model(), INPUTS)
    store.save_sums({"a": torch.ones(2)})
    assert store.load_sums() is None
    assert os.listdir(tmp_path) == []


def test_runs_at_the_same_time_have_folders_of_their_own(tmp_path: Path) -> None:
    """The first to finish takes nothing from the others, and what an interrupted one leaves is continued."""
    with BatchStore.open(tmp_path, _model(), INPUTS) as first:
        first.save("activations", 0, BATCH)
        with BatchStore.open(tmp_path, _model(), INPUTS) as second:
            assert second.load("activations", 0) is None
            second.save("activations", 0, BATCH)
            second.save("activations", 1, BATCH)
        first.clear()
    with BatchStore.open(tmp_path, _model(), INPUTS) as third:
        assert third.folder == second.folder
        assert third.load("activations", 1) is not None
        third.clear()
    assert os.listdir(tmp_path) == []


def test_only_the_user_may_read(tmp_path: Path, umask: Callable[[int], int]) -> None:
    umask(0)
    store = _open(tmp_path / "cache", _model(), INPUTS)
    store.part(0, 5).save("activations", 0, BATCH)
    store.save_sums(BATCH)
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "cache").rglob("*")}
    assert store.folder is not None
    assert found == {
        store.folder.name: 0o700,
        "inputs-0-5": 0o700,
        "activations-000000.safetensors": 0o600,
        "sums.safetensors": 0o600,
    }
