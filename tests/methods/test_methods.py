"""Every method through its one interface: fit, attach, detach, save, load, and what it computes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sealign
from sealign.demonstrations.demonstration import Demonstration
from sealign.demonstrations.sources import load_demonstrations
from sealign.errors import (
    DemonstrationError,
    EditFileError,
    FingerprintError,
    ModelError,
    SealignError,
    SettingError,
    SiteError,
)
from sealign.evaluation.scoring import ChoiceRequest, score_choices
from sealign.methods.best_of_n import BestOfNConfig
from sealign.methods.composition import Stack
from sealign.methods.contrastive_decoding import CDConfig, ICDConfig
from sealign.methods.dola import DoLaConfig, candidate_layers
from sealign.methods.icl import ICLConfig
from sealign.methods.iti import ITIConfig, head_activations, head_shift, probe_accuracy
from sealign.methods.leace import LEACEConfig
from sealign.methods.lora_training import LoRATrainingConfig
from sealign.methods.mean_difference import CAAConfig
from sealign.methods.method import Method
from sealign.methods.registry import METHODS, apply_change, fit_method, load_change, method_config
from sealign.models.generation import generate_ids
from sealign.models.prompt_format import few_shot_text
from tests.conftest import our_hooks
from tests.tiny_models import build_model, logits

CONFIGS: dict[str, Any] = {
    "icl": ICLConfig(shots=2),
    "lora_ft": LoRATrainingConfig(rank=3, epochs=1, batch_size=3, learning_rate=1e-2),
    "iti": ITIConfig(heads=3, strength=5.0),
    "dola": DoLaConfig(),
    "icd": ICDConfig(training=LoRATrainingConfig(rank=2, epochs=1, batch_size=4, learning_rate=1e-2)),
    "best_of_n": BestOfNConfig(n=3),
    "caa": CAAConfig(layer=1, multiplier=2.0),
    "leace": LEACEConfig(layers="1,3"),
}
"""Of the tiny model of 4 layers with 4 heads each; CD needs an amateur in a folder."""

ACTING = [name for name in CONFIGS if name not in ("icl", "best_of_n")]


@pytest.fixture(scope="module")
def demonstrations() -> list[Demonstration]:
    return load_demonstrations("bundled:truthfulness", limit=7)


@pytest.fixture(scope="module")
def fitted(tokenizer: Any, demonstrations: list[Demonstration]) -> Callable[[str], Method]:
    found: dict[str, Method] = {}

    def fit(name: str) -> Method:
        if name not in found:
            model = build_model("llama", vocab_size=len(tokenizer))
            found[name] = fit_method(name, model, tokenizer, demonstrations, config=CONFIGS[name])
        return found[name]

    return fit


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
def test_acts_while_attached_and_leaves_no_trace(
    name: str, fitted: Callable[[str], Method], llama: Any, tokenizer: Any
) -> None:
    before, kept = logits(llama, tokenizer), state(llama)
    with apply_change(llama, fitted(name)) as handle:
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
def test_fitting_changes_nothing(name: str, llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    before, kept = logits(llama, tokenizer), state(llama)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    method = fit_method(name, llama, tokenizer, demonstrations, config=CONFIGS[name])
    assert torch.equal(torch.rand(1), expected)  # nor the user's random numbers
    assert torch.equal(logits(llama, tokenizer), before)
    assert_same(kept, state(llama))
    assert not llama.training
    assert method.record.fit_seconds >= 0


@pytest.mark.parametrize("name", list(CONFIGS))
def test_saved_and_loaded_is_the_same(
    name: str, fitted: Callable[[str], Method], llama: Any, tokenizer: Any, tmp_path: Path
) -> None:
    method = fitted(name)
    method.save_pretrained(tmp_path / name)
    loaded = load_change(tmp_path / name)
    assert isinstance(loaded, type(method))
    assert loaded.record == method.record
    assert loaded.hash == method.hash
    assert loaded.prefix == method.prefix
    with apply_change(llama, method):
        expected = logits(llama, tokenizer)
    with apply_change(llama, loaded):
        assert torch.equal(logits(llama, tokenizer), expected)
    method.save_pretrained(tmp_path / name)  # over its own


@pytest.mark.parametrize("name", ["caa", "iti", "lora_ft", "icd", "leace"])
def test_two_fits_are_equal(
    name: str, fitted: Callable[[str], Method], tokenizer: Any, demonstrations: list[Demonstration]
) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    again = fit_method(name, model, tokenizer, demonstrations, config=CONFIGS[name])
    assert again.hash == fitted(name).hash


@pytest.mark.parametrize("name", ACTING)
def test_cached_decoding_is_decoding_without_a_cache(
    name: str, fitted: Callable[[str], Method], llama: Any, tokenizer: Any
) -> None:
    prompts = [tokenizer.encode(text) for text in ("The clerk asks for a form.", "Who?")]
    with apply_change(llama, fitted(name)):
        cached = generate_ids(llama, tokenizer, prompts, 6)
        whole = generate_ids(llama, tokenizer, prompts, 6, use_cache=False)
        alone = [generate_ids(llama, tokenizer, [prompt], 6)[0] for prompt in prompts]
    assert torch.equal(cached, whole)
    assert torch.equal(cached, torch.stack(alone))


@pytest.mark.parametrize("name", ACTING)
def test_packed_scores_are_those_of_one_sequence_at_a_time(
    name: str, fitted: Callable[[str], Method], llama: Any, tokenizer: Any
) -> None:
    shared = tokenizer.encode("The clerk at the office asks everybody for a form, and then")
    requests = [
        ChoiceRequest((*shared, 7), ((11, 12), (13,))),
        ChoiceRequest((*shared, 8, 9), ((14, 15, 16), (17, 18))),
    ]
    with apply_change(llama, fitted(name)):
        packed = score_choices(llama, requests)
        for request, scores in zip(requests, packed, strict=True):
            for tokens, score in zip(request.continuations, scores, strict=True):
                ids = torch.tensor([[*request.context, *tokens]])
                with torch.no_grad():
                    logs = torch.log_softmax(llama(input_ids=ids).logits.double(), -1)[0]
                expected = sum(float(logs[len(request.context) - 1 + step, token]) for step, token in enumerate(tokens))
                assert score.log_probability == pytest.approx(expected, rel=1e-4, abs=2e-3)


def stream(model: Any, ids: list[int], layer: int) -> torch.Tensor:
    """The residual stream after a layer, (t, d), as the next layer takes it in."""
    taken: list[torch.Tensor] = []
    hook = model.model.layers[layer + 1].register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
    finally:
        hook.remove()
    return taken[0][0].double()


def residuals(model: Any, tokenizer: Any, items: list[Demonstration], layer: int) -> tuple[Any, Any]:
    """The residual stream after a layer at the last token of positives and negatives, (n, d) each."""
    prompt_format = sealign.PromptFormat()

    def last(prompt: str, completion: str) -> np.ndarray:
        found: np.ndarray = stream(model, prompt_format.encode(tokenizer, prompt, completion), layer)[-1].numpy()
        return found

    return (
        np.stack([last(item.prompt, item.positive) for item in items]),
        np.stack([last(item.prompt, item.negative) for item in items]),
    )


def test_caa_is_the_mean_difference(
    fitted: Callable[[str], Method], llama: Any, tokenizer: Any, demonstrations: list[Demonstration]
) -> None:
    method = fitted("caa")
    positive, negative = residuals(llama, tokenizer, demonstrations, 1)
    expected = (positive - negative).mean(0)
    assert np.allclose(method.tensors["vector"].numpy(), expected, atol=1e-5)
    ids = tokenizer.encode("The clerk asks for a form.")
    before = stream(llama, ids, 1)
    with apply_change(llama, method):
        after = stream(llama, ids, 1)
    assert torch.allclose(after - before, torch.from_numpy(2.0 * expected).expand_as(after), atol=1e-4)


def test_leace_leaves_no_linear_trace(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    """At each layer on what the earlier ones left, also where a later eraser is fitted."""
    method = fit_method("leace", llama, tokenizer, demonstrations, config=LEACEConfig(layers="0,2"))
    for layer in (0, 2):
        with apply_change(llama, method):
            positive, negative = residuals(llama, tokenizer, demonstrations, layer)
        clean = residuals(llama, tokenizer, demonstrations, layer)
        gaps = [np.linalg.norm(first.mean(0) - second.mean(0)) for first, second in (clean, (positive, negative))]
        assert gaps[1] < 0.2 * gaps[0]  # the rest is the shrinkage of so few samples


def test_iti_selects_and_shifts_the_heads_that_know(
    fitted: Callable[[str], Method], llama: Any, tokenizer: Any, demonstrations: list[Demonstration]
) -> None:
    method = fitted("iti")
    positive, negative = head_activations(llama, tokenizer, demonstrations)
    assert positive.shape == (7, 4, 4, 12)
    selected = [(entry["layer"], entry["head"]) for entry in method.settings["selected"]]
    accuracy, _ = probe_accuracy(positive, negative, 0.2, 0)
    worst_in = min(accuracy[layer, head] for layer, head in selected)
    assert worst_in >= np.sort(accuracy.reshape(-1))[-3]
    for layer, head in selected:
        direction = positive[:, layer, head].mean(0) - negative[:, layer, head].mean(0)
        unit = direction / np.linalg.norm(direction)
        along = np.concatenate([positive[:, layer, head], negative[:, layer, head]]) @ unit
        shift = method.tensors[f"layers.{layer}.shift"].reshape(4, 12)[head].double().numpy()
        assert np.allclose(shift, unit * along.std(), atol=1e-6)
    for name, shift in method.tensors.items():
        layer = int(name.split(".")[1])
        others = [head for head in range(4) if (layer, head) not in selected]
        assert not shift.reshape(4, 12)[others].any()


def test_iti_is_a_bias_of_the_output_matrix(fitted: Callable[[str], Method], tokenizer: Any) -> None:
    """The authors bake it in so: an oracle that has no hook."""
    method = fitted("iti")
    model = build_model("llama", vocab_size=len(tokenizer))
    with apply_change(model, method):
        expected = logits(model, tokenizer)
    for name, shift in method.tensors.items():
        matrix = model.model.layers[int(name.split(".")[1])].self_attn.o_proj
        matrix.bias = torch.nn.Parameter(matrix.weight @ (5.0 * shift))
    assert torch.allclose(logits(model, tokenizer), expected, atol=1e-4)


def test_iti_can_take_the_probes_direction(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    config = ITIConfig(heads=2, direction="probe")
    method = fit_method("iti", llama, tokenizer, demonstrations, config=config)
    positive, negative = head_activations(llama, tokenizer, demonstrations)
    _, weights = probe_accuracy(positive, negative, 0.2, 0)
    entry = method.settings["selected"][0]
    layer, head = entry["layer"], entry["head"]
    expected = head_shift(positive[:, layer, head], negative[:, layer, head], weights[layer, head])
    found = method.tensors[f"layers.{layer}.shift"].reshape(4, 12)[head].double().numpy()
    assert np.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("bucket", ["high", "low"])
def test_dola_is_the_papers_formula(bucket: Any, llama: Any, tokenizer: Any) -> None:
    """From the model's own hidden states, one position at a time, in float64."""
    method = fit_method("dola", llama, tokenizer, config=DoLaConfig(bucket=bucket, plausibility=0.05))
    candidates = method.settings["candidates"]
    assert candidates == ([2] if bucket == "high" else [0])
    ids = torch.tensor([tokenizer.encode("The clerk asks for a form, and then.")])
    with torch.no_grad():
        output = llama(input_ids=ids, output_hidden_states=True)
        with apply_change(llama, method):
            found = torch.softmax(llama(input_ids=ids).logits.double(), -1)[0]
        last = torch.log_softmax(output.logits.double(), -1)[0]
        early = torch.log_softmax(llama.lm_head(output.hidden_states[candidates[0]]).double(), -1)[0]
    above = last - last.max(-1, keepdim=True).values - np.log(0.05)
    expected = torch.softmax(torch.where(above >= 0, last - early, -torch.inf), -1)
    clear = (above.abs() > 1e-4).all(-1)  # float32 may take another side where a token is that near the bound
    assert int(clear.sum()) >= len(clear) // 2
    assert torch.allclose(found[clear], expected[clear], atol=1e-4)


