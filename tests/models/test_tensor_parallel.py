"""A model that transformers splits over processes is fitted and edited as the whole model is."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sealign
from sealign.demonstrations.demonstration import Demonstration
from tests.tiny_models import build_model

SPLIT = """
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer

import sealign
from sealign.errors import WorkerError
from sealign.fitting.workers import worker_group

folder = Path(sys.argv[1])
torch.set_num_threads(1)
distributed.init_process_group("gloo")
model = AutoModelForCausalLM.from_pretrained(folder / "model", tp_plan="auto").eval()
tokenizer = AutoTokenizer.from_pretrained(folder / "model")
demonstrations = sealign.load_demonstrations(folder / "demonstrations.jsonl")
ids = torch.tensor([[7, 31, 12, 55, 90, 23]])


@torch.no_grad()
def logits():
    return model(input_ids=ids, use_cache=False).logits


found = {"base": logits()}
edit = sealign.Edit.from_pretrained(folder / "edit")
with sealign.apply_edit(model, edit):
    found["edited"] = logits()
config = sealign.SEAConfig(layers="all", rank=(3, 2))
fitted = sealign.fit_edit(model, tokenizer, demonstrations, config=config)
for layer, change in fitted.affine_edits.items():
    found[f"change.{layer}"] = change.left @ change.right
with worker_group():
    try:
        sealign.fit_edit(model, tokenizer, demonstrations, config=config)
    except WorkerError as error:
        assert "split over the 2 workers" in str(error)
    else:
        raise AssertionError("the demonstrations of a split model were shared")
part = model.model.layers[0].mlp.down_proj.weight
found["columns"] = torch.tensor([getattr(part, "to_local", lambda: part)().shape[1]])
if distributed.get_rank() == 0:
    copies = {name: tensor.detach().contiguous().clone() for name, tensor in found.items()}
    save_file(copies, folder / "found.safetensors")
distributed.barrier()
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_split_over_two_processes(
    tokenizer: Any, demonstrations: list[Demonstration], small_edit: sealign.Edit, tmp_path: Path
) -> None:
    model = build_model("llama", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    small_edit.save_pretrained(tmp_path / "edit")
    lines = [json.dumps(dataclasses.asdict(item)) for item in demonstrations]
    (tmp_path / "demonstrations.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "split.py").write_text(SPLIT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(tmp_path / "split.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-4000:]
    found = load_file(tmp_path / "found.safetensors")
    assert int(found["columns"]) * 2 == model.config.intermediate_size  # it is split

    ids = torch.tensor([[7, 31, 12, 55, 90, 23]])
    with torch.no_grad():
        torch.testing.assert_close(found["base"], model(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
        with sealign.apply_edit(model, small_edit):
            torch.testing.assert_close(found["edited"], model(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
    whole = sealign.fit_edit(model, tokenizer, demonstrations, config=sealign.SEAConfig(layers="all", rank=(3, 2)))
    assert whole.layers == [0, 1, 2, 3]
    for layer, change in whole.affine_edits.items():
        torch.testing.assert_close(found[f"change.{layer}"], change.left @ change.right, atol=1e-4, rtol=1e-4)
