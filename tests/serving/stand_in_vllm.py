"""Stand-ins for vLLM, which the environment of the tests lacks: names that are imported, and a client of an engine."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import sealign
from sealign.serving.served_edits import ServedEdits


def install_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``from vllm import SamplingParams`` and ``from vllm.inputs import tokens_input`` work."""
    stand_ins: dict[str, dict[str, Any]] = {
        "vllm": {"SamplingParams": lambda **settings: SimpleNamespace(**settings)},
        "vllm.inputs": {"tokens_input": lambda ids: ids},
        "vllm.lora": {},
        "vllm.lora.request": {
            "LoRARequest": lambda name, number, path: SimpleNamespace(
                lora_name=name, lora_int_id=number, lora_path=path
            )
        },
    }
    for name, values in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)


class Engine:
    """Answers as vLLM's client does, for two workers that compute with transformers.

    ``answers`` are those to the calls of workers, in order; a call without one gets the hash of the edit in its folder.
    ``fault`` is what the engine does wrong.
    """

    def __init__(self, model: Any, *answers: Any, folder: Any = "/nowhere", fault: str = "") -> None:
        served = SimpleNamespace(hf_config=model.config, model=str(folder), logprobs_mode="raw_logprobs")
        self.vllm_config = SimpleNamespace(lora_config=None, model_config=served)
        self.answers = list(answers)
        self.calls: list[str] = []
        self.edits = ServedEdits()
        self._model = model
        self._fault = fault
        self._loaded: dict[str, sealign.Edit] = {}

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(encode=lambda text: list(range(3, 3 + len(text.split()))))

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        self.calls.append(method)
        if method == "sealign_load_edit":
            edit = sealign.Edit.from_pretrained(Path(args[0]))
            self._loaded[edit.hash] = edit
            default: list[Any] = [edit.hash] * 2
        else:
            default = [None, None]
        answer = self.answers.pop(0) if self.answers else default
        if isinstance(answer, Exception):
            raise answer
        return list(answer)

    def generate(self, prompt: list[int], params: Any, request_id: str) -> AsyncGenerator[Any, None]:
        served = self.edits.resolve(params.extra_args, None)
        edit = None if served is None else self._loaded[served.hash]
        if self._fault == "none":
            edit = None
        elif self._fault == "every request":
            edit = edit or next(iter(self._loaded.values()))
        elif self._fault == "half" and edit is not None:
            edit = edit.with_strength(edit.strength / 2)
        elif self._fault == "reversed" and edit is not None:
            edit = edit.reversed()
        return self._answer(prompt, params, edit)

    async def _answer(self, prompt: list[int], params: Any, edit: Any) -> AsyncGenerator[Any, None]:
        if self._fault == "fails":
            raise RuntimeError("out of memory")
        attached = contextlib.nullcontext() if edit is None else sealign.apply_edit(self._model, edit)
        with attached, torch.no_grad():
            ids = self._model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=params.max_tokens,
                min_new_tokens=None,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[0]
            logs = torch.log_softmax(self._model(ids[None]).logits[0].float(), -1)
        if self._fault == "NaN" and edit is not None:
            logs = logs * torch.nan
        steps: list[Any] = [
            {int(token): SimpleNamespace(logprob=float(row[token]))} for row, token in zip(logs, ids[1:], strict=False)
        ]
        start = len(prompt) - 1
        yield SimpleNamespace(finished=False)
        output = SimpleNamespace(token_ids=ids[len(prompt) :].tolist(), logprobs=steps[start:])
        yield SimpleNamespace(finished=True, prompt_logprobs=[None, *steps[:start]], outputs=[output])
