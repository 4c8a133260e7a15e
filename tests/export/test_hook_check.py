"""The check before every export: an edit at the matrices is the edit at the modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from sealign.errors import ExportError
from sealign.export.hook_check import check_hooks
from sealign.export.matrix_changes import matrix_changes
from sealign.models.output_matrices import OutputMatrix, output_matrices
from tests.conftest import our_hooks
from tests.export.made_edits import random_edit
from tests.models.test_output_matrices import MIXTURES


@pytest.mark.parametrize("site", ["mlp", "attention"])
@pytest.mark.parametrize("normalization", ["none", "token"])
def test_the_matrices_of_an_edit_pass(
    tiny_model: Callable[[str], Any], tokenizer: Any, site: Any, normalization: Any
) -> None:
    for name in ("llama", "gpt2"):
        model = tiny_model(name)
        edit = random_edit(model, tokenizer, site=site, normalization=normalization, shift=True, scale=0.3)
        check_hooks(model, edit, output_matrices(model, dict(zip(edit.layers, edit.modules, strict=True))))
        check_hooks(model, edit.with_strength(0.0), [])
    assert our_hooks(model) == 0


def test_the_shared_expert_of_llama_4_is_not_its_module(tokenizer: Any) -> None:
    config = transformers.Llama4TextConfig(vocab_size=len(tokenizer), **MIXTURES["Llama4TextConfig"])
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
    edit = random_edit(model, tokenizer)
    experts = [
        OutputMatrix(layer, f"{path}.shared_expert.down_proj", model.get_submodule(f"{path}.shared_expert.down_proj"))
        for layer, path in zip(edit.layers, edit.modules, strict=True)
    ]
    with pytest.raises(
        ExportError, match=r"'model.layers.1.feed_forward.shared_expert.down_proj' and its like changes"
    ):
        check_hooks(model, edit, experts)
    assert our_hooks(model) == 0


def test_every_export_asks(llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them get their changes here; a wrong matrix must not leave it."""
    wrong = OutputMatrix(1, "model.layers.0.mlp.down_proj", llama.model.layers[0].mlp.down_proj)
    monkeypatch.setattr("sealign.export.matrix_changes.output_matrices", lambda *_: [wrong])
    with pytest.raises(ExportError, match="from those of the hooks"):
        matrix_changes(llama, random_edit(llama, tokenizer))


def test_logits_that_are_not_numbers(llama: Any, tokenizer: Any) -> None:
    edit = random_edit(llama, tokenizer)
    matrices = output_matrices(llama, dict(zip(edit.layers, edit.modules, strict=True)))
    hook = llama.lm_head.register_forward_hook(lambda *_: torch.full((1, 2, 3), float("nan")))
    with pytest.raises(ExportError, match="by nan from"):
        check_hooks(llama, edit, matrices)
    hook.remove()
