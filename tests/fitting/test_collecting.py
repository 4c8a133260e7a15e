"""Collection against the model's own hidden states, one sequence at a time."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import sealign
from sealign.errors import ActivationError, DemonstrationError
from sealign.files import read_tensors
from sealign.fitting.activations import Activations
from sealign.fitting.checkpoints import BatchStore
from sealign.fitting.collect_config import CollectConfig, TokenChoice
from sealign.fitting.collecting import (
    collect_activations,
    collect_together,
    read_width,
    resolve_read_sites,
)
from sealign.fitting.collector import Collector
from sealign.fitting.sequences import ROLES
from sealign.models.shared_prefix import common_prefix
from sealign.models.sites import resolve_sites
from tests.tiny_models import build_model


def _all_close(one: Activations, other: Activations, atol: float = 1e-5) -> None:
    for role in ROLES:
        ours, theirs = getattr(one, role), getattr(other, role)
        assert sorted(ours) == sorted(theirs)
        for layer in ours:
            torch.testing.assert_close(ours[layer], theirs[layer], rtol=1e-5, atol=atol)


@torch.no_grad()
def _expected(model: Any, tokenizer: Any, demonstrations: Any, config: CollectConfig, layer: int) -> dict[str, Any]:
    """The residual stream after a layer, from the model's own output, without batches, prefix or hooks."""
    form = config.prompt_format
    rows: dict[str, list[torch.Tensor]] = {role: [] for role in ROLES}
    for item in demonstrations:
        prompt = form.encode_prompt(tokenizer, item.prompt)
        length = len(prompt)
        if config.neutral == "generated":
            out = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=config.max_new_tokens,
                do_sample=False,
            )
            prompt = out[0].tolist()
        sequences = {
            "neutral": prompt,
            "positive": form.encode(tokenizer, item.prompt, item.positive),
            "negative": form.encode(tokenizer, item.prompt, item.negative),
        }
        generator = random.Random(f"{config.seed}:{item.prompt}:{item.positive}:{item.negative}")
        chosen = {role: generator.randrange(len(ids)) for role, ids in sequences.items()}
        for role, ids in sequences.items():
            hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]
            picked = {
                "last": hidden[-1],
                "mean": hidden.mean(0),
                "completion": hidden[length:].mean(0) if len(ids) > length else hidden[-1],
                "random": hidden[chosen[role]],
            }
            rows[role].append(picked[config.token])
    return {role: torch.stack(block) for role, block in rows.items()}


