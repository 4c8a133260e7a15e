"""Hashes of weights: every bit counts for the exact one, and the other knows a checkpoint again in other precisions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sealign.models.checkpoint_tensors import checkpoint_tensors
from sealign.models.pretrained import empty_model
from sealign.models.weights import (
    are_comparable,
    has_weights,
    stored_weights,
    weights_digest,
    weights_hash,
    weights_type,
)
from tests.tiny_models import build_model


def model(**changes: Any) -> Any:
    return build_model("llama", vocab_size=51, **changes)


def holding(*weights: torch.Tensor) -> nn.Module:
    return nn.ParameterList([nn.Parameter(weight, requires_grad=False) for weight in weights])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_number_counts(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    digests = {weights_digest(holding(weight))}
    for index in range(15):
        changed = weight.clone().view(-1)
        changed[index] = torch.nextafter(changed[index], torch.tensor(9.0, dtype=dtype))
        digests.add(weights_digest(holding(changed.view(3, 5))))
    assert len(digests) == 16


def test_numbers_that_change_places_or_signs_count() -> None:
    weight = torch.arange(1.0, 17.0).view(4, 4).bfloat16()
    others = [
        weight.flip(0),
        weight.flip(1),
        weight.T,
        -weight,
        weight * torch.tensor([1, -1, 1, -1]),
        weight.view(2, 8),
    ]
    others.append(weight * torch.tensor([1.0, 1, 1, -1])[:, None])
    assert len({weights_digest(holding(one)) for one in [weight, *others]}) == 8
    assert len({weights_hash(holding(one)) for one in [weight, *others[:5], others[-1]]}) == 7


def test_blocks_of_a_large_weight_count() -> None:
    weight = torch.zeros(3_000_001)
    digests = {weights_digest(holding(weight))}
    for index in (0, 1_048_575, 1_048_576, 2_999_999, 3_000_000):
        weight[index] = 1
        digests.add(weights_digest(holding(weight)))
    assert len(digests) == 6


def test_a_checkpoint_is_known_again_in_another_precision() -> None:
    whole = model()
    found = weights_hash(whole)
    for dtype in (torch.bfloat16, torch.float64):
        other = copy.deepcopy(whole).to(dtype)
        assert weights_hash(other) == found
        assert weights_digest(other) != weights_digest(whole)
        assert are_comparable(weights_type(other), weights_type(whole))
    half = copy.deepcopy(whole).to(torch.float16)
    assert not are_comparable(weights_type(half), "float32")
    assert are_comparable("float16", "float16")
    assert weights_hash(_tuned(whole)) != found


def _tuned(whole: Any) -> Any:
    tuned = copy.deepcopy(whole)
    with torch.no_grad():
        tuned.model.layers[2].mlp.up_proj.weight[3, 5] *= 1.01
    return tuned


def test_a_change_is_seen_however_it_is_made() -> None:
    changing = model()
    weight = changing.model.layers[1].mlp.up_proj.weight
    found = [weights_hash(changing)]
    assert weights_hash(changing) == found[0]
    with torch.no_grad():
        weight[0, 0] += 1
    found.append(weights_hash(changing))
    weight.data += torch.randn_like(weight) / 100  # not counted as a change, as by PEFT when it merges an adapter
    found.append(weights_hash(changing))
    changing.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight.detach() * 2)
    found.append(weights_hash(changing))
    assert len(set(found)) == 4


def test_tied_weights_and_adapters_do_not_count() -> None:
    from peft import LoraConfig, get_peft_model

    tied = model(tie_word_embeddings=True)
    untied = copy.deepcopy(tied)
    untied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    assert weights_hash(untied) == weights_hash(tied)
    plain = model()
    found, exact = weights_hash(plain), weights_digest(plain)
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    assert weights_hash(adapted) == found
    assert weights_digest(adapted) != exact


@pytest.mark.parametrize("to_disk", [False, True])
def test_offloaded_weights_count(to_disk: bool, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    plain, moved = model(), model()
    if to_disk:
        disk_offload(moved, tmp_path, execution_device=torch.device("cpu"))
    else:
        cpu_offload(moved, execution_device=torch.device("cpu"))
    assert moved.model.layers[1].mlp.up_proj.weight.is_meta
    assert has_weights(moved)
    assert weights_digest(moved) == weights_digest(plain)
    assert weights_hash(moved) == weights_hash(plain)
    assert moved.model.layers[1].mlp.up_proj.weight.is_meta


def test_weights_made_in_inference_mode_have_a_hash() -> None:
    with torch.inference_mode():
        made = model()
    assert weights_hash(made) == weights_hash(model())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_the_hash_of_a_checkpoint_is_that_of_its_model(name: str, tiny_model: Any, tmp_path: Path) -> None:
    """With tied weights, and not where transformers makes weights from several tensors."""
    whole = tiny_model(name)
    whole.save_pretrained(tmp_path)
    checkpoint = checkpoint_tensors(tmp_path, whole)
    expected = None if name == "mixtral" else (weights_hash(whole), "float32")
    assert stored_weights(empty_model(whole.config), checkpoint) == expected


def test_a_skeleton_has_no_weights() -> None:
    assert not has_weights(model().to("meta"))
    assert has_weights(model())
    assert weights_type(holding(torch.zeros(2), torch.zeros(2, dtype=torch.uint8))) == "quantized"


class Quantised(torch.Tensor):
    """As torchao's types: a tensor of numbers and scales, which no operator but ``detach`` knows."""

    numbers: torch.Tensor
    scales: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, scales: torch.Tensor) -> Any:
        made = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.numbers, made.scales = numbers, scales
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scales"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], *_: Any) -> Any:
        return cls(**inner)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, _types: Any, args: Any = (), _kwargs: Any = None
    ) -> Any:
        if function is not torch.ops.aten.detach.default:
            raise NotImplementedError(function)
        return cls(args[0].numbers, args[0].scales)


def test_weights_inside_tensors_of_quantised_types_count() -> None:
    numbers, scales = torch.arange(6, dtype=torch.int8).view(2, 3), torch.tensor([[0.5], [2.0]])
    base = holding(Quantised(numbers, scales))
    assert weights_type(base) == "quantized"
    hashes, digests = {weights_hash(base)}, {weights_digest(base)}
    for part in (numbers, scales):
        part[1] += 1  # in place, so that a hash that is kept must be found to be old
        hashes.add(weights_hash(base))
        digests.add(weights_digest(base))
    assert len(hashes) == len(digests) == 3
    assert weights_hash(holding(Quantised(numbers.clone(), scales.clone()))) in hashes
