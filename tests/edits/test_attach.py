"""What an edited model must and must not do, on tiny models of every architecture and on a real one."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import sealign
from sealign.edits.affine_edit import AffineEdit
from sealign.edits.attach import edit_output
from sealign.edits.handle import EditHandle
from sealign.errors import FingerprintError, NormalizationError, SealignWarning, SettingError, SiteError
from sealign.models.sites import SITES
from tests.conftest import our_hooks
from tests.edits.test_gate import gated
from tests.tiny_models import CONFIGS, build_model

IDS = torch.tensor([[7, 31, 12, 55, 90, 23, 41, 8, 77]])


def _fit(model: Any, tokenizer: Any, demonstrations: Any, **settings: Any) -> sealign.Edit:
    given: dict[str, Any] = {"rank": (3, 2), "layers": (1, 3), "strength": 0.7, "batch_size": 4}
    config = sealign.SEAConfig(**(given | settings))
    return sealign.fit_edit(model, tokenizer, demonstrations, config=config)


def _logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("site", SITES)
def test_edited_tokens_depend_on_nothing_but_their_past(
    name: str, site: str, tiny_model: Callable[[str], Any], tokenizer: Any, demonstrations: Any
) -> None:
    model = tiny_model(name)
    base = _logits(model, IDS)
    edit = _fit(model, tokenizer, demonstrations, site=site)
    close: dict[str, Any] = {"rtol": 1e-3, "atol": 2e-4}
    with sealign.apply_edit(model, edit):
        whole = _logits(model, IDS)
        assert float((whole - base).abs().max()) > 1e-3, "the edit did nothing"
        assert our_hooks(model) == 2
        # Later tokens do not matter.
        torch.testing.assert_close(_logits(model, IDS[:, :5]), whole[:, :5], **close)
        # Nor do other rows, or padding on the right.
        other = torch.randint(4, 90, (2, 9))
        torch.testing.assert_close(_logits(model, torch.cat([other, IDS]))[2:], whole, **close)
        padded = torch.cat([IDS, torch.zeros(1, 3, dtype=torch.long)], dim=1)
        mask = torch.cat([torch.ones_like(IDS), torch.zeros(1, 3, dtype=torch.long)], dim=1)
        torch.testing.assert_close(_logits(model, padded, attention_mask=mask)[:, :9], whole, **close)
        # Nor does padding on the left, at the same positions.
        padded, mask = padded.roll(3, 1), mask.roll(3, 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        left = _logits(model, padded, attention_mask=mask, position_ids=positions)[:, 3:]
        torch.testing.assert_close(left, whole, **close)
        # Nor does the key-value cache.
        with torch.no_grad():
            first = model(input_ids=IDS[:, :4], use_cache=True)
            steps = [first.logits]
            for index in range(4, 9):
                step = model(input_ids=IDS[:, index : index + 1], past_key_values=first.past_key_values)
                steps.append(step.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, **close)
    assert torch.equal(_logits(model, IDS), base)
    assert our_hooks(model) == 0


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral", "gemma3"])
@pytest.mark.parametrize("feature_map", ["identity", "tanh"])
def test_the_hook_gives_what_the_projection_gives(
    name: str, feature_map: str, tiny_model: Callable[[str], Any], tokenizer: Any, demonstrations: Any
) -> None:
    """The edited module's output is the projection of its unedited output, computed apart."""
    model = tiny_model(name)
    settings: dict[str, Any] = {"rank": (3, 2), "centered": True, "feature_map": feature_map}
    edit = _fit(model, tokenizer, demonstrations, layers=(2,), **settings)
    found = sealign.collect_activations(model, tokenizer, demonstrations, site="mlp", layers=[2])
    rows = found.neutral[2], found.positive[2], found.negative[2]
    projection = sealign.fit_projection(*rows, **settings)
    seen = {}
    module = model.get_submodule(edit.modules[0])

    def record(key: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            seen[key] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    before = module.register_forward_hook(record("before"))
    with sealign.apply_edit(model, edit):
        after = module.register_forward_hook(record("after"))
        _logits(model, IDS)
    before.remove()
    after.remove()
    torch.testing.assert_close(seen["after"], projection(seen["before"], strength=0.7))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "deepseek_v3"])