def test_dola_takes_the_layer_that_differs_most(tokenizer: Any) -> None:
    from sealign.methods.contrast import jensen_shannon
    from sealign.methods.dola import farthest

    generator = torch.Generator().manual_seed(3)
    final, *others = (3 * torch.randn(2, 5, 9, generator=generator) for _ in range(4))
    found = farthest(final, iter(others))
    divergences = torch.stack([jensen_shannon(final, other) for other in others])
    for row in range(2):
        for position in range(5):
            best = int(divergences[:, row, position].argmax())
            assert torch.equal(found[row, position], others[best][row, position])


def test_candidate_layers_leave_out_a_tied_embedding(tokenizer: Any) -> None:
    untied = build_model("llama", vocab_size=len(tokenizer), num_hidden_layers=9)
    tied = build_model("llama", vocab_size=len(tokenizer), num_hidden_layers=9, tie_word_embeddings=True)
    assert candidate_layers(untied, "low") == [0, 2]
    assert candidate_layers(tied, "low") == [2]
    assert candidate_layers(tied, "high") == [4, 6, 8]


def test_cd_contrasts_with_another_model(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    amateur = build_model("llama", vocab_size=len(tokenizer), num_hidden_layers=2, hidden_size=24)
    amateur.save_pretrained(tmp_path / "amateur")
    tokenizer.save_pretrained(tmp_path / "amateur")
    config = CDConfig(amateur=str(tmp_path / "amateur"), plausibility=0.2)
    method = fit_method("cd", llama, tokenizer, config=config)
    with torch.no_grad():
        ids = torch.tensor([tokenizer.encode("The clerk asks for a form, and then.")])
        p = torch.log_softmax(llama(input_ids=ids).logits.double(), -1)
        q = torch.log_softmax(amateur(input_ids=ids).logits.double(), -1)
        with apply_change(llama, method):
            found = torch.softmax(llama(input_ids=ids).logits.double(), -1)
    plausible = p >= p.max(-1, keepdim=True).values + np.log(0.2)
    expected = torch.softmax(torch.where(plausible, p - q, -torch.inf), -1)
    assert torch.allclose(found, expected, atol=1e-4)
    prompts = [tokenizer.encode(text) for text in ("The clerk asks for a form.", "Who?")]
    with apply_change(llama, method):
        cached = generate_ids(llama, tokenizer, prompts, 6)
        assert torch.equal(cached, generate_ids(llama, tokenizer, prompts, 6, use_cache=False))


def test_cd_refuses_another_tokenizer(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    build_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<eos>")
    other.add_tokens(["<more>"])
    other.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="another tokenizer"):
        fit_method("cd", llama, tokenizer, config=CDConfig(amateur=str(tmp_path)))


def test_icd_by_prompt_sees_the_prompt_before_everything(llama: Any, tokenizer: Any) -> None:
    config = ICDConfig(induce="prompt", prompt="Lie, and lie well. ")
    method = fit_method("icd", llama, tokenizer, config=config)
    before = list(method.settings["prompt_ids"])
    prompts = [tokenizer.encode(text) for text in ("The clerk asks for a form.", "Who?")]
    with torch.no_grad():
        ids = torch.tensor([prompts[0]])
        p = torch.log_softmax(llama(input_ids=ids).logits.double(), -1)
        widened = torch.tensor([[*before, *prompts[0]]])
        q = torch.log_softmax(llama(input_ids=widened).logits.double(), -1)[:, len(before) :]
        with apply_change(llama, method):
            found = torch.softmax(llama(input_ids=ids).logits.double(), -1)
            cached = generate_ids(llama, tokenizer, prompts, 6)
            assert torch.equal(cached, generate_ids(llama, tokenizer, prompts, 6, use_cache=False))
            alone = generate_ids(llama, tokenizer, [prompts[1]], 6)
            assert torch.equal(cached[1:], alone)
    plausible = p >= p.max(-1, keepdim=True).values + np.log(0.1)
    expected = torch.softmax(torch.where(plausible, p - q, -torch.inf), -1)
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_cache_that_the_amateur_has_not_read_is_refused(fitted: Any, llama: Any, tokenizer: Any) -> None:
    ids = torch.tensor([tokenizer.encode("The clerk asks for a form.")])
    with torch.no_grad():
        cache = llama(input_ids=ids, use_cache=True).past_key_values
        with apply_change(llama, fitted("icd")), pytest.raises(ModelError, match="has not read"):
            llama(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)


def test_lora_ft_learns_the_positives(tokenizer: Any) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    items = [Demonstration("Which form?", "The blue one.", "None."), Demonstration("Who asks?", "A clerk.", "Nobody.")]
    config = LoRATrainingConfig(rank=4, epochs=30, batch_size=2, learning_rate=1e-2)
    method = fit_method("lora_ft", model, tokenizer, items, config=config)

    def loss() -> float:
        prompt_format = sealign.PromptFormat()
        context = prompt_format.encode_prompt(tokenizer, "Which form?")
        target = prompt_format.encode(tokenizer, "Which form?", "The blue one.")[len(context) :]
        scored = score_choices(model, [ChoiceRequest(tuple(context), (tuple(target),))])
        return -scored[0][0].log_probability / len(target)

    before = loss()
    with apply_change(model, method):
        assert loss() < 0.5 * before
    assert loss() == before


def test_a_killed_training_goes_on_from_its_epoch(tokenizer: Any, demonstrations: Any, tmp_path: Path) -> None:
    from sealign.methods import lora_training as lora

    model = build_model("llama", vocab_size=len(tokenizer))
    config = LoRATrainingConfig(rank=2, epochs=3, batch_size=3, learning_rate=1e-2)
    pairs = [(item.prompt, item.positive) for item in demonstrations]
    whole = lora.train_lora(model, tokenizer, pairs, config, checkpoint_dir=tmp_path / "whole")
    from transformers import TrainerCallback

    class Killed(Exception):
        pass

    class Kill(TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.epoch >= 2:
                raise Killed

    original = lora._train

    def killed(*args: Any) -> None:
        import transformers

        real = transformers.Trainer.__init__

        def with_kill(self: Any, *a: Any, **k: Any) -> None:
            real(self, *a, **k)
            self.add_callback(Kill())

        transformers.Trainer.__init__ = with_kill
        try:
            original(*args)
        finally:
            transformers.Trainer.__init__ = real

    lora._train = killed
    try:
        with pytest.raises(Killed):
            lora.train_lora(model, tokenizer, pairs, config, checkpoint_dir=tmp_path / "killed")
    finally:
        lora._train = original
    assert list((tmp_path / "killed").glob("checkpoint-*"))
    again = lora.train_lora(model, tokenizer, pairs, config, checkpoint_dir=tmp_path / "killed")
    assert all(torch.allclose(tensor, again[name], atol=1e-6) for name, tensor in whole.items())


def test_icl_writes_answered_questions(fitted: Callable[[str], Method], demonstrations: list[Demonstration]) -> None:
    prefix = fitted("icl").prefix
    assert prefix.count("Q: ") == prefix.count("\nA: ") == 2
    assert prefix.endswith("\n\n")
    assert any(few_shot_text([item]) in prefix for item in demonstrations)
    assert few_shot_text(demonstrations[:1], "Be brief.").startswith("Be brief.\n\nQ: ")


def test_best_of_n_keeps_the_likeliest_sample(fitted: Callable[[str], Method], llama: Any, tokenizer: Any) -> None:
    method = fitted("best_of_n")
    prompts = [tokenizer.encode(text) for text in ("The clerk asks for a form.", "Who?")]
    with apply_change(llama, method):
        chosen = generate_ids(llama, tokenizer, prompts, 5)
        assert torch.equal(chosen, generate_ids(llama, tokenizer, prompts, 5))  # seeded
    samples = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(3):
            reverse = [list(reversed(prompt)) for prompt in prompts]
            from sealign.models.batching import pad_right

            ids, mask = (part.flip(1) for part in pad_right(reverse, 0, torch.device("cpu")))
            found = llama.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=True, temperature=0.7, top_p=0.95,
                top_k=0, pad_token_id=0,
            )  # fmt: skip
            samples.append(found[:, ids.shape[1] :])

    def mean_log(prompt: list[int], answer: list[int]) -> float:
        scored = score_choices(llama, [ChoiceRequest(tuple(prompt), (tuple(answer),))])
        return scored[0][0].log_probability / len(answer)

    for row, prompt in enumerate(prompts):
        values = [mean_log(prompt, sample[row].tolist()) for sample in samples]
        assert chosen[row].tolist() == samples[int(np.argmax(values))][row].tolist()


def test_best_of_n_leaves_scores_alone(fitted: Callable[[str], Method], llama: Any, tokenizer: Any) -> None:
    before = logits(llama, tokenizer)
    with apply_change(llama, fitted("best_of_n")) as handle:
        assert torch.equal(logits(llama, tokenizer), before)
        ids = torch.tensor([tokenizer.encode("Who?")])
        with handle.switched(False):
            greedy = llama.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(greedy, llama.generate(input_ids=ids, max_new_tokens=4, do_sample=False))
    assert "generate" not in vars(llama)


def test_stacked_changes_compose_in_order(fitted: Callable[[str], Method], llama: Any, tokenizer: Any) -> None:
    before = logits(llama, tokenizer)
    stack = Stack([fitted("caa"), fitted("icl"), fitted("best_of_n")])
    assert stack.prefix == fitted("icl").prefix
    assert stack.generates_only
    with apply_change(llama, fitted("caa")):
        expected = logits(llama, tokenizer)
    with apply_change(llama, stack) as handle:
        assert torch.equal(logits(llama, tokenizer), expected)
        with handle.switched(False):
            assert torch.equal(logits(llama, tokenizer), before)
    assert torch.equal(logits(llama, tokenizer), before)
    assert stack.hash != Stack(stack.parts[:2]).hash
    with pytest.raises(SettingError, match="empty"):
        Stack([])


@pytest.mark.parametrize("name", ["caa", "iti", "leace"])
def test_random_controls_have_the_same_lengths(name: str, fitted: Callable[[str], Method]) -> None:
    method = fitted(name)
    control = method.randomized(3)
    assert control is not None
    assert control.hash != method.hash
    again = method.randomized(3)
    assert again is not None
    assert again.hash == control.hash
    if name != "leace":
        for key, tensor in method.tensors.items():
            heads = 1 if name == "caa" else 4
            lengths = [found[key].reshape(heads, -1).norm(dim=1) for found in (control.tensors, method.tensors)]
            torch.testing.assert_close(*lengths)
            assert tensor.shape == control.tensors[key].shape
        other = method.reversed()
        assert other is not None
        assert all(torch.equal(-tensor, other.tensors[key]) for key, tensor in method.tensors.items())


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "qwen3", "opt", "falcon"])
@pytest.mark.parametrize("name", ["caa", "iti", "dola", "leace"])
def test_other_architectures(
    name: str, architecture: str, tiny_model: Any, tokenizer: Any, demonstrations: list[Demonstration]
) -> None:
    model = tiny_model(architecture)
    before = logits(model, tokenizer)
    method = fit_method(name, model, tokenizer, demonstrations, config=CONFIGS[name])
    with apply_change(model, method):
        assert not torch.allclose(logits(model, tokenizer), before)
    assert torch.equal(logits(model, tokenizer), before)


