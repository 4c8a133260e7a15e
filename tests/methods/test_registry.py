"""Every method through its one interface: fit, attach, detach, save and load, whichever it is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sealign
from sealign.configuration import Config
from sealign.demonstrations.demonstration import Demonstration
from sealign.edits.attach import apply_edit, attach
from sealign.edits.edit import Edit
from sealign.edits.intervention import Intervention
from sealign.edits.record import RECORD_NAME, TENSORS_NAME
from sealign.errors import DemonstrationError, EditFileError, FingerprintError, SealignError, SettingError
from sealign.evaluation.choices import ChoiceRequest
from sealign.evaluation.scoring import score_choices
from sealign.fitting.edit_config import EditConfig
from sealign.methods.registry import METHODS, check_fit, fit_edit, get_method, load_edit, method_of
from sealign.models.generation import generate_ids
from tests.conftest import our_hooks
from tests.methods.conftest import ACTING, CONFIGS, EDITS
from tests.tiny_models import build_model, logits

Fitted = Callable[[str], Any]


def state(model: Any) -> tuple[list[str], dict[str, torch.Tensor], list[bool]]:
    modules = [f"{name} {type(module).__name__}" for name, module in model.named_modules()]
    required = [parameter.requires_grad for parameter in model.parameters()]
    return modules, {name: tensor.clone() for name, tensor in model.state_dict().items()}, required


def assert_same(before: Any, after: Any) -> None:
    assert before[0] == after[0]
    assert before[2] == after[2]
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(tensor, after[1][name]) for name, tensor in before[1].items())


@pytest.mark.parametrize("name", ACTING)
def test_acts_while_attached_and_leaves_no_trace(name: str, fitted: Fitted, llama: Any, tokenizer: Any) -> None:
    before, kept = logits(llama, tokenizer), state(llama)
    with apply_edit(llama, fitted(name)) as handle:
        assert not torch.allclose(logits(llama, tokenizer), before)
        with handle.switched(False):
            assert torch.equal(logits(llama, tokenizer), before)
        assert not torch.allclose(logits(llama, tokenizer), before)
    assert torch.equal(logits(llama, tokenizer), before)
    assert_same(kept, state(llama))
    assert our_hooks(llama) == 0
    assert "peft_config" not in vars(llama)
    handle.detach()  # a second time does nothing


@pytest.mark.parametrize("name", list(CONFIGS))
def test_strength_means_the_same_for_all(name: str, fitted: Fitted, llama: Any, tokenizer: Any) -> None:
    """0 is bit for bit no edit; the fitted strength is the default; without a strength, none can be set."""
    edit = fitted(name)
    if edit.strength is None:
        assert name not in EDITS
        with pytest.raises(SettingError, match=f"strength is 0.5, but {edit.method} has no strength"):
            attach(llama, edit, strength=0.5)
        assert our_hooks(llama) == 0
        return
    before = logits(llama, tokenizer)
    with apply_edit(llama, edit, strength=0.0):
        assert torch.equal(logits(llama, tokenizer), before)
    with apply_edit(llama, edit):
        whole = logits(llama, tokenizer)
    with apply_edit(llama, edit.with_strength(0.25)) as handle:
        weak = logits(llama, tokenizer)
        assert 0 < (weak - before).norm() < (whole - before).norm()
        handle.set_strength(0.0)
        assert torch.equal(logits(llama, tokenizer), before)
        handle.set_strength(edit.strength)
        assert torch.equal(logits(llama, tokenizer), whole)
    assert edit.with_strength(0.25).hash != edit.hash


@pytest.mark.parametrize("name", list(CONFIGS))
def test_fitting_changes_nothing(name: str, llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    before, kept = logits(llama, tokenizer), state(llama)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    method = fit_edit(llama, tokenizer, demonstrations, config=CONFIGS[name])
    assert torch.equal(torch.rand(1), expected)  # nor the user's random numbers
    assert torch.equal(logits(llama, tokenizer), before)
    assert_same(kept, state(llama))
    assert not llama.training
    assert our_hooks(llama) == 0
    assert method.record.fit_seconds >= 0


@pytest.mark.parametrize("name", list(CONFIGS))
def test_saved_and_loaded_is_the_same(name: str, fitted: Fitted, llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    edit = fitted(name)
    edit.save_pretrained(tmp_path / name)
    loaded = load_edit(tmp_path / name)
    assert isinstance(loaded, type(edit))
    assert loaded.record == edit.record
    assert loaded.hash == edit.hash
    assert loaded.prefix == edit.prefix
    with apply_edit(llama, edit):
        expected = logits(llama, tokenizer)
    with apply_edit(llama, loaded):
        assert torch.equal(logits(llama, tokenizer), expected)
    edit.save_pretrained(tmp_path / name, overwrite=True)  # over its own


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_record_gives_the_configuration_back(
    name: str, fitted: Fitted, tokenizer: Any, demonstrations: list[Demonstration]
) -> None:
    """Through JSON; and the same configuration gives the same edit again."""
    edit, config = fitted(name), CONFIGS[name]
    settings = json.loads(json.dumps(edit.record.config))
    again = get_method(edit.record.method).config(**settings)
    if isinstance(config, EditConfig):  # recorded as the tokenizer decided it
        config = config.replace(prompt_format=config.prompt_format.resolve(tokenizer))
    assert again == config
    assert type(config)(**json.loads(json.dumps(config.dump()))) == config
    model = build_model("llama", vocab_size=len(tokenizer))
    repeated = fit_edit(model, tokenizer, demonstrations, config=again)
    assert repeated.hash == edit.hash
    assert dataclasses.replace(repeated.record, fit_seconds=0.0) == dataclasses.replace(edit.record, fit_seconds=0.0)


@pytest.mark.parametrize("name", ACTING)
def test_cached_decoding_is_decoding_without_a_cache(name: str, fitted: Fitted, llama: Any, tokenizer: Any) -> None:
    prompts = [tokenizer.encode(text) for text in ("The clerk asks for a form.", "Who?")]
    with apply_edit(llama, fitted(name)):
        cached = generate_ids(llama, tokenizer, prompts, 6)
        whole = generate_ids(llama, tokenizer, prompts, 6, use_cache=False)
        alone = [generate_ids(llama, tokenizer, [prompt], 6)[0] for prompt in prompts]
    assert torch.equal(cached, whole)
    assert torch.equal(cached, torch.stack(alone))


@pytest.mark.parametrize("name", ACTING)
def test_packed_scores_are_those_of_one_sequence_at_a_time(
    name: str, fitted: Fitted, llama: Any, tokenizer: Any
) -> None:
    shared = tokenizer.encode("The clerk at the office asks everybody for a form, and then")
    requests = [
        ChoiceRequest((*shared, 7), ((11, 12), (13,))),
        ChoiceRequest((*shared, 8, 9), ((14, 15, 16), (17, 18))),
    ]
    with apply_edit(llama, fitted(name)):
        packed = score_choices(llama, requests)
        for request, scores in zip(requests, packed, strict=True):
            for tokens, score in zip(request.continuations, scores, strict=True):
                ids = torch.tensor([[*request.context, *tokens]])
                with torch.no_grad():
                    logs = torch.log_softmax(llama(input_ids=ids).logits.double(), -1)[0]
                expected = sum(float(logs[len(request.context) - 1 + step, token]) for step, token in enumerate(tokens))
                assert score.log_probability == pytest.approx(expected, rel=1e-4, abs=2e-3)


@pytest.mark.parametrize("name", ["sea", "mean_difference", "iti", "leace"])
def test_controls_have_the_same_lengths(name: str, fitted: Fitted) -> None:
    """The random control keeps lengths and singular values (of SEA, on each side); the reversal negates the change."""
    edit = fitted(name)
    control = edit.randomized(3)
    assert control.hash != edit.hash
    assert edit.randomized(3).hash == control.hash
    assert edit.reversed().hash != edit.hash
    identity = torch.eye(edit.width, dtype=torch.float64)
    for layer in edit.layers:
        own, other, opposite = (found.affine_edits[layer] for found in (edit, control, edit.reversed()))
        assert len(own.groups) == (2 if name == "sea" else 0)
        sizes = list(own.groups or (own.rank,))
        sides = [zip(e.left.split(sizes, 1), e.right.split(sizes), strict=True) for e in (own, other)]
        for parts in zip(*sides, strict=True):
            values = [torch.linalg.svdvals(left.double() @ right.double()) for left, right in parts]
            torch.testing.assert_close(*values, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(opposite.linear_part(identity), -own.linear_part(identity))
        if own.shift is not None:
            torch.testing.assert_close(other.shift.norm(), own.shift.norm())
            assert torch.equal(opposite.shift, -own.shift)
            assert not torch.allclose(other.shift, own.shift)


@pytest.mark.parametrize("name", ["icl", "dola", "icd", "best_of_n", "lora_ft"])
def test_methods_without_directions_have_no_controls(name: str, fitted: Fitted) -> None:
    assert fitted(name).randomized(3) is None
    assert fitted(name).reversed() is None
    assert fitted(name).modules == []


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "qwen3", "opt", "falcon"])
@pytest.mark.parametrize("name", ["mean_difference", "iti", "dola", "leace"])
def test_other_architectures(
    name: str, architecture: str, tiny_model: Any, tokenizer: Any, demonstrations: list[Demonstration]
) -> None:
    model = tiny_model(architecture)
    before = logits(model, tokenizer)
    edit = fit_edit(model, tokenizer, demonstrations, config=CONFIGS[name])
    with apply_edit(model, edit):
        assert not torch.allclose(logits(model, tokenizer), before)
    assert torch.equal(logits(model, tokenizer), before)


def test_another_model_is_refused(fitted: Fitted, tokenizer: Any) -> None:
    other = build_model("llama", vocab_size=len(tokenizer), num_hidden_layers=5)
    for name in CONFIGS:
        with pytest.raises(FingerprintError, match="num_hidden_layers"):
            attach(other, fitted(name))
    assert our_hooks(other) == 0
    assert "generate" not in vars(other)


def test_a_failure_while_attaching_leaves_nothing(fitted: Fitted, tokenizer: Any) -> None:
    other = build_model("llama", vocab_size=len(tokenizer), num_hidden_layers=2)
    with pytest.raises(FingerprintError, match=r"no module 'model.layers.3'"):
        attach(other, fitted("leace"), ignore_mismatch=True)
    assert our_hooks(other) == 0


def test_changed_files_are_refused(fitted: Fitted, tmp_path: Path) -> None:
    fitted("dola").save_pretrained(tmp_path)
    file = tmp_path / RECORD_NAME
    record = json.loads(file.read_text())
    for change, complaint in (
        ({"method": "dolla"}, "did you mean 'dola'"),
        ({"format_version": 99}, "upgrade"),
        ({"fit_seconds": "long"}, "fit_seconds"),
        ({"tensors_hash": "0" * 64}, "do not match"),
    ):
        file.write_text(json.dumps(record | change))
        with pytest.raises(EditFileError, match=complaint):
            load_edit(tmp_path)
    (tmp_path / TENSORS_NAME).unlink()
    file.write_text(json.dumps(record))
    with pytest.raises(EditFileError, match="no file"):
        load_edit(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(EditFileError, match="choose a new or an empty folder"):
        fitted("dola").save_pretrained(tmp_path / "other")
    with pytest.raises(EditFileError, match=f"has no {RECORD_NAME}"):
        load_edit(tmp_path / "other")


def test_an_edit_of_an_unknown_method_is_an_edit(fitted: Fitted, tmp_path: Path) -> None:
    """What is stored is the affine function, so that an edit of a method made elsewhere can be used."""
    edit = fitted("mean_difference")
    foreign = Edit(edit.layer_edits, dataclasses.replace(edit.record, method="made_elsewhere"))
    foreign.save_pretrained(tmp_path)
    loaded = load_edit(tmp_path)
    assert isinstance(loaded, Edit)
    assert loaded.method == "made_elsewhere"
    assert loaded.hash == foreign.hash


def test_too_little_to_learn_from(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    for config in (sealign.SEAConfig(), sealign.MeanDifferenceConfig(), sealign.LEACEConfig(), sealign.LoRAFTConfig()):
        name = method_of(config).name
        with pytest.raises(DemonstrationError, match=f"there are 1 demonstrations, but {name} needs at least 2"):
            fit_edit(llama, tokenizer, demonstrations[:1], config=config)
    long = [dataclasses.replace(demonstrations[0], positive="form " * 400), *demonstrations[1:]]
    for name in ("sea", "mean_difference", "iti", "leace", "lora_ft"):
        with pytest.raises(SealignError, match="context"):
            fit_edit(llama, tokenizer, long, config=CONFIGS[name])
        assert our_hooks(llama) == 0


def test_the_type_of_the_configuration_chooses_the_method() -> None:
    assert [method_of(method.config(**_needed(method.config))).name for method in METHODS.values()] == list(METHODS)
    assert all(method.name == name for name, method in METHODS.items())
    assert len({method.config for method in METHODS.values()}) == len(METHODS)
    assert all(issubclass(method.intervention, Intervention) for method in METHODS.values())
    with pytest.raises(SettingError, match="config is of type EditConfig, but it must be the configuration of a"):
        method_of(EditConfig())
    with pytest.raises(SettingError, match=r"unknown method 'itti' \(did you mean 'iti'\?\)"):
        get_method("itti")


def _needed(kind: type[Config]) -> dict[str, Any]:
    return {"amateur": "smollm2"} if "amateur" in kind.model_fields else {}


def test_checks_before_a_fit(demonstrations: list[Demonstration], monkeypatch: pytest.MonkeyPatch) -> None:
    method, used = check_fit(sealign.SEAConfig(), iter(demonstrations))
    assert method is METHODS["sea"]
    assert used == tuple(demonstrations)
    assert check_fit(sealign.DoLaConfig(), ())[1] == ()
    assert check_fit(sealign.ICDConfig(induce="prompt"), ())[1] == ()
    with pytest.raises(DemonstrationError, match="there are 0 demonstrations, but icd needs at least 2"):
        check_fit(sealign.ICDConfig(), ())
    monkeypatch.setattr("sealign.methods.registry.find_spec", lambda _: None)
    with pytest.raises(SettingError, match=r"iti needs the package sklearn, .* pip install 'sealign\[methods\]'"):
        check_fit(sealign.ITIConfig(), demonstrations)