@pytest.mark.parametrize("token", ["last", "mean", "completion", "random"])
@pytest.mark.parametrize("neutral", ["prompt", "generated"])
@pytest.mark.parametrize("style", ["plain", "few_shot", "chat"])
def test_against_the_models_hidden_states(
    token: Any, neutral: Any, style: Any, llama: Any, tokenizer: Any, demonstrations: Any
) -> None:
    config = CollectConfig(
        token=token,
        neutral=neutral,
        max_new_tokens=5,
        prompt_format=sealign.PromptFormat(style, "Answer in one short sentence.\n" if style == "few_shot" else None),
        batch_size=3,
    )
    found = sealign.collect_activations(llama, tokenizer, demonstrations, site="residual", layers=[1], config=config)
    expected = _expected(llama, tokenizer, demonstrations, config, 1)
    for role in ROLES:
        assert getattr(found, role)[1].shape == (7, 48)
        torch.testing.assert_close(getattr(found, role)[1], expected[role], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("token", ["last", "mean", "completion", "random"])
def test_a_prompt_that_ends_inside_the_shared_beginning(token: Any, llama: Any, tokenizer: Any) -> None:
    """One prompt, and completions that begin alike, so that the neutral sequence is shorter than what is run once."""
    start = "It is what a river turns into when the winter is long and cold:"
    items = [
        sealign.Demonstration("What is ice?", f"{start} {word}.", f"{start} {word}, no.") for word in ("air", "mud")
    ]
    config = CollectConfig(token=token, seed=3)
    sequences = [config.prompt_format.encode(tokenizer, item.prompt, item.positive) for item in items]
    assert len(common_prefix(sequences)) > len(config.prompt_format.encode_prompt(tokenizer, "What is ice?")) + 8
    found = sealign.collect_activations(llama, tokenizer, items, site="residual", layers=[1], config=config)
    expected = _expected(llama, tokenizer, items, config, 1)
    for role in ROLES:
        torch.testing.assert_close(getattr(found, role)[1], expected[role], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["opt", "gemma3", "mixtral", "gpt2"])
@pytest.mark.parametrize("site", ["mlp", "attention", "residual"])
@pytest.mark.parametrize("token", ["last", "mean", "completion", "random"])
def test_a_shared_preamble_gives_the_same_matrices(
    name: str, site: str, token: Any, tiny_model: Callable[[str], Any], tokenizer: Any, demonstrations: Any
) -> None:
    """With the preamble run once against with it run in every sequence."""
    preamble = "The town lies by the river and the river rises in the hills."
    config = CollectConfig(prompt_format=sealign.PromptFormat("few_shot", preamble), batch_size=4, token=token)
    model = tiny_model(name)
    kwargs: dict[str, Any] = {"site": site, "layers": [2], "config": config}
    shared = sealign.collect_activations(model, tokenizer, demonstrations, **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sealign.models.shared_prefix.SHORTEST", 10_000)
        apart = sealign.collect_activations(model, tokenizer, demonstrations, **kwargs)
    _all_close(shared, apart, atol=1e-4)


@pytest.mark.parametrize("name", ["opt", "gemma3", "mixtral", "falcon"])
@pytest.mark.parametrize("site", ["mlp", "attention", "residual"])
def test_any_batch_size_gives_the_same_matrices(
    name: str, site: str, tiny_model: Callable[[str], Any], tokenizer: Any, demonstrations: Any
) -> None:
    model = tiny_model(name)
    found = [
        sealign.collect_activations(
            model, tokenizer, demonstrations, site=site, layers=[0, 3], config=CollectConfig(batch_size=size)
        )
        for size in (1, 4, 64)
    ]
    _all_close(found[0], found[1], atol=1e-4)
    _all_close(found[0], found[2], atol=1e-4)


def test_order_follows_the_demonstrations(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    forward = sealign.collect_activations(llama, tokenizer, demonstrations, layers=[2])
    backward = sealign.collect_activations(llama, tokenizer, demonstrations[::-1], layers=[2])
    torch.testing.assert_close(forward.negative[2], backward.negative[2].flip(0), rtol=1e-5, atol=1e-5)


def test_a_shared_preamble_is_run_once(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    resolve_sites(llama, "mlp")  # runs the model on a few tokens, the first time
    lengths: list[int] = []
    hook = llama.model.register_forward_pre_hook(
        lambda _m, args, kwargs: lengths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    preamble = "The town lies by the river and the river rises in the hills.\n" * 3
    config = CollectConfig(prompt_format=sealign.PromptFormat("few_shot", preamble), batch_size=64)
    sealign.collect_activations(llama, tokenizer, demonstrations, layers=[0], config=config)
    hook.remove()
    shared = len(tokenizer.encode(preamble.strip()))
    assert len(lengths) == 2
    assert lengths[0] >= shared
    assert lengths[1] < 14 * 60


def test_modes_are_restored_and_dropout_is_off(tokenizer: Any, demonstrations: Any) -> None:
    model = build_model("gpt2", vocab_size=len(tokenizer), resid_pdrop=0.5)
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    first, second = (sealign.collect_activations(model, tokenizer, demonstrations, layers=[3]) for _ in range(2))
    assert [module.training for module in model.modules()] == before
    _all_close(first, second, atol=0)


def test_no_output_outlives_its_layer(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    """Memory is bounded by the batch: when a layer runs, the outputs of the layers before it are gone."""
    import weakref

    outputs: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def note(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        alive.append(sum(reference() is not None for reference in outputs))
        outputs.append(weakref.ref(output))

    hooks = [layer.mlp.register_forward_hook(note) for layer in llama.model.layers]
    sealign.collect_activations(llama, tokenizer, demonstrations, config=CollectConfig(batch_size=64))
    for hook in hooks:
        hook.remove()
    assert len(alive) >= 4
    assert max(alive) == 0


class _Killed(BaseException):
    pass


def _killing_track(after: int) -> Callable[..., Iterable[Any]]:
    def track(items: Iterable[Any], _what: str, _how_many: int) -> Iterable[Any]:
        for number, item in enumerate(items):
            if number == after:
                raise _Killed
            yield item

    return track


@pytest.mark.parametrize("neutral", ["prompt", "generated"])
def test_a_killed_run_continues_where_it_stopped(
    neutral: Any, tokenizer: Any, demonstrations: Any, tmp_path: Path
) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    config = CollectConfig(batch_size=3, neutral=neutral, max_new_tokens=4)
    whole = sealign.collect_activations(model, tokenizer, demonstrations, config=config)
    kwargs: dict[str, Any] = {"config": config, "checkpoint_dir": tmp_path}
    for after in (1, 2, 2, 4):
        with pytest.raises(_Killed):
            sealign.collect_activations(model, tokenizer, demonstrations, track=_killing_track(after), **kwargs)
    (folder,) = tmp_path.iterdir()
    finished = sorted(folder.glob("activations-*.safetensors"))
    assert finished
    runs: list[int] = []
    model.model.register_forward_pre_hook(lambda *_: runs.append(1))
    resumed = sealign.collect_activations(model, tokenizer, demonstrations, **kwargs)
    total = 5 if neutral == "prompt" else 7  # batches of 3 from 14 or 21 sequences
    assert len(runs) <= total - len(finished) + 1  # and one run of the shared prefix
    _all_close(resumed, whole, atol=0)
    assert list(tmp_path.iterdir()) == []


def test_batches_of_other_settings_or_weights_are_not_read(tokenizer: Any, demonstrations: Any, tmp_path: Path) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    with pytest.raises(_Killed):
        sealign.collect_activations(
            model,
            tokenizer,
            demonstrations,
            checkpoint_dir=tmp_path,
            track=_killing_track(1),
            config=CollectConfig(batch_size=3),
        )
    (stale,) = tmp_path.iterdir()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 1.5
    other = copy.deepcopy(tokenizer)
    other.chat_template = other.chat_template.replace("<model>", "<model> ")
    with pytest.raises(_Killed):
        sealign.collect_activations(
            model, other, demonstrations, checkpoint_dir=tmp_path, track=_killing_track(1),
            config=CollectConfig(batch_size=3),
        )  # fmt: skip
    assert len(list(tmp_path.iterdir())) == 2
    fresh = sealign.collect_activations(model, tokenizer, demonstrations, config=CollectConfig(batch_size=3))
    again = sealign.collect_activations(
        model, tokenizer, demonstrations, checkpoint_dir=tmp_path, config=CollectConfig(batch_size=3)
    )
    _all_close(fresh, again, atol=0)
    assert len(list(tmp_path.iterdir())) == 2
    assert stale in tmp_path.iterdir()


def test_not_a_number_names_layer_and_demonstration(tokenizer: Any, demonstrations: Any) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    token = tokenizer.encode(demonstrations[4].positive)[-1]
    others = [i for d in demonstrations for t in (d.prompt, d.positive, d.negative) for i in tokenizer.encode(t)]
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0] = float("nan")
    assert token in others
    with pytest.raises(
        ActivationError, match=r"NaN or infinity in the activations of layer 2 for the demonstration '.+' \("
    ):
        sealign.collect_activations(model, tokenizer, demonstrations)


def test_too_long_for_the_context(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    long = sealign.Demonstration("word " * 300, "a", "b")
    with pytest.raises(
        DemonstrationError, match=r"demonstration 'word word .*\.\.\.' \(.*\) is \d+ tokens long, .* context is 256"
    ):
        sealign.collect_activations(llama, tokenizer, [*demonstrations, long])


def test_no_demonstrations(llama: Any, tokenizer: Any) -> None:
    with pytest.raises(DemonstrationError, match="at least 1"):
        sealign.collect_activations(llama, tokenizer, [])


@pytest.mark.slow
@pytest.mark.parametrize("neutral", ["prompt", "generated"])
def test_real_model_against_its_hidden_states(neutral: Any, smollm2: Any) -> None:
    demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=5)
    config = CollectConfig(neutral=neutral, max_new_tokens=6, batch_size=4)
    model, tokenizer = smollm2
    found = sealign.collect_activations(model, tokenizer, demonstrations, site="residual", layers=[14], config=config)
    if neutral == "prompt":
        expected = _expected(model, tokenizer, demonstrations, config, 14)
        for role in ROLES:
            torch.testing.assert_close(getattr(found, role)[14], expected[role], rtol=1e-3, atol=1e-2)
    else:
        assert not torch.allclose(found.neutral[14], found.positive[14])


@pytest.mark.parametrize("neutral", ["prompt", "generated"])
def test_several_sites_and_token_choices_in_one_pass(
    neutral: Any, llama: Any, tokenizer: Any, demonstrations: Any, tmp_path: Path
) -> None:
    config = CollectConfig(neutral=neutral, max_new_tokens=3, batch_size=3)
    sites = ["residual", "mlp", "attention", "heads"]
    tokens: list[TokenChoice] = ["completion", "last", "mean", "random"]
    for site in sites:
        resolve_read_sites(llama, site, [0, 2])  # runs the model once
    calls: list[int] = []
    hook = llama.model.register_forward_pre_hook(lambda *_: calls.append(1))
    collect_activations(llama, tokenizer, demonstrations, site="heads", layers=[0, 2], config=config)
    one = len(calls)  # with that which finds the heads
    found = collect_together(
        llama,
        tokenizer,
        demonstrations,
        sites=sites,
        tokens=tokens,
        layers=[2, 0],
        config=config,
        checkpoint_dir=tmp_path,
    )
    assert len(calls) <= 2 * one
    hook.remove()
    assert list(found) == [(site, token) for site in sites for token in tokens]
    for (site, token), own in found.items():
        own_config = config.replace(token=token)
        expected = collect_activations(llama, tokenizer, demonstrations, site=site, layers=[0, 2], config=own_config)
        assert own.site == site
        assert list(own.layers) == [0, 2]
        _all_close(own, expected)
    assert list(tmp_path.rglob("*.safetensors"))  # for a run that goes on


def test_layers_above_the_highest_that_is_read_do_not_run(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    ran: list[int] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, layer in enumerate(llama.model.layers)
    ]
    resolve_read_sites(llama, "residual", [1])
    ran.clear()
    collect_activations(llama, tokenizer, demonstrations, site="residual", layers=[1])
    assert set(ran) == {0, 1}
    for hook in hooks:
        hook.remove()


def test_a_mapped_file_holds_what_memory_would(llama: Any, tokenizer: Any, demonstrations: Any, tmp_path: Path) -> None:
    expected = collect_activations(llama, tokenizer, demonstrations)
    with (tmp_path / "kept.safetensors").open("w+b") as file:
        collector = Collector(llama, tokenizer, {"mlp": resolve_sites(llama, "mlp")}, ["last"], CollectConfig())
        (found,) = collector.run(demonstrations, BatchStore(None), file).values()
    _all_close(found, expected, atol=0)
    stored = read_tensors(tmp_path / "kept.safetensors")
    assert torch.equal(stored["negative.mlp.last.2"], expected.negative[2])


def test_batches_are_kept_until_they_are_cleared(
    llama: Any, tokenizer: Any, demonstrations: Any, tmp_path: Path
) -> None:
    collector = Collector(llama, tokenizer, {"mlp": resolve_read_sites(llama, "mlp")}, ["last"], CollectConfig())
    with collector.open_store(tmp_path, demonstrations) as store:
        collector.run(demonstrations, store)
    assert list(tmp_path.rglob("*.safetensors"))
    expected = collect_activations(llama, tokenizer, demonstrations)
    calls: list[int] = []
    hook = llama.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with collector.open_store(tmp_path, demonstrations) as store:
        (found,) = collector.run(demonstrations, store).values()
        store.clear()
    hook.remove()
    _all_close(found, expected)
    assert calls == []
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_heads_are_what_the_output_matrix_takes_in(
    name: str, tiny_model: Callable[[str], Any], tokenizer: Any, demonstrations: Any
) -> None:
    """Against the attention output: heads times the output matrix, plus its bias."""
    model = tiny_model(name)
    if name == "qwen3":  # heads that are together wider than the model
        model = build_model("qwen3", vocab_size=len(tokenizer), head_dim=20)
    config = CollectConfig(batch_size=3, token="last")
    heads = collect_activations(model, tokenizer, demonstrations, site="heads", layers=[2], config=config)
    outputs = collect_activations(model, tokenizer, demonstrations, site="attention", layers=[2], config=config)
    assert heads.site == "heads"
    (site,) = resolve_read_sites(model, "heads", [2])
    assert heads.neutral[2].shape == (7, read_width(model, site))
    assert read_width(model, site) == (80 if name == "qwen3" else 48)
    for role in ROLES:
        with torch.no_grad():
            expected = site.module(getattr(heads, role)[2])
        torch.testing.assert_close(getattr(outputs, role)[2], expected, rtol=1e-4, atol=1e-5)


def test_activations_by_layer(llama: Any, tokenizer: Any, demonstrations: Any) -> None:
    found = collect_activations(llama, tokenizer, demonstrations, layers=[3, 1])
    assert found.layers == [1, 3]
    assert all(own is getattr(found, role)[3] for own, role in zip(found.rows(3), ROLES, strict=True))