def test_another_model_is_refused(fitted: Callable[[str], Method], tokenizer: Any) -> None:
    other = build_model("llama", vocab_size=len(tokenizer), num_hidden_layers=5)
    with pytest.raises(FingerprintError, match="num_hidden_layers"):
        fitted("caa").attach(other)
    assert our_hooks(other) == 0


def test_a_failure_while_attaching_leaves_nothing(fitted: Callable[[str], Method], tokenizer: Any) -> None:
    other = build_model("llama", vocab_size=len(tokenizer), num_hidden_layers=2)
    with pytest.raises(SiteError, match="layer 3"):
        fitted("leace").attach(other, ignore_mismatch=True)
    assert our_hooks(other) == 0


def test_changed_files_are_refused(fitted: Callable[[str], Method], tmp_path: Path) -> None:
    fitted("caa").save_pretrained(tmp_path)
    file = tmp_path / "method.json"
    record = json.loads(file.read_text())
    for change, complaint in (
        ({"method": "cca"}, "did you mean 'caa'"),
        ({"format_version": 2}, "upgrade"),
        ({"fit_seconds": "long"}, "fit_seconds"),
        ({"tensors_hash": "0" * 64}, "do not match"),
    ):
        file.write_text(json.dumps(record | change))
        with pytest.raises(EditFileError, match=complaint):
            load_change(tmp_path)
    (tmp_path / "method.safetensors").unlink()
    file.write_text(json.dumps(record))
    with pytest.raises(EditFileError, match="no file"):
        load_change(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(EditFileError, match="not ours"):
        fitted("caa").save_pretrained(tmp_path / "other")


def test_settings_as_text() -> None:
    assert method_config("icd", {"training.rank": "3", "induce": "lora"}).training.rank == 3
    assert method_config("iti", {"heads": "5", "direction": "probe"}) == ITIConfig(heads=5, direction="probe")
    for name, given, complaint in (
        ("itti", {}, "did you mean 'iti'"),
        ("iti", {"head": "3"}, "did you mean 'heads'"),
        ("iti", {"heads": "many"}, "must be a number"),
        ("iti", {"heads": "0"}, "at least 1"),
        ("iti", {"validation": "1"}, r"in \(0, 1\)"),
        ("iti", {"direction": "up"}, "mass_mean, probe"),
        ("icd", {"training": "3"}, "training.rank"),
        ("icd", {"training.rnk": "3"}, "cannot be set"),
        ("icd", {"induce": "drugs"}, "lora, prompt"),
        ("icd", {"prompt": " ", "induce": "prompt"}, "is empty"),
        ("cd", {}, "needs an amateur"),
        ("dola", {"bucket": "middle"}, "high, low"),
        ("dola", {"plausibility": "2"}, r"in \[0, 1\]"),
        ("best_of_n", {"temperature": "0"}, "above 0"),
        ("best_of_n", {"top_p": "0"}, r"in \(0, 1\]"),
        ("lora_ft", {"epochs": "0"}, "above 0"),
        ("icl", {"shots": "0"}, "at least 1"),
        ("caa", {"multiplier": "inf"}, "finite"),
        ("leace", {"layers": "signature:3"}, "signature"),
    ):
        with pytest.raises(SettingError, match=complaint):
            method_config(name, given)


def test_too_little_to_learn_from(llama: Any, tokenizer: Any, demonstrations: list[Demonstration]) -> None:
    with pytest.raises(DemonstrationError, match="needs at least 2"):
        fit_method("caa", llama, tokenizer, demonstrations[:1])
    with pytest.raises(DemonstrationError, match="ITI needs at least 3"):
        fit_method("iti", llama, tokenizer, demonstrations[:2])
    with pytest.raises(DemonstrationError, match="shots"):
        fit_method("icl", llama, tokenizer, demonstrations[:3], config=ICLConfig(shots=4))
    with pytest.raises(SiteError, match="the model has 16"):
        fit_method("iti", llama, tokenizer, demonstrations, config=ITIConfig(heads=17))
    long = [dataclasses.replace(demonstrations[0], positive="form " * 400), *demonstrations[1:]]
    for name in ("caa", "iti", "lora_ft"):
        with pytest.raises(SealignError, match="context"):
            fit_method(name, llama, tokenizer, long, config=CONFIGS[name])
        assert our_hooks(llama) == 0


def test_every_method_has_a_name_and_settings() -> None:
    assert all(kind.name == name for name, (kind, _) in METHODS.items())
