"""Compare a LoRA of an edit of a quantised model with the hooks, and print the agreement as JSON.

    python quantised_lora.py torchao-int8|bitsandbytes-8bit|bitsandbytes-4bit FOLDER

Run in the environment of ``make engines-env``, which has the libraries of quantisation.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

import sealign
from sealign.export.lora import export_lora
from sealign.export.verify import compare_outputs, model_outputs, reference_outputs
from sealign.models.loading import checkpoint_folder


def quantisation(name: str) -> Any:
    if name == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig  # type: ignore[import-not-found]

        return TorchAoConfig(Int8WeightOnlyConfig())
    if name == "bitsandbytes-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


def load(name: str, folder: str) -> Any:
    settings = {"quantization_config": quantisation(name), "device_map": "cpu", "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def main(name: str, target: str) -> None:
    folder = str(checkpoint_folder("smollm2"))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = load(name, folder)
    demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=8)
    config = sealign.SEAConfig(layers="last:4", rank=(3, 2), normalization="none", combine="negative")
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=config)
    base, edited = reference_outputs(model, tokenizer, edit)
    export_lora(model, edit, target)
    again = model_outputs(model, tokenizer)
    # Loaded as a user loads it, onto a base that is quantised again.
    adapted = PeftModel.from_pretrained(load(name, folder), target).eval()
    agreement = compare_outputs(name, base, edited, model_outputs(adapted, tokenizer), tolerance=1.0)  # type: ignore[arg-type]
    unchanged = all((a == b).all() for a, b in zip(base.log_probabilities, again.log_probabilities, strict=True))
    kind = type(model.get_submodule("model.layers.29.mlp.down_proj").weight).__name__
    found = dataclasses.asdict(agreement) | {"passed": agreement.passed, "weight": kind}
    print(json.dumps(found | {"unchanged": bool(unchanged)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
