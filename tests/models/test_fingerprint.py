from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from sealign.edits.record import ModelRecord
from sealign.errors import FingerprintError, ModelError
from sealign.models.fingerprint import check_fingerprint, model_fingerprint
from sealign.record_files import RECORD_CONFIG, read_record, write_record
from tests.tiny_models import build_model

ARCHITECTURES = ("llama", "qwen2", "gpt2", "mixtral")

LLAMA = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "layer_classes": "LlamaDecoderLayer x 4",
}


class Compiled(nn.Module):
    """A wrapper with the attribute by which ``torch.compile`` holds the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


class Adapted(nn.Module):
    """A wrapper with the attributes of a PEFT model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model
        self.peft_config = {"default": None}

    def get_base_model(self) -> nn.Module:
        return self.inner


def test_what_a_model_is_known_by(llama: Any, tokenizer: Any) -> None:
    assert model_fingerprint(llama) == LLAMA | {"vocab_size": len(tokenizer)}


def test_fields_that_an_architecture_lacks_are_none(tiny_model: Callable[[str], Any]) -> None:
    fingerprint = model_fingerprint(tiny_model("gpt2"))
    assert (fingerprint["model_type"], fingerprint["hidden_size"]) == ("gpt2", 48)
    assert fingerprint["num_key_value_heads"] is None
    assert fingerprint["layer_classes"] == "GPT2Block x 4"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_is_known_again(tiny_model: Callable[[str], Any], tokenizer: Any, name: str) -> None:
    fingerprint = model_fingerprint(tiny_model(name))
    assert all(value is None or isinstance(value, str | int | float | bool) for value in fingerprint.values())
    check_fingerprint(tiny_model(name), fingerprint, name)
    other = build_model(name, vocab_size=len(tokenizer)).to(torch.bfloat16)
    with torch.no_grad():
        next(other.parameters()).zero_()
    check_fingerprint(other, fingerprint, name)
    for wrapped in (Compiled(other), Adapted(other), Compiled(Adapted(other))):
        check_fingerprint(wrapped, fingerprint, name)


@dataclass(frozen=True)
class ModelFile:
    __pydantic_config__: ClassVar[Any] = RECORD_CONFIG
    model: ModelRecord
    format: str = "test.model"
    format_version: int = 1


def test_a_fingerprint_survives_its_file(llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(
        write_record(ModelFile(ModelRecord("me/llama", None, model_fingerprint(llama), "aa", "bb", "cc", "float32")))
    )
    back = read_record(path, ModelFile, format="test.model", format_version=1).model.fingerprint
    assert json.dumps(back) == json.dumps(model_fingerprint(llama))
    check_fingerprint(llama, back, "me/llama")


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"hidden_size": 32, "num_attention_heads": 8, "head_dim": 4}, "head_dim hidden_size num_attention_heads"),
        ({"intermediate_size": 96}, "intermediate_size"),
        ({"num_hidden_layers": 3}, "layer_classes num_hidden_layers"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"head_dim": 8}, "head_dim"),
        ({"vocab_size": 401}, "vocab_size"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_another_configuration_is_refused_by_field(llama: Any, change: dict[str, Any], fields: str) -> None:
    other = build_model("llama", **({"vocab_size": llama.config.vocab_size} | change))
    with pytest.raises(FingerprintError) as caught:
        check_fingerprint(other, model_fingerprint(llama), "me/llama")
    message = str(caught.value)
    assert message.startswith("the edit was fitted on 'me/llama', and this model differs: ")
    assert re.findall(r"(\w+) is [^;]* instead of", message) == fields.split()
    for name in change:
        assert f"{name} is {change[name]!r} instead of {getattr(llama.config, name)!r}" in message
    assert message.endswith("or pass ignore_mismatch=True (--ignore-mismatch) to apply the edit nevertheless")


def test_another_architecture_is_refused(tiny_model: Callable[[str], Any]) -> None:
    fingerprints = {name: model_fingerprint(tiny_model(name)) for name in ARCHITECTURES}
    for name in ARCHITECTURES:
        for other in ARCHITECTURES:
            if other != name:
                with pytest.raises(FingerprintError, match=f"model_type is '{name}' instead of '{other}'"):
                    check_fingerprint(tiny_model(name), fingerprints[other], other)


def test_fields_on_one_side_only_are_refused(llama: Any) -> None:
    fingerprint = model_fingerprint(llama)
    with pytest.raises(FingerprintError, match="differs: novelty is None instead of 3; load that model"):
        check_fingerprint(llama, fingerprint | {"novelty": 3}, "me/llama")
    del fingerprint["vocab_size"]
    with pytest.raises(FingerprintError, match=r"differs: vocab_size is \d+ instead of None; load that model"):
        check_fingerprint(llama, fingerprint, "me/llama")


def test_other_layers_of_the_same_size_are_refused(llama: Any) -> None:
    class OtherLayer(type(llama.model.layers[0])):  # type: ignore[misc]
        pass

    other = copy.deepcopy(llama)
    other.model.layers[2].__class__ = OtherLayer
    message = "layer_classes is 'LlamaDecoderLayer x 3, OtherLayer x 1' instead of 'LlamaDecoderLayer x 4'"
    with pytest.raises(FingerprintError, match=message):
        check_fingerprint(other, model_fingerprint(llama), "me/llama")


def test_a_model_without_configuration() -> None:
    with pytest.raises(ModelError, match="Linear has no transformers configuration; load it with AutoModelForCausalLM"):
        model_fingerprint(nn.Linear(2, 3))


def test_the_model_is_not_changed(llama: Any) -> None:
    before = llama.config.to_dict(), {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    check_fingerprint(llama, model_fingerprint(llama), "me/llama")
    assert llama.config.to_dict() == before[0]
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in llama.state_dict().items())
