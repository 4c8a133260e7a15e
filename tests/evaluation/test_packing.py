"""The comparison of packed with plain scores that decides whether a model is scored packed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import sealign
from sealign.errors import SealignWarning
from sealign.evaluation.packing import packs
from tests.evaluation.test_scoring import forward_calls, make_requests
from tests.tiny_models import CONFIGS, build_model


@pytest.mark.parametrize("name", CONFIGS)
def test_ordinary_decoders_are_packed(name: str, tiny_model: Callable[[str], Any]) -> None:
    assert packs(tiny_model(name), make_requests(21), 64)


def test_a_model_whose_packed_scores_are_wrong_is_refused_and_said_once(tokenizer: Any) -> None:
    model = build_model("gpt_neo", vocab_size=len(tokenizer))
    with pytest.warns(SealignWarning, match=r"GPTNeoForCausalLM differ from plain ones by .* nats, more than 0.001"):
        assert not packs(model, make_requests(21), 64)
    assert not packs(model, make_requests(0), 64)  # and without a word


def test_rows_shorter_than_the_window_do_not_vouch_for_longer_ones(tokenizer: Any) -> None:
    model = build_model("gpt_neo", vocab_size=len(tokenizer))
    assert packs(model, make_requests(0), 8)
    with pytest.warns(SealignWarning, match="differ"):
        assert not packs(model, make_requests(21, count=30), 128)


def test_a_packed_row_that_raises_is_refused_with_its_reason(tokenizer: Any) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))

    def refuse(_module: Any, _args: Any, kwargs: Any) -> None:
        if kwargs.get("position_ids") is not None and kwargs["attention_mask"].dim() == 4:
            raise RuntimeError("this kernel takes no mask. More words.")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    with pytest.warns(SealignWarning, match=r"cannot be computed \(this kernel takes no mask\); scoring"):
        assert not packs(model, make_requests(21), 64)


def test_a_hook_that_mixes_tokens_is_found(tokenizer: Any) -> None:
    model, requests = build_model("llama", vocab_size=len(tokenizer)), make_requests(0)
    assert packs(model, requests, 64)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda _m, _i, out: out + 3 * out.cumsum(1) / 40)
    with pytest.warns(SealignWarning, match="differ"):
        assert not packs(model, requests, 64)
    handle.remove()


def test_the_comparison_is_made_once_for_rows_up_to_a_length(llama: Any, small_edit: sealign.Edit) -> None:
    requests = make_requests(21, count=9)
    assert packs(llama, requests, 64)
    with forward_calls(llama) as calls:
        assert packs(llama, make_requests(21, count=9), 64)
    assert calls  # the counting hook is new
    with sealign.apply_edit(llama, small_edit), forward_calls(llama) as calls:
        assert packs(llama, requests, 64)
        many = len(calls)
        assert packs(llama, make_requests(20, count=3), 64)
        assert packs(llama, requests, 64)
    assert many == len(calls) > 0


def test_an_edit_that_depends_on_later_tokens_is_not_packed(llama: Any, small_edit: sealign.Edit) -> None:
    with sealign.apply_edit(llama, small_edit.with_normalization("feature")) as handle:
        assert not packs(llama, make_requests(0), 64)
        handle.switch(False)
        assert packs(llama, make_requests(0), 64)


def test_not_a_number_agrees_with_itself(tokenizer: Any) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert packs(model, make_requests(21), 64)