def test_greedy_generation_with_and_without_cache_agrees(
    name: str, tiny_model: Callable[[str], Any], tokenizer: Any, demonstrations: Any
) -> None:
    model = tiny_model(name)
    ids = torch.cat([IDS, torch.randint(4, 90, (2, 9))])
    kwargs = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with sealign.apply_edit(model, _fit(model, tokenizer, demonstrations)):
        cached, plain = (model.generate(ids, use_cache=use, **kwargs) for use in (True, False))
        assert torch.equal(cached, plain)


def test_strength_zero_and_an_empty_edit_are_bit_identical(llama: Any, small_edit: sealign.Edit) -> None:
    base = _logits(llama, IDS)
    with sealign.apply_edit(llama, small_edit, strength=0) as handle:
        assert not handle.active
        assert torch.equal(_logits(llama, IDS), base)
        handle.set_strength(0.5)
        assert not torch.equal(_logits(llama, IDS), base)
        handle.set_strength(0)
        assert torch.equal(_logits(llama, IDS), base)
    record = dataclasses.replace(small_edit.record, layers={})
    with sealign.apply_edit(llama, sealign.Edit({}, record)) as handle:
        assert handle.modules == []
        assert torch.equal(_logits(llama, IDS), base)


def test_strength_zero_does_not_run_the_edit(llama: Any, small_edit: sealign.Edit) -> None:
    """Tokens whose edit would be NaN are left as they are."""
    broken = {layer: AffineEdit.constant(torch.full((48,), float("nan"))) for layer in small_edit.layers}
    base = _logits(llama, IDS)
    with sealign.apply_edit(llama, sealign.Edit(broken, small_edit.record), strength=-0.0):
        assert torch.equal(_logits(llama, IDS), base)


def test_an_exception_leaves_nothing_behind(llama: Any, small_edit: sealign.Edit) -> None:
    base = _logits(llama, IDS)
    with pytest.raises(RuntimeError, match="inside"), sealign.apply_edit(llama, small_edit):
        raise RuntimeError("inside")
    assert torch.equal(_logits(llama, IDS), base)
    assert our_hooks(llama) == 0


@pytest.mark.parametrize("normalization", ["token", "feature"])
def test_an_error_while_attaching_leaves_nothing_behind(
    llama: Any, small_edit: sealign.Edit, normalization: Any
) -> None:
    layers = dict(small_edit.record.layers)
    layers["3"] = dataclasses.replace(layers["3"], module="model.layers.3.nothing")
    broken = sealign.Edit(small_edit.layer_edits, dataclasses.replace(small_edit.record, layers=layers))
    message = (
        r"LlamaForCausalLM has no module 'model\.layers\.3\.nothing', which the edit needs; load 'LlamaForCausalLM'"
    )
    with pytest.raises(FingerprintError, match=message):
        sealign.attach(llama, broken.with_normalization(normalization))
    assert our_hooks(llama) == 0


def test_attach_and_detach(llama: Any, small_edit: sealign.Edit) -> None:
    base = _logits(llama, IDS)
    handle = sealign.attach(llama, small_edit)
    assert handle.modules == ["model.layers.1.mlp", "model.layers.3.mlp"]
    edited = _logits(llama, IDS)
    handle.switch(False)
    assert torch.equal(_logits(llama, IDS), base)
    handle.switch(True)
    handle.set_strength(0.1)
    weaker = _logits(llama, IDS)
    assert 0 < float((weaker - base).norm()) < float((edited - base).norm())
    with sealign.apply_edit(llama, small_edit, strength=0.1), handle.switched(False):
        assert torch.equal(_logits(llama, IDS), weaker)
    with handle.switched(False):
        assert torch.equal(_logits(llama, IDS), base)
    assert torch.equal(_logits(llama, IDS), weaker)
    handle.detach()
    handle.detach()
    handle.switch(True)
    assert torch.equal(_logits(llama, IDS), base)
    assert our_hooks(llama) == 0


def test_detaching_in_another_order(llama: Any, small_edit: sealign.Edit) -> None:
    """Each handle removes its own edit, whatever was attached in between."""
    base = _logits(llama, IDS)
    first, second = sealign.attach(llama, small_edit), sealign.attach(llama, small_edit.reversed())
    both = _logits(llama, IDS)
    first.detach()
    with sealign.apply_edit(llama, small_edit, strength=0):
        only_second = _logits(llama, IDS)
    second.detach()
    assert torch.equal(_logits(llama, IDS), base)
    with sealign.apply_edit(llama, small_edit.reversed()):
        assert torch.equal(_logits(llama, IDS), only_second)
    assert not torch.equal(both, only_second)


