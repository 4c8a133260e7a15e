"""LoRA exports of edits of quantised base models, loaded as a user loads them: onto a base that was quantised anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sealign
from sealign.export.lora import export_lora
from sealign.export.verify import compare_outputs, model_outputs, reference_outputs
from sealign.models import checkpoint_folder

pytestmark = [
    pytest.mark.slow,
    # Raised inside the libraries of quantisation and PEFT.
    *(pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning", "DeprecationWarning")),
]


def torchao_int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def bitsandbytes_8bit() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def bitsandbytes_4bit() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


@pytest.mark.parametrize("quantisation", [torchao_int8, bitsandbytes_8bit, bitsandbytes_4bit])
def test_the_adapter_does_on_the_quantised_base_what_the_hooks_do(
    quantisation: Callable[[], Any], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(checkpoint_folder("smollm2"))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def load() -> Any:
        settings = {"quantization_config": quantisation(), "device_map": "cpu", "dtype": torch.float32}
        return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()

    model = load()
    demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=8)
    config = sealign.FitConfig(layers="last:4", rank=(3, 2), normalization="none", combine="negative")
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=config)
    base, edited = reference_outputs(model, tokenizer, edit)
    export_lora(model, edit, tmp_path / "adapter")
    unchanged = model_outputs(model, tokenizer)  # reading weights back leaves the model as it is
    assert [logs.tolist() for logs in unchanged.log_probabilities] == [logs.tolist() for logs in base.log_probabilities]
    adapted = PeftModel.from_pretrained(load(), str(tmp_path / "adapter")).eval()
    agreement = compare_outputs("lora", base, edited, model_outputs(adapted, tokenizer), tolerance=1.0)
    assert agreement.passed, agreement
    assert agreement.share == pytest.approx(1.0, abs=0.03)
    assert agreement.mean < 0.05 * agreement.effect