class Block(torch.nn.Module):
    """A module with some form of output."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: torch.Tensor) -> Any:
        return {"tensor": x, "single": (x,), "tuple": (x, None, x + 1)}[self.form]


@pytest.mark.parametrize("form", ["tensor", "single", "tuple"])
def test_forms_of_outputs(form: str, small_edit: sealign.Edit) -> None:
    """The tensor, or the first member of a tuple, is edited; others stay, and so does the output itself."""
    block, handle = Block(form), EditHandle(small_edit)
    x = torch.randn(2, 3, 48)
    before = x.clone()
    layer_edit = small_edit.layer_edits[1]
    edit_output(block, layer_edit, handle)
    found = block(x)
    expected = layer_edit(x, 0.7)
    if form == "tensor":
        assert torch.equal(found, expected)
    else:
        assert isinstance(found, tuple)
        assert torch.equal(found[0], expected)
        assert len(found) == (3 if form == "tuple" else 1)
    if form == "tuple":
        assert found[1] is None
        assert torch.equal(found[2], x + 1)
    assert torch.equal(x, before)
    handle.switch(False)
    plain = block(x)
    assert (plain if form == "tensor" else plain[0]) is x


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.float16])
def test_modules_with_quantised_weights(dtype: torch.dtype, small_edit: sealign.Edit) -> None:
    """The type of the weights need not be one that activations can have."""
    block, handle = Block("tensor"), EditHandle(small_edit)
    block.weight = torch.nn.Parameter(torch.zeros(3, dtype=dtype), requires_grad=False)
    edit_output(block, small_edit.layer_edits[1], handle)
    x = torch.randn(2, 48).bfloat16()
    assert torch.equal(block(x), small_edit.layer_edits[1](x, 0.7))


def test_edits_compose_in_the_order_they_are_attached(
    llama: Any, tokenizer: Any, demonstrations: Any, small_edit: sealign.Edit
) -> None:
    module = llama.get_submodule("model.layers.3.mlp")
    seen: list[torch.Tensor] = []

    def output_with(*edits: sealign.Edit) -> torch.Tensor:
        with ExitStack() as stack:
            for edit in edits:
                stack.enter_context(sealign.apply_edit(llama, edit))
            hook = module.register_forward_hook(lambda _m, _i, output: seen.append(output.clone()))
            _logits(llama, IDS)
            hook.remove()
        return seen[-1]

    top = small_edit.with_layers([3])
    other = _fit(llama, tokenizer, demonstrations, layers=(3,), rank=(1, 4))
    plain = output_with()
    first, second = (lambda x: top.layer_edits[3](x, 0.7)), (lambda x: other.layer_edits[3](x, 0.7))
    torch.testing.assert_close(output_with(top, top), first(first(plain)))
    torch.testing.assert_close(output_with(top, other), second(first(plain)))
    assert not torch.allclose(output_with(top, other), output_with(other, top))
    # Edits of different layers commute, and are one edit of both.
    low = small_edit.with_layers([1])
    assert torch.equal(output_with(low, top), output_with(top, low))
    assert torch.equal(output_with(low, top), output_with(small_edit))


def test_two_nested_blocks_are_taken_off_one_by_one(llama: Any, small_edit: sealign.Edit) -> None:
    base = _logits(llama, IDS)
    with sealign.apply_edit(llama, small_edit):
        once = _logits(llama, IDS)
        with sealign.apply_edit(llama, small_edit):
            assert not torch.equal(_logits(llama, IDS), once)
        assert torch.equal(_logits(llama, IDS), once)
    assert torch.equal(_logits(llama, IDS), base)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_per_feature_rescaling_is_refused_where_it_is_not_defined(
    name: str, tiny_model: Callable[[str], Any], tokenizer: Any, demonstrations: Any
) -> None:
    model = tiny_model(name)
    edit = _fit(model, tokenizer, demonstrations, normalization="feature")
    with sealign.apply_edit(model, edit) as handle:
        _logits(model, IDS)
        with pytest.raises(NormalizationError, match="not defined for a batch of 2"):
            _logits(model, IDS.expand(2, -1))
        with pytest.raises(NormalizationError, match="cached decoding; pass use_cache=False"):
            model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False)
        out = model.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False, use_cache=False
        )
        assert out.shape == (1, 12)
        # Inputs given in other ways are seen, too.
        embeddings = model.get_input_embeddings()(IDS)
        with torch.no_grad():
            model(inputs_embeds=embeddings)
            model.base_model(IDS)
            for args, kwargs in (((), {"inputs_embeds": embeddings.expand(2, -1, -1)}), ((IDS.expand(2, -1),), {})):
                with pytest.raises(NormalizationError, match="not defined for a batch of 2"):
                    model.base_model(*args, **kwargs)
        handle.switch(False)
        _logits(model, IDS.expand(2, -1))
    assert our_hooks(model) == 0


def test_another_model_is_refused_and_says_what_differs(
    tiny_model: Callable[[str], Any], small_edit: sealign.Edit
) -> None:
    other = tiny_model("qwen2")
    with pytest.raises(FingerprintError, match=r"model_type is 'qwen2' instead of 'llama'.*ignore_mismatch=True"):
        sealign.attach(other, small_edit)
    with sealign.apply_edit(other, small_edit, ignore_mismatch=True) as handle:
        assert handle.modules == small_edit.modules


def test_what_is_no_edit_is_refused(llama: Any) -> None:
    others: list[Any] = ["my-edit", Path("my-edit"), [], None]
    for given in others:
        with pytest.raises(SettingError, match="edit is .*, but it must be an edit; read a folder with load_edit"):
            sealign.attach(llama, given)
    with pytest.raises(SettingError, match="edit is of type LlamaForCausalLM, but it must be an edit"):
        sealign.attach(llama, llama)


def test_strength_must_be_finite(llama: Any, small_edit: sealign.Edit) -> None:
    with pytest.raises(SettingError, match="must be finite"):
        sealign.attach(llama, small_edit, strength=float("nan"))
    with sealign.apply_edit(llama, small_edit, strength=-1) as handle:
        assert handle.strength == -1.0
    assert small_edit.strength == 0.7
    assert our_hooks(llama) == 0


def test_peft_wrapped_models(tokenizer: Any, demonstrations: Any, small_edit: sealign.Edit) -> None:
    from peft import LoraConfig, get_peft_model

    model = build_model("llama", vocab_size=len(tokenizer))
    with sealign.apply_edit(model, small_edit):
        expected = _logits(model, IDS)
    config = LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=True)  # B = 0: the base model
    wrapped = get_peft_model(model, config).eval()
    with sealign.apply_edit(wrapped, small_edit):
        torch.testing.assert_close(_logits(wrapped, IDS), expected)
    fitted = _fit(wrapped, tokenizer, demonstrations)
    assert fitted.modules == small_edit.modules
    torch.testing.assert_close(fitted.affine_edits[1].left, small_edit.affine_edits[1].left)


def test_dispatched_models(tokenizer: Any, demonstrations: Any, small_edit: sealign.Edit, tmp_path: Any) -> None:
    from accelerate import dispatch_model  # type: ignore[import-untyped]

    model = build_model("llama", vocab_size=len(tokenizer))
    with sealign.apply_edit(model, small_edit):
        expected = _logits(model, IDS)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    places |= {"model.layers.3": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    dispatched = dispatch_model(model, places, offload_dir=str(tmp_path), main_device="cpu")
    assert next(dispatched.model.layers[1].parameters()).device.type == "meta"
    with sealign.apply_edit(dispatched, small_edit):
        torch.testing.assert_close(_logits(dispatched, IDS), expected)
    fitted = _fit(dispatched, tokenizer, demonstrations)
    torch.testing.assert_close(fitted.affine_edits[3].left, small_edit.affine_edits[3].left)


def test_models_without_weights(tokenizer: Any, small_edit: sealign.Edit) -> None:
    """A model on the meta device runs with an edit, for its shapes."""
    with torch.device("meta"):
        model = build_model("llama", vocab_size=len(tokenizer))
    with sealign.apply_edit(model, small_edit) as handle:
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                block = model.get_submodule(handle.modules[0])
                assert block(torch.zeros(1, 3, 48, device="meta")).shape == (1, 3, 48)


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("normalization", ["token", "feature"])
def test_copies_of_an_edited_model_are_the_base_model(
    copied: Callable[[Any], Any], normalization: Any, tokenizer: Any, small_edit: sealign.Edit
) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    base = _logits(model, IDS)
    edit = small_edit.with_normalization(normalization)
    with sealign.apply_edit(model, edit):
        expected = _logits(model, IDS)
        with pytest.warns(UserWarning, match="a sea edit is attached to the model, and its copy") as warned:
            twin = copied(model)
        assert len(warned) == 1
        assert torch.equal(_logits(twin, IDS), base)
        with sealign.apply_edit(twin, edit):
            assert torch.equal(_logits(twin, IDS), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not _logits(twin, IDS).any()  # it has weights of its own
        assert torch.equal(_logits(model, IDS), expected)
    assert torch.equal(_logits(model, IDS), base)
    copied(model)  # without a warning


def test_copies_of_an_edit_are_as_good_as_the_edit(llama: Any, small_edit: sealign.Edit) -> None:
    with sealign.apply_edit(llama, small_edit):
        expected = _logits(llama, IDS)
    for same in (copy.deepcopy(small_edit), _pickled(small_edit)):
        with sealign.apply_edit(llama, same):
            assert torch.equal(_logits(llama, IDS), expected)


def test_saving_an_edited_model_says_that_the_edit_is_not_saved(
    tokenizer: Any, small_edit: sealign.Edit, tmp_path: Path
) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    base = _logits(model, IDS)
    with sealign.apply_edit(model, small_edit) as handle:
        with pytest.warns(UserWarning, match="while a sea edit is attached, which is not part of them; save the edit"):
            model.save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="which is not part of them") as warned:
            model.model.state_dict()  # of the decoder alone
        with pytest.warns(UserWarning, match="which is not part of them") as whole:
            model.state_dict()
        assert (len(warned), len(whole)) == (1, 1)
        handle.set_strength(0)
        model.state_dict()  # without a warning, since there is nothing to lose
    model.state_dict()
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), IDS), base)


@pytest.mark.parametrize("layers", [(1, 2), (1,)])
def test_layers_that_share_a_module_are_refused(
    layers: tuple[int, ...], tokenizer: Any, demonstrations: Any, small_edit: sealign.Edit
) -> None:
    """An edit of one would edit the other, whether the edit has it or not."""
    model = build_model("llama", vocab_size=len(tokenizer))
    edit = _fit(model, tokenizer, demonstrations, layers=layers)
    model.model.layers[2].mlp = model.model.layers[1].mlp
    with pytest.raises(SiteError, match=r"layers \[1, 2\] share one module"):
        sealign.attach(model, edit)
    with pytest.raises(SiteError, match=r"layers \[1, 2\] share one module"):
        _fit(model, tokenizer, demonstrations, layers=layers)
    assert our_hooks(model) == 0
    with pytest.warns(SealignWarning, match="other weights"), sealign.apply_edit(model, small_edit.with_layers([3])):
        pass


@pytest.mark.slow
def test_compiled_models(tokenizer: Any, small_edit: sealign.Edit, tmp_path: Path) -> None:
    """Of an edit that has a gate at its second layer and none at its first."""
    build_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    gated(small_edit, 0.0, first=3).save_pretrained(tmp_path / "edit")
    script = Path(__file__).with_name("compiled.py")
    command: list[Any] = [
        sys.executable,
        "-W",
        "error::UserWarning",
        script,
        "model",
        tmp_path / "model",
        tmp_path / "edit",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("feature_map", ["identity", "tanh"])
def test_attached_in_inference_mode_then_trained(feature_map: str, tokenizer: Any, demonstrations: Any) -> None:
    def gradient() -> torch.Tensor:
        loss = model(input_ids=IDS, labels=IDS).loss
        return torch.autograd.grad(loss, model.model.layers[0].mlp.up_proj.weight)[0]

    model = build_model("llama", vocab_size=len(tokenizer))
    edit = _fit(model, tokenizer, demonstrations, feature_map=feature_map)
    with sealign.apply_edit(model, copy.deepcopy(edit)):
        expected = gradient()
    with torch.inference_mode():
        handle = sealign.attach(model, edit)
        model(input_ids=IDS)
    assert torch.equal(gradient(), expected)
    handle.detach()


def test_gradients_flow_through_an_edited_model(llama: Any, small_edit: sealign.Edit) -> None:
    weight = llama.model.layers[0].mlp.up_proj.weight
    with sealign.apply_edit(llama, small_edit):
        loss = llama(input_ids=IDS, labels=IDS).loss
        (gradient,) = torch.autograd.grad(loss, weight)
    before = weight.detach().clone()
    with sealign.apply_edit(llama, small_edit), torch.no_grad():
        step = 1e-2 * gradient / gradient.norm()
        weight += step
        up = llama(input_ids=IDS, labels=IDS).loss
        weight -= 2 * step
        down = llama(input_ids=IDS, labels=IDS).loss
        weight.copy_(before)  # to the bit, for the tests that share the model
    assert float(up - down) == pytest.approx(2e-2 * float(gradient.norm()), rel=2e-2)


@pytest.fixture(scope="module")
def edit(smollm2: Any) -> sealign.Edit:
    """An edit of the embedded model."""
    demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=12)
    config = sealign.SEAConfig(explained_variance=0.9, centered=True, strength=0.5)
    model, tokenizer = smollm2
    return sealign.fit_edit(model, tokenizer, demonstrations, config=config)


@pytest.mark.slow
class TestRealModel:
    """The same properties on the embedded model."""

    def _batch(self, tokenizer: Any) -> list[list[int]]:
        texts = ["The river rose in the night.", "Ask the clerk at the counter for a form and fill it in.", "Why?"]
        return [tokenizer.encode(text) for text in texts]

    def test_batch_padding_and_cache_do_not_matter(self, smollm2: Any, edit: sealign.Edit) -> None:
        from sealign.models.batching import pad_right

        model, tokenizer = smollm2
        sequences = self._batch(tokenizer)
        with sealign.apply_edit(model, edit):
            ids, mask = pad_right(sequences, 0, torch.device("cpu"))
            together = _logits(model, ids, attention_mask=mask)
            for row, sequence in enumerate(sequences):
                alone = _logits(model, torch.tensor([sequence]))[0]
                torch.testing.assert_close(together[row, : len(sequence)], alone, rtol=1e-4, atol=2e-3)
            longest = torch.tensor([sequences[1]])
            kwargs = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(longest)}
            kwargs |= {"temperature": None, "top_p": None}
            assert torch.equal(
                model.generate(longest, use_cache=True, **kwargs), model.generate(longest, use_cache=False, **kwargs)
            )

    def test_restored_to_the_bit_and_saved_to_the_bit(self, smollm2: Any, edit: sealign.Edit, tmp_path: Any) -> None:
        model, tokenizer = smollm2
        ids = torch.tensor([self._batch(tokenizer)[1]])
        base = _logits(model, ids)
        with sealign.apply_edit(model, edit):
            edited = _logits(model, ids)
        assert torch.equal(_logits(model, ids), base)
        with sealign.apply_edit(model, edit, strength=0):
            assert torch.equal(_logits(model, ids), base)
        edit.save_pretrained(tmp_path / "edit")
        with sealign.apply_edit(model, sealign.Edit.from_pretrained(tmp_path / "edit")):
            assert torch.equal(_logits(model, ids), edited)
        assert not torch.equal(edited, base)

    def test_bfloat16_stays_near_float32(self, smollm2: Any, edit: sealign.Edit) -> None:
        """An edit in bfloat16 moves the output by what it does in float32, within the noise of bfloat16 itself."""
        model, tokenizer = smollm2
        narrow, _ = sealign.load_model("smollm2", dtype="bfloat16", device="cpu")
        ids = torch.tensor([self._batch(tokenizer)[1]])
        with sealign.apply_edit(model, edit), sealign.apply_edit(narrow, edit):
            wide_logits, narrow_logits = _logits(model, ids), _logits(narrow, ids).float()
        noise = (_logits(model, ids) - _logits(narrow, ids).float()).abs().mean()
        assert float((wide_logits - narrow_logits).abs().mean()) < 2 * float(noise)
        agreement = (wide_logits.argmax(-1) == narrow_logits.argmax(-1)).float().mean()
        assert float(agreement) >= 0.8
